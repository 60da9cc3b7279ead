"""Act-order weights: columns sorted by group when prepared, x gathered to them; by index where groups are uneven."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_ops import DEVICE, Emulated

from qhal.errors import FormatError
from qhal.formats import Format
from qhal.requests import GemmRequest
from qhal.tensors import QTensor
from qhal_conformance import datasets
from qhal_portable.prepared import PreparedWeight
from qhal_portable.storage import canonical

OPS = Emulated()


def request_of(w: str, k: int, n: int, m: int) -> GemmRequest:
    return GemmRequest(w=Format.parse(w), n=n, k=k, x=(Format("bf16"),), m=(0, m), group_index=True)


def weight_of(name: str, r: GemmRequest) -> QTensor:
    assert isinstance(r.w, Format)
    return datasets.weight(name, "w", r.w, r.n, r.k, "normal", group_index=True)


SORTED = [
    ("int4.g32*bf16", 256, "word32-sorted"),
    ("int4.g128*bf16", 1280, "word32-sorted"),  # more columns than a program gathers, and no whole number of programs
    ("uint4-uint4.g32*fp16", 256, "word32-sorted"),
    ("int8.g32*bf16", 160, "canonical-sorted"),
    ("int3.g32*bf16", 96, "nibble16-sorted"),
]


@pytest.mark.parametrize(("w", "k", "layout"), SORTED, ids=[s[0] for s in SORTED])
def test_act_order_is_sorted_where_groups_are_full_and_read_by_index_where_not(w: str, k: int, layout: str) -> None:
    request = request_of(w, k, 33, 1024)
    assert OPS.supports(request).layouts == (layout,)
    weight = weight_of("order", request)
    assert weight.group_index is not None
    uneven = weight.group_index.clone()
    uneven[(uneven == 1).nonzero()[0]] = 0
    for given, moved in ((weight, True), (replace(weight, group_index=uneven), False)):
        prepared = OPS.prepare(given.to(DEVICE), request)
        assert isinstance(prepared, PreparedWeight) and isinstance(prepared.stored, QTensor)
        assert prepared.stored.layout.endswith("-sorted") == moved == ("order" in prepared.made)
        back = OPS.restore(prepared)
        assert isinstance(back, QTensor) and back.to("cpu").equal(given)
        for rows in (1, 3, 600):
            x = torch.randn(rows, 2 * k, generator=torch.Generator().manual_seed(rows)).bfloat16()[:, :k]
            expected = x.double() @ given.dequantize().double().T
            y = OPS.gemm(x.to(DEVICE), prepared).cpu().double()
            assert (y - expected).norm() <= 2.0**-7 * expected.norm()
            out = torch.empty(rows, 33, dtype=torch.bfloat16, device=DEVICE)
            assert OPS.gemm(x.to(DEVICE), prepared, out=out) is out and torch.equal(out.cpu().double(), y)
        assert OPS.gemm(torch.zeros(0, k, dtype=torch.bfloat16, device=DEVICE), prepared).shape == (0, 33)
        with pytest.raises(FormatError, match="must be bf16"):
            OPS.gemm(torch.zeros(2, k + 1, dtype=torch.bfloat16, device=DEVICE), prepared)


def test_another_order_is_written_into_a_sorted_weight_and_uneven_groups_are_refused() -> None:
    request = request_of("int4.g32*bf16", 256, 32, 32)
    first, second = weight_of("first", request), weight_of("second", request)
    prepared = OPS.prepare(first.to(DEVICE), request)
    assert isinstance(prepared, PreparedWeight)
    places = {name: t.data_ptr() for name, t in prepared.tensors().items()}
    OPS.prepare(second.to(DEVICE), request, into=prepared)
    assert places == {name: t.data_ptr() for name, t in prepared.tensors().items()}
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.double() @ second.dequantize().double().T
    y = OPS.gemm(x.to(DEVICE), prepared)
    assert (y.cpu().double() - expected).norm() <= 2.0**-7 * expected.norm()
    uneven = replace(second, group_index=torch.zeros(256, dtype=torch.int32))
    with pytest.raises(FormatError, match="would be word32; prepare a new one"):
        OPS.prepare(uneven.to(DEVICE), request, into=prepared)
    assert torch.equal(OPS.gemm(x.to(DEVICE), prepared), y)
    indexed = OPS.prepare(uneven.to(DEVICE), request)
    with pytest.raises(FormatError, match="would be word32-sorted; prepare a new one"):
        OPS.prepare(second.to(DEVICE), request, into=indexed)


def test_a_layout_of_a_backend_s_own_is_left_alone() -> None:
    w = replace(weight_of("own", request_of("int4.g32*bf16", 64, 4, 1)), layout="scales")
    assert canonical(w) is w
