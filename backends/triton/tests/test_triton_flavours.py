"""OCP's fp8 on a chip that multiplies the other flavour: every code, in both operands, has its number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qhal
from qhal.elements import element
from qhal.flavours import FNUZ
from qhal.requests import GemmRequest, NumericsClass
from qhal_triton.gemm.paths import plan
from qhal_triton.ops import TritonOps
from qhal_triton.target import Target

CDNA3 = Target(kind="hip", arch="gfx942", warp=64, shared=64 << 10, fp8=frozenset(FNUZ.values()))


class Ops(TritonOps):
    name, interface = "flavours", (1, 0)


def request_of(w: str, x: str) -> GemmRequest:
    return GemmRequest(w=qhal.Format.parse(w), x=(qhal.Format.parse(x),), n=256, k=256, out=torch.float32)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
def test_every_code_of_both_operands(name: str) -> None:
    f = qhal.Format.parse(f"{name}.row*fp32")
    codes = torch.arange(256, dtype=torch.uint8).view(element(name).storage)
    finite = torch.isfinite(codes.float())
    unit = torch.eye(256).to(codes.dtype)
    request = request_of(str(f), str(f))
    ops = Ops(CDNA3, torch.device("cpu"))
    answer = ops.supports(request)
    assert "bytes read as fnuz" in answer.executes and answer.numerics == NumericsClass.REDUCED_ACC

    def tensor(values: torch.Tensor) -> qhal.QTensor:
        return qhal.QTensor(f, values.contiguous(), torch.ones(values.shape[0], 1))

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ops.gemm(tensor(x), ops.prepare(tensor(w), request))

    # a row of all codes times the unit matrix, and one unit row times a column of all codes: the codes' numbers
    numbers = torch.where(finite, codes.view(torch.uint8), 0).view(codes.dtype)
    column = codes.view(torch.uint8)[:, None].expand(256, 256).contiguous().view(codes.dtype)
    assert torch.equal(product(numbers[None], unit)[0], numbers.float())
    assert bool(torch.isnan(product(codes[None], unit)).all())
    y = product(unit[:1], column)[0]
    assert torch.equal(y[finite], codes.float()[finite]) and bool(torch.isnan(y[~finite]).all())


def test_flavours_that_are_mixed_are_decoded() -> None:
    made = plan(request_of("e4m3fn.row*fp32", "e4m3fnuz.row*fp32"), CDNA3)
    assert made is not None and made.specs[0].type == "bf16" and not made.specs[0].foreign
    ocp = plan(request_of("e4m3fn.row*fp32", "e4m3fn.row*fp32"), replace(CDNA3, fp8=frozenset(FNUZ)))
    assert ocp is not None and ocp.specs[0].native and not ocp.specs[0].foreign
    none = plan(request_of("e4m3fn.row*fp32", "e4m3fn.row*fp32"), replace(CDNA3, fp8=frozenset()))
    assert none is not None and not none.specs[0].native
