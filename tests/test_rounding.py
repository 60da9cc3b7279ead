"""Decoding and rounding of numbers, exhaustively: every code, and every bf16 and fp16 input, against ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from qhal import FormatError
from qhal.elements import ELEMENTS, decode, element, values
from qhal.rounding import to_codes

SMALL_FLOATS: dict[str, Any] = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
# significand bits with the hidden one, and the exponent of the smallest normal number
SHAPES = {
    "fp32": (24, -126), "bf16": (8, -126), "fp16": (11, -14), "e4m3fn": (4, -6), "e4m3fnuz": (4, -7), "e5m2": (3, -14),
    "e5m2fnuz": (3, -15), "e3m2": (3, -2), "e2m3": (4, 0), "e2m1": (2, 0),
}  # fmt: skip
INTEGERS = [name for name, e in ELEMENTS.items() if e.integer]


def every_16_bit_float(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()


def code_bytes(codes: torch.Tensor) -> np.ndarray:
    return codes.contiguous().view(torch.uint8).numpy()


# ---------------------------------------------------------------- decoding: every code of every element


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_decode_every_code(name: str) -> None:
    codes = torch.arange(1 << element(name).bits, dtype=torch.uint8)
    ours = decode(name, codes.view(element(name).storage)).numpy()
    theirs = codes.numpy().view(SMALL_FLOATS[name]).astype(np.float32)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours[~np.isnan(ours)]), np.signbit(theirs[~np.isnan(ours)]))
    finite = theirs[np.isfinite(theirs)]
    assert (finite.max(), finite.min()) == (element(name).largest, element(name).smallest)


def test_decode_every_exponent() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(decode("e8m0", codes).numpy(), theirs)
    np.testing.assert_array_equal(decode("e8m0", codes.view(torch.float8_e8m0fnu)).numpy(), theirs)
    assert decode("e8m0", codes)[0].item() == 2.0**-127  # a float32 subnormal, not flushed
    assert torch.isnan(decode("e8m0", codes)[255])


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_stand_for_themselves(name: str) -> None:
    e = element(name)
    codes = torch.arange(int(e.smallest), int(e.largest) + 1).to(e.storage)
    assert codes.numel() == 1 << e.bits
    assert torch.equal(decode(name, codes), torch.arange(e.smallest, e.largest + 1))


def test_lookup_tables() -> None:
    table = torch.tensor([3.0, -1.0] * 8)
    assert torch.equal(decode("lut4", torch.arange(16, dtype=torch.uint8), table), table)
    with pytest.raises(FormatError, match="lut8 needs a table of 256 values"):
        decode("lut8", torch.zeros(1, dtype=torch.uint8))
    nf4 = values("nf4")
    assert nf4 is not None
    assert nf4.numel() == 16
    assert nf4[7] == 0
    assert bool((nf4.diff() > 0).all())


# ---------------------------------------------------------------- rounding: every bf16 and fp16 input


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_every_input_rounds_to_even(name: str, dtype: torch.dtype) -> None:
    x, e = every_16_bit_float(dtype), element(name)
    codes = to_codes(x, e)
    number = ~np.isnan(x.numpy())
    saturated = np.where(number, np.clip(x.numpy(), e.smallest, e.largest), 0)
    theirs = saturated.astype(SMALL_FLOATS[name])
    np.testing.assert_array_equal(code_bytes(codes)[number], theirs.view(np.uint8)[number])
    of_nan = decode(name, codes)[~torch.from_numpy(number)]
    assert bool(torch.isnan(of_nan).all()) if e.kind == "float" else bool((of_nan == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_every_input_rounds_half_away(name: str, dtype: torch.dtype) -> None:
    x, e = every_16_bit_float(dtype), element(name)
    x = x[~torch.isnan(x)]
    magnitude = np.minimum(np.abs(x.numpy().astype(np.float64)), e.largest)
    digits, lowest = SHAPES[name]
    exponent = np.maximum(np.frexp(np.where(magnitude == 0, 1, magnitude))[1] - 1, lowest)
    step = np.ldexp(1.0, exponent - (digits - 1))
    expected = np.minimum(np.floor(magnitude / step + 0.5) * step, e.largest)  # the sum is exact in float64
    got = decode(name, to_codes(x, e, "away")).numpy()
    np.testing.assert_array_equal(np.abs(got), expected)
    nonzero = expected > 0
    np.testing.assert_array_equal(np.signbit(got)[nonzero], np.signbit(x.numpy())[nonzero])


@pytest.mark.parametrize("mode", ["even", "away"])
@pytest.mark.parametrize("name", INTEGERS)
def test_every_input_rounds_to_an_integer(name: str, mode: str) -> None:
    e = element(name)
    for dtype in (torch.bfloat16, torch.float16):
        x = every_16_bit_float(dtype)
        wide = x.double().numpy()
        with np.errstate(invalid="ignore"):
            rounded = np.rint(wide) if mode == "even" else np.trunc(wide + np.copysign(0.5, wide))
        expected = np.nan_to_num(np.clip(rounded, e.smallest, e.largest), nan=0.0)
        np.testing.assert_array_equal(decode(name, to_codes(x, e, mode)).numpy(), expected)


def test_just_under_a_tie_stays_under_it() -> None:
    under = torch.nextafter(torch.tensor([0.5, 1.5, 2.5, 8388607.5]), torch.tensor(0.0))
    assert to_codes(under[:3], element("int8"), "away").tolist() == [0, 1, 2]
    assert to_codes(-under[:3], element("int8"), "away").tolist() == [0, -1, -2]
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert to_codes(ties, element("int8"), "even").tolist() == [0, 2, 2, 0, -2]
    assert to_codes(ties, element("int8"), "away").tolist() == [1, 2, 3, -1, -2]


def test_nf4_takes_the_nearest_value() -> None:
    x = torch.linspace(-1.3, 1.3, 4001)
    table = values("nf4")
    assert table is not None
    distance = (x[:, None].double() - table.double()).abs()
    chosen = to_codes(x, element("nf4")).long()
    assert torch.equal(distance.gather(1, chosen[:, None])[:, 0], distance.amin(1))


def test_exponents_are_no_element_to_round_values_to() -> None:
    with pytest.raises(FormatError, match="e8m0 holds exponents"):
        to_codes(torch.ones(1), element("e8m0"))
    with pytest.raises(FormatError, match="lut4 needs a table"):
        to_codes(torch.ones(1), element("lut4"))
