"""Weights of four bits that meet fp8: their codes as bytes of e4m3, exact, in registers or written for a library."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_ops import DEVICE, HOPPER, Emulated, product_and_reference

from qhal.elements import values
from qhal.formats import Format
from qhal.requests import GemmRequest, NumericsClass
from qhal.tensors import QTensor
from qhal_portable.storage import keep
from qhal_triton.gemm.codes import writer
from qhal_triton.gemm.paths import plan

OPS = Emulated()
FP8 = "e4m3fn.row*fp32"


def request_of(w: str, x: str, **more: object) -> GemmRequest:
    made = GemmRequest(w=Format.parse(w), n=48, k=256, x=(Format.parse(x),), m=(1, 32))
    return replace(made, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("w", "x", "k", "unit"),
    [
        ("int4.g128*bf16", FP8, 512, 128),
        ("int4.g128*bf16", FP8, 384, 128),
        ("int4.g256*bf16", FP8, 512, 128),
        ("int4.row*fp32", "e4m3fn.g128*fp32", 512, 128),
        ("int4.row*fp32", "e4m3fn.tensor*fp32", 512, 128),
        ("e2m1.g32*e8m0", FP8, 128, 32),
        ("e2m1.g16*(e4m3fn.tensor*fp32)", FP8, 256, None),
    ],
)
def test_codes_of_four_bits_are_exact_as_fp8(w: str, x: str, k: int, unit: int | None) -> None:
    """Nothing but fp32 sums is left. unit None: scales of too few columns."""
    request = request_of(w, x, k=k, out=torch.float32, bias=True)
    made = plan(request, HOPPER)
    assert made is not None and [s.type for s in made.specs] == ["bf16" if unit is None else "fp8"]
    assert unit is None or made.specs[0].unit == unit
    assert ("4-bit codes as e4m3" in OPS.supports(request).executes) == (unit is not None)
    y, expected = product_and_reference(OPS, request, 5)
    bits = 20 if DEVICE == "cpu" else 12  # the interpreter's sums are fp32; the instruction's keep 14 bits
    assert (y - expected).norm() <= 2.0**-bits * expected.norm()


def test_extreme_scales_of_codes_as_fp8_are_their_products() -> None:
    """The power of two of the bytes comes last: scales above 2^119 are not Inf, those near 2^-126 lose bits at most."""
    f, x = Format.parse("int4.g128*fp32"), Format.parse(FP8)
    w = QTensor(f, torch.ones(48, 256, dtype=torch.int8), torch.full((48, 2), 2.0**119))
    request = request_of(str(f), FP8, out=torch.float32)
    q = QTensor(x, torch.full((1, 256), 2.0**-6).to(torch.float8_e4m3fn).to(DEVICE), torch.ones(1, 1).to(DEVICE))
    y = OPS.gemm(q, OPS.prepare(w.to(DEVICE), request))
    assert torch.equal(y.cpu(), torch.full((1, 48), 2.0**121))
    small = replace(w, scale=torch.full((48, 2), 2.0**-120))
    y = OPS.gemm(q, OPS.prepare(small.to(DEVICE), request))
    assert torch.equal(y.cpu(), torch.full((1, 48), 2.0**-118))


def test_a_weight_that_meets_16_bits_too_is_kept_in_words() -> None:
    request = replace(request_of("int4.g128*bf16", FP8), x=(Format.parse("bf16"), Format.parse(FP8)), n=33)
    made = plan(request, HOPPER)
    assert made is not None and made.layout == "word32" and [s.type for s in made.specs] == ["bf16", "bf16"]
    strict = plan(request_of("int4.g128*bf16", FP8, numerics=NumericsClass.FP32_ACC), HOPPER)
    assert strict is not None and strict.layout == "word32" and [s.type for s in strict.specs] == ["bf16"]


@pytest.mark.parametrize("layout", ["canonical", "nibble", "nibble64", "nibble128", "word32"])
@pytest.mark.parametrize("w", ["int4.g128*bf16", "e2m1.g32*e8m0"])
def test_codes_are_written_as_fp8(w: str, layout: str) -> None:
    """Every code in every place, to the bit, and what is written there later."""
    f = Format.parse(w)
    codes = (torch.arange(40 * 512).reshape(40, 512) * 7 // 3) % 16
    given = (codes - 8).to(torch.int8) if f.element == "int4" else codes.to(torch.uint8)
    table = values("e2m1")
    number = given.float() if f.element == "int4" else table[codes].float()  # type: ignore[index]
    scale = (
        torch.ones(40, 4, dtype=torch.bfloat16) if f.element == "int4" else torch.full((40, 16), 1, dtype=torch.uint8)
    )
    kept = keep(QTensor(f, given, scale), torch.device(DEVICE), layout)
    assert isinstance(kept, QTensor) and kept.layout == layout
    make = writer(kept)
    wanted = number.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(make().cpu().view(torch.uint8), wanted)
    kept.codes.zero_()
    assert not make().view(torch.uint8).any()


def test_only_codes_that_e4m3_holds_are_written_as_fp8() -> None:
    f = Format.parse("int8.row*fp32")
    with pytest.raises(TypeError, match="are not written as e4m3fn"):
        writer(QTensor(f, torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 1)))
