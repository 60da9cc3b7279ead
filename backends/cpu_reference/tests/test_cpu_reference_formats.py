"""Every canonical format is kept, given back, refitted and multiplied: bit for bit, at fixed addresses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qhal import Format, FormatError, GemmRequest, GroupedRequest, NumericsClass, QTensor
from qhal.grammar import ALIASES
from qhal.tensors import same_bits

N, K = 24, 256
NAMES = [
    *ALIASES, "int4_g128", "uint4_g128", "int4.row*bf16", "int4-int4.g128*bf16", "uint4-uint4.g128*fp16",
    "int8.row*bf16", "int8-fp32.row*fp32", "int8-int8.tensor*fp32", "uint4-fp16.g64*fp16",
    "int8.row*(fp32.tensor/fp32)",
    "e4m3fn.row*bf16%2:4", "e4m3fn-fp32.row*fp32", "e5m2.row*fp32", "e5m2fnuz.tensor*fp32", "e4m3fn.col*fp32",
    "int8.head*fp32", "lut4.row*fp16", "int8.row/fp32", "e4m3fn.8x16*e8m0", "int2.g16*bf16", "int3-int3.g16*bf16",
    "int5.row*fp32", "uint6-uint6.g16*fp16", "int7.row*fp32", "uint2-uint2.g16*fp16", "int1.row*fp32", "bf16", "fp16",
    "fp32", "e4m3fn", "int4", "nf4.row*fp32",
]  # fmt: skip


def request(f: Format, experts: int = 0, *, exact: bool = True, indexed: bool = False) -> GemmRequest | GroupedRequest:
    numerics = NumericsClass.EXACT if exact else None
    gemm = GemmRequest(w=f, n=N, k=K, x=(Format("fp32"),), numerics=numerics, group_index=indexed)
    return GroupedRequest(gemm=gemm, experts=experts, groups="offsets") if experts else gemm


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_restore_and_refits_of_every_format(ops, make, name, experts):
    f = Format.parse(name)
    shape = (experts, N, K) if experts else (N, K)
    first, second = make(f, shape, 1), make(f, shape, 2)
    for exact in (True, False):
        r = request(f, experts, exact=exact)
        p = ops.prepare(first, r)
        assert ops.restore(p).equal(first)
        assert not {t.data_ptr() for t in p.tensors().values()} & {t.data_ptr() for t in first.planes().values()}
        addresses = {plane: t.data_ptr() for plane, t in p.tensors().items()}
        assert {f"weight.{plane}" for plane in first.planes()} <= addresses.keys()
        assert ops.prepare(second, r, into=p) is p
        assert {plane: t.data_ptr() for plane, t in p.tensors().items()} == addresses
        assert ops.restore(p).equal(second)
        fresh = ops.prepare(second, r)
        assert all(same_bits(t, fresh.tensors()[plane]) for plane, t in p.tensors().items())


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_decoded_weight(ops, make, name):
    w = make(name, (N, K), 3)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0))
    dense = ops.prepare(w.dequantize(), request(Format("fp32")))
    assert torch.equal(ops.gemm(x, ops.prepare(w, request(w.format))), ops.gemm(x, dense))


@pytest.mark.parametrize("name", [n for n in NAMES if Format.parse(n).block is not None])
def test_refits_refuse_what_changes_shape(ops, make, name):
    """A plane of another shape or type, or one more or less: refused before the first byte is written."""
    f = Format.parse(name)
    w, other = make(f, (N, K), 1), make(f, (N, K), 2)
    p = ops.prepare(w, request(f))
    changed: list[QTensor] = []
    if isinstance(other.scale, torch.Tensor) and other.scale.is_floating_point() and other.scale.element_size() > 1:
        wide = torch.float16 if other.scale.dtype == torch.float32 else torch.float32
        changed.append(replace(other, scale=other.scale.to(wide)))
    if isinstance(other.zero, torch.Tensor) and other.zero.numel() > 1:
        changed.append(replace(other, zero=other.zero[:1, :1].clone()))
    if isinstance(other.offset, torch.Tensor) and other.offset.numel() > 1:
        changed.append(replace(other, offset=other.offset[:1, :1].clone()))
    for bad in changed:
        with pytest.raises(FormatError, match=r"into= weight\.(scale|zero|offset): is .*, was .*; prepare a new one"):
            ops.prepare(bad, request(f), into=p)
        assert ops.restore(p).equal(w)
    if f.block is not None and f.block.kind == "group":
        indexed = replace(other, group_index=torch.zeros(K, dtype=torch.int32))
        with pytest.raises(FormatError, match="was prepared for"):
            ops.prepare(indexed, request(f, indexed=True), into=p)
        assert ops.restore(p).equal(w)
    smaller = make(f, (N // 2, K), 2)
    with pytest.raises(FormatError, match="the request says"):
        ops.prepare(smaller, request(f), into=p)
    assert ops.restore(p).equal(w)
