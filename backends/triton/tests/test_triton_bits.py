"""The exact device functions, against the definitions of the contract."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from qhal.elements import MINI, decode, element, values
from qhal.rounding import to_codes
from qhal_triton.bits import e8m0_value, integer_code, minifloat_code, minifloat_value, narrow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT8 = {"e4m3fn": (4, 3, 7, 0x7E, 0x7F), "e5m2": (5, 2, 15, 0x7B, 0x7F)}


@triton.jit
def _encode(x, y, n, E: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr, NAN: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    code = minifloat_code(tl.load(x + at, mask=at < n), E, M, BIAS, TOP, NAN)
    tl.store(y + at, code.to(tl.uint8), mask=at < n)


@triton.jit
def _decode(x, y, n, E: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(y + at, minifloat_value(tl.load(x + at, mask=at < n), E, M, BIAS), mask=at < n)


@triton.jit
def _power(x, y, n):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(y + at, e8m0_value(tl.load(x + at, mask=at < n)), mask=at < n)


@triton.jit
def _integer(x, y, n, LOW: tl.constexpr, HIGH: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(y + at, integer_code(tl.load(x + at, mask=at < n), LOW, HIGH).to(tl.int8), mask=at < n)


@triton.jit
def _narrow(x, y, n, dtype: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(y + at, narrow(tl.load(x + at, mask=at < n), dtype), mask=at < n)


def numbers() -> torch.Tensor:
    """fp32 of every exponent, both signs, halfway cases of every small format, and the special ones."""
    bits = torch.arange(0, 1 << 16, dtype=torch.int32) << 16
    top = torch.cat([bits, bits | 0x8000, bits | 0x7FFF, bits | 0x8001]).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 2.0**-149, -(2.0**-149)])
    return torch.cat([top, special]).to(DEVICE)


def grid(x: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), 1024),)


@pytest.mark.parametrize("name", [*MINI, *FLOAT8])
def test_small_floats_are_coded_as_the_contract_says(name: str) -> None:
    x = numbers()
    if name in MINI:  # finite only: NaN has no code of its own
        x = x[torch.isfinite(x)]
        e, m, bias = MINI[name]
        top, nan = (1 << (e + m)) - 1, 0
    else:
        e, m, bias, top, nan = FLOAT8[name]
    got = torch.empty(x.shape, dtype=torch.uint8, device=DEVICE)
    _encode[grid(x)](x, got, x.numel(), e, m, bias, top, nan)
    expected = to_codes(x.cpu(), element(name), "even").view(torch.uint8)
    number = ~torch.isnan(x.cpu())
    assert torch.equal(got.cpu()[number], expected[number])
    assert bool(torch.isnan(decode(name, got.cpu().view(element(name).storage))[~number]).all())


@pytest.mark.parametrize("name", MINI)
def test_small_floats_have_their_values(name: str) -> None:
    e, m, bias = MINI[name]
    table = values(name)
    assert table is not None
    codes = torch.arange(len(table), dtype=torch.uint8, device=DEVICE)
    got = torch.empty(len(table), device=DEVICE)
    _decode[grid(got)](codes, got, len(table), e, m, bias)
    assert torch.equal(got.cpu(), table)


def test_powers_of_two() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    got = torch.empty(256, device=DEVICE)
    _power[grid(got)](codes, got, 256)
    assert torch.equal(got.cpu()[:255], decode("e8m0", codes.cpu())[:255]) and bool(torch.isnan(got[255]))


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_integers_are_coded_as_the_contract_says(name: str) -> None:
    x, e = numbers(), element(name)
    got = torch.empty(x.shape, dtype=torch.int8, device=DEVICE)
    _integer[grid(x)](x, got, x.numel(), e.smallest, e.largest)
    assert torch.equal(got.cpu(), to_codes(x.cpu(), e, "even"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_to_16_bits(dtype: torch.dtype) -> None:
    x = numbers()
    got = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    _narrow[grid(x)](x, got, x.numel(), tl.bfloat16 if dtype == torch.bfloat16 else tl.float16)
    number = ~torch.isnan(x)
    assert torch.equal(got[number], x.to(dtype)[number])
    assert bool(torch.isnan(got[~number]).all())
