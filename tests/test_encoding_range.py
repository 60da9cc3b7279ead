"""Every code is used: the error of a quantized tensor is half a step, for every level, sign, zero point and divider."""

from __future__ import annotations

import pytest
import torch

import qhal
from qhal import Format, FormatError, QTensor, QuantizeRequest
from qhal.elements import decode, element
from qhal.encoding import encode
from qhal.grammar import ALIASES

OTHERS = [
    "e4m3fn.tensor/fp32", "int8.row/fp32", "int4.g16/bf16", "int8.row/e8m0", "e2m1.g32/e8m0", "e4m3fn.row/fp16",
    "int8.row/fp32@scale=rcp", "int8.row/fp32@arith=bf16", "int8-int8.row/fp32@domain=minmax",
    "uint8-uint8.g32/fp32@domain=minmax", "uint4.g32/fp16+fp16@domain=minmax", "int8.row/fp32@domain=signed",
    "int4-int4.row*(bf16.tensor*bf16)", "int8.g16*(fp16.row*fp32)", "int8.g16*(fp32.tensor*e8m0)",
    "int4.g16*(bf16.tensor/fp32)", "e2m1.g16*(e4m3fn.tensor*e8m0)", "e2m1.g16*(e4m3fn.tensor/e8m0)",
    "int8.g16*(uint6.g8*e8m0)", "int8.g16*(uint8.row*fp32)", "uint8-uint8.row*fp32", "uint8-fp32.row*fp32",
    "uint4-fp16.g32*fp16", "uint4-uint4.g32*e8m0", "uint8-uint8.row*fp32@qmax=127.5", "int8-int8.row*fp32",
    "int4-int4.g32*bf16@domain=minmax", "uint4-uint4.g32*fp16@domain=minmax", "bf16.row*bf16@qmax=1",
    "e5m2.row*fp32", "e4m3fnuz.row*fp32", "e3m2.g32*e8m0@e8m0=ceil", "int8.col*fp32", "int8.4x16*fp32", "nf4.row*fp32",
]  # fmt: skip
UNCOMPUTED = {"q4_1", "q5_1", "q2_k", "q4_k", "q5_k"}  # offsets; with domain=minmax they are computed


def step(f: Format, magnitude: torch.Tensor) -> torch.Tensor:
    """The distance of neighbouring codes around a code value: 1 for integers, by the exponent for floats."""
    e = element(f.element)
    if e.integer:
        return torch.ones_like(magnitude)
    if e.kind == "lut":
        return torch.full_like(magnitude, 0.31)
    if e.wide:
        return magnitude * torch.finfo(e.storage).eps + 1e-30
    codes = decode(f.element, torch.arange(1 << (e.bits - 1), dtype=torch.uint8).view(e.storage))
    grid = codes[torch.isfinite(codes)].double()
    at = torch.bucketize(magnitude.double(), grid).clamp(1, grid.numel() - 1)
    return torch.maximum(grid[at] - grid[at - 1], grid[(at + 1).clamp(max=grid.numel() - 1)] - grid[at])


def slack(f: Format) -> float:
    """What rounding the scale and the quotient takes, of the value: nothing of fp32, up to a quarter of e8m0."""
    assert f.scale is not None
    worst, level = (2.0**-8 if f.rule.arith == "bf16" else 0.0), f.scale
    while level is not None:
        e = element(level.element)
        kind = 2.0**-24 if e.name == "fp32" else torch.finfo(e.storage).eps if e.kind == "float" else 0.26
        worst, level = max(worst, kind), level.scale  # type: ignore[assignment]
    return worst


def effective(q: QTensor) -> torch.Tensor:
    """What one step of a code is worth, per element."""
    assert q.scale is not None
    assert q.format.scale is not None
    assert q.format.block is not None
    plane = q.scale.dequantize() if isinstance(q.scale, QTensor) else decode(q.format.scale.element, q.scale)
    per = q.format.block.expand(plane, q.shape).double().abs()
    return per if q.format.op == "*" else 1 / per


