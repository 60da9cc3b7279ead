"""TritonOps where the tests run: in Triton's interpreter on a processor (level L2), or on the GPU that is there."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch

from qhal.requests import GemmRequest, Request
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance import datasets
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_triton.ops import TritonOps
from qhal_triton.target import Target

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
"""As tensors say it: a device without a number equals none of theirs."""
HOPPER = Target(kind="cuda", arch="sm_90", warp=32, shared=227 << 10, fp8=frozenset({"e4m3fn", "e5m2"}))
CDNA = Target(kind="hip", arch="gfx942", warp=64, shared=64 << 10, fp8=frozenset({"e4m3fnuz", "e5m2fnuz"}))


class Emulated(TritonOps):
    """Every kernel that a target would get."""

    name: ClassVar[str] = "triton"
    interface: ClassVar[tuple[int, int]] = (1, 0)

    def __init__(self, target: Target = HOPPER) -> None:
        super().__init__(target, torch.device(DEVICE))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def product_and_reference(ops: Emulated, request: GemmRequest, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's result and that of the decoded operands, both in float64."""
    weight = datasets.weight("t", "w", request.w, request.n, request.k, "normal", group_index=request.group_index)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    bias = torch.randn(request.n, generator=g) if request.bias else None
    f = request.x[0]
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(f.element, torch.bfloat16)
    rows = torch.randn(m, request.k, generator=g).to(dtype)
    operand = None if request.operand is None else Operand(request.operand)
    prepared = ops.prepare(
        weight.to(ops.device), request, bias=bias, inputs=() if f.plain else (Operand(f),), operand=operand
    )
    back = ops.restore(prepared)
    assert isinstance(back, QTensor) and back.equal(weight.to(ops.device))
    q = rows if f.plain else ops.quantize(rows.to(DEVICE), f).to("cpu").dequantize()
    value = (
        weight.dequantize() if operand is None else ops.quantize(weight.dequantize().to(DEVICE), operand).dequantize()
    )
    expected = q.double() @ value.to("cpu").double().T + (0.0 if bias is None else bias.double())
    return ops.gemm(rows.to(DEVICE), prepared).double().cpu(), expected


def cases(operation: str, ops: TritonOps, each: int) -> list[Case]:
    """The smallest level-0 cases that a kernel takes, `each` of every subject: interpreters are slow."""
    found: dict[str, list[Case]] = {}
    for case in catalogue(0):
        if case.operation != operation:
            continue
        request: Request = OPERATIONS[operation].request(case)
        if ops._path(request) is not None:
            found.setdefault(case.subject, []).append(case)
    return [case for subject in found.values() for case in sorted(subject, key=_work)[:each]]


def _work(case: Case) -> int:
    return math.prod(size for _, size in case.shape)


def same(got: QTensor, want: QTensor) -> None:
    """Equal planes; any NaN is NaN."""
    ours, theirs = got.planes(), want.planes()
    assert ours.keys() == theirs.keys() and got.format == want.format
    for name, plane in theirs.items():
        mine = ours[name].cpu()
        assert (mine.shape, mine.dtype) == (plane.shape, plane.dtype), name
        wrong = _words(mine) != _words(plane)
        if plane.dtype.is_floating_point:
            wrong &= ~(torch.isnan(mine.float()) & torch.isnan(plane.float()))
        assert not wrong.any(), (name, mine[wrong][:4], plane[wrong][:4])


def _words(plane: torch.Tensor) -> torch.Tensor:
    return plane.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[plane.element_size()])


def matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has `mm` with a wider result on devices only."""
    if DEVICE == "cpu":
        inner = torch.mm

        def mm(a: Any, b: Any, out_dtype: torch.dtype | None = None) -> torch.Tensor:
            return inner(a, b) if out_dtype is None else inner(a.to(out_dtype), b.to(out_dtype))

        monkeypatch.setattr(torch, "mm", mm)
