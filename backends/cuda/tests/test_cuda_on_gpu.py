"""The libraries themselves, where a GPU of sm_90 and their pinned versions are (level L3); skipped elsewhere."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qhal.formats import Format
from qhal.requests import AttentionRequest, GemmRequest
from qhal.tensors import QTensor
from qhal_conformance import datasets
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_cuda import flashinfer, humming, libraries
from qhal_cuda.humming import choice, launch, weight
from qhal_cuda.ops import CudaOps

USABLE = (
    libraries.usable() if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) else frozenset()
)
FORMATS = (
    "int4.g128*bf16", "int3.g32*bf16", "int8.g128*bf16", "int8.row*bf16", "int8.g64*fp16", "uint4-uint4.g64*bf16",
    "uint6-uint6.g128*bf16", "e2m1.g32*e8m0", "e2m1.g16*(e4m3fn.tensor*fp32)", "e3m2.g128*bf16", "e4m3fn.row*bf16",
)  # fmt: skip


def ops() -> CudaOps:
    return CudaOps("sm_90", "cuda:0", USABLE)


def bits_of(codes: Tensor, bits: int) -> Tensor:
    """int32 [N, K * bits / 32], codes of a row one after the other from the lowest bit."""
    n, k = codes.shape
    single = (codes.to(torch.int64)[..., None] >> torch.arange(bits, device=codes.device)) & 1
    words = single.reshape(n, k * bits // 32, 32) << torch.arange(32, device=codes.device)
    return words.sum(-1).to(torch.int32)


@pytest.mark.skipif("humming" not in USABLE, reason="humming-kernels as pinned and a GPU of sm_90")
@pytest.mark.parametrize("w", FORMATS)
def test_humming_lays_weights_as_we_read_it(w: str) -> None:
    from humming.transform import transform_humming_tensors

    x = "fp16" if w.endswith("fp16") else "bf16"
    request = GemmRequest(w=Format.parse(w), n=256, k=512, x=(Format(x),), m=(512, 1024), graph=True)
    k = choice.kind(request)
    assert k is not None
    plain = datasets.weight("gpu", w, request.w, 256, 512, "normal").to("cuda:0")
    unsigned = weight._unsigned(plain.codes, plain.format, choice.Kind(**{**vars(k), "x": "float16"}))
    groups = 512 // k.group
    inner = plain.scale.codes if isinstance(plain.scale, QTensor) else plain.scale
    assert isinstance(inner, Tensor)
    tensors: dict[str, Any] = {
        "weight": bits_of(unsigned, k.bits),
        "weight_scale": inner.expand(256, groups).contiguous(),
    }
    if k.scale == "float8e8m0":
        tensors["weight_scale"] = inner.view(torch.float8_e8m0fnu)
    if isinstance(plain.zero, Tensor):
        tensors["zero_point"] = bits_of(plain.zero.expand(256, groups).t().contiguous(), k.bits).t().contiguous()
    if isinstance(plain.scale, QTensor):
        assert isinstance(plain.scale.scale, Tensor)
        tensors["weight_scale_2"] = plain.scale.scale.float().reshape(1)
    theirs = transform_humming_tensors(launch.config(request, k), tensors)
    ours = weight._planes(plain, k)
    scale = ours.scale.codes if isinstance(ours.scale, QTensor) else ours.scale
    assert isinstance(scale, Tensor) and torch.equal(theirs["weight"], ours.codes)
    assert torch.equal(theirs["weight_scale"].view(torch.uint8), scale.view(torch.uint8))
    assert ours.zero is None or torch.equal(theirs["zero_point"], ours.zero)  # type: ignore[arg-type]


def suite(kind: type, chosen: Any, largest: int) -> list[Case]:
    """What the suite asks of a library up to level 1; `largest` bounds the reference's work."""
    found = []
    for case in catalogue(1):
        r = OPERATIONS[case.operation].request(case)
        if isinstance(r, kind) and chosen(r, (9, 0)) and prod(size for _, size in case.shape) <= largest:
            found.append(case)
    return found


@pytest.mark.skipif("humming" not in USABLE, reason="humming-kernels as pinned and a GPU of sm_90")
@pytest.mark.parametrize("case", suite(GemmRequest, humming.choose, 1 << 22), ids=lambda case: case.id)
def test_humming_is_in_its_class(case: Case) -> None:
    class Only(CudaOps):
        interface: ClassVar[tuple[int, int]] = (1, 0)

        def _path(self, request: Any) -> None:
            """No shared kernel: the library is what is asked."""

    record = run_case(case, Only("sm_90", "cuda:0", USABLE))
    assert record.outcome.status is Status.PASS, record.outcome.reason


@pytest.mark.skipif("humming" not in USABLE, reason="humming-kernels as pinned and a GPU of sm_90")
def test_humming_repeats_itself_in_a_graph() -> None:
    fw = Format.parse("int4.g128*bf16")
    request = GemmRequest(w=fw, n=256, k=512, x=(Format("bf16"),), m=(512, 1024), graph=True)
    device = ops()
    prepared = device.prepare(datasets.weight("gpu", "w", request.w, 256, 512, "normal"), request)
    assert isinstance(prepared, humming.HummingWeight)
    rows = torch.randn(96, 512, device="cuda:0").bfloat16()
    y = device.gemm(rows, prepared).clone()
    replay = device.capture(lambda: device.gemm(rows, prepared))
    assert torch.equal(replay(), y) and torch.equal(replay(), y)


ASKED = [
    c
    for c in suite(AttentionRequest, flashinfer.choose, 1 << 30)
    if c.out == "bf16" and c.size("d") == 64  # the library compiles a module for every type, dim and option
]


@pytest.mark.skipif("flashinfer" not in USABLE, reason="flashinfer-python as pinned and a GPU of sm_90")
@pytest.mark.parametrize(
    "case",
    ASKED,
    ids=lambda case: case.id,
)
def test_flashinfer_is_in_its_class(case: Case) -> None:
    record = run_case(case, ops())
    assert record.outcome.status is Status.PASS, record.outcome.reason