@pytest.mark.parametrize("size", [1.0, 3e-3, 700.0])
@pytest.mark.parametrize("name", [n for n in ALIASES if n not in UNCOMPUTED] + OTHERS)
def test_the_error_is_half_a_step_of_the_element(name: str, size: float) -> None:
    f = Format.parse(name)
    assert qhal.select("cpu_reference").supports(QuantizeRequest(x=torch.float32, format=f))
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(7)) * size
    x = x.bfloat16().float()
    if element(f.element).kind == "uint" and f.zero is None and f.offset is None:
        x = x.abs()
    q = encode(x, f)
    value, unit = q.dequantize().double(), effective(q)
    assert torch.isfinite(value).all()
    peak = x.abs().amax().double() * 2
    half = 0.5 * step(f, value.abs() / unit) * unit
    error = (value - x.double()).abs()
    bound = half * 1.001 + slack(f) * (x.abs().double() + (peak if f.offset is not None or f.zero is not None else 0))
    assert (error <= bound).all(), (error / bound).max()
    # and the scale is no larger than the range needs: the largest code is near the top of the element
    e = element(f.element)
    top = 1.0 if e.wide else max(e.largest, -e.smallest) / (2 if f.zero is not None and e.kind == "uint" else 1)
    assert (q.codes.double() if e.integer else value / unit).abs().max() >= 0.4 * top


def test_a_dividing_scale_is_the_reciprocal() -> None:
    x = torch.tensor([[1.0, -4.0], [0.0, 0.0], [float("nan"), 1.0]])
    q = encode(x, Format.parse("int8.row/fp32"))
    assert isinstance(q.scale, torch.Tensor)
    assert q.scale[:2].tolist() == [[127 / 4], [1.0]]
    assert torch.isnan(q.dequantize()[2]).all()
    assert q.codes[:2].tolist() == [[32, -127], [0, 0]]
    power = encode(torch.tensor([[4.0, 1.0]]), Format.parse("e2m1.row/e8m0"))
    assert power.planes()["scale"].item() == 127  # 4 = 2^2 is the largest exponent of e2m1 already
    assert power.dequantize().tolist() == [[4.0, 1.0]]
    tiny = encode(torch.tensor([[1e-30, 0.0]]), Format.parse("int8.row/fp16"))
    assert torch.isfinite(tiny.dequantize()).all()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bf16.row*bf16", "bf16 has no largest code to scale to"),
        ("fp32.row*fp32", "fp32 has no largest code to scale to"),
        ("bf16.row*bf16@domain=signed", "no largest code"),
        ("bf16.row*(e4m3fn.tensor*fp32)", "no largest code"),
        ("int8.row/fp32@empty=zero", "a dividing scale of an all-zero block is 1"),
        ("int8.row/int8", "int8 holds no reciprocals"),
        ("int8.g8/(e4m3fn.tensor*fp32)", "a dividing scale must be a plain number"),
        ("uint4.row*fp32@domain=signed", "uint4 has no negative code"),
        ("int8.row*fp32@domain=minmax", "domain=minmax needs a zero point or an offset"),
        ("uint8-int8.row*fp32@domain=minmax", "int8 does not hold every zero point of uint8"),
        ("uint1-uint1.row*fp32", "uint1 has no positive code; use domain=minmax"),
    ],
)
def test_senseless_scales_are_refused(name: str, text: str) -> None:
    with pytest.raises(FormatError) as caught:
        encode(torch.randn(4, 16), Format.parse(name))
    assert text in str(caught.value)


def test_static_scales_are_numbers_of_the_planes_type() -> None:
    x = torch.tensor([[1.0, -4.0, 3.0, 0.0]])
    assert encode(x, Format.parse("bf16.row*bf16"), scale=torch.tensor([2.0])).dequantize().equal(x)
    for name in ("e4m3fn.tensor*e8m0", "e4m3fn.tensor/e8m0", "e4m3fn.tensor*e4m3fn"):
        q = encode(x, Format.parse(name), scale=torch.tensor([0.5]))
        assert q.dequantize().equal(x)
    assert encode(x, Format.parse("e4m3fn.tensor*e8m0"), scale=torch.tensor([0.5])).planes()["scale"].item() == 126
    with pytest.raises(FormatError, match="e8m0 holds powers of two"):
        encode(x, Format.parse("e4m3fn.tensor*e8m0"), scale=torch.tensor([0.3]))
    zero = encode(x, Format.parse("uint8-uint8.row*fp32"), scale=torch.tensor([1.0]), zero=torch.tensor([2.6]))
    assert zero.planes()["zero"].item() == 3  # rounded, not cut off


def test_the_default_divisor_of_codes_around_their_middle() -> None:
    f = Format.parse("uint8-uint8.row*fp32")
    assert f.qmax == 127
    assert Format.parse("uint8-uint8.row*fp32@qmax=127") == f
    assert Format.parse("uint8-uint8.row*fp32@qmax=255").qmax == 255
    assert Format.parse("uint8.row*fp32").qmax == 255
