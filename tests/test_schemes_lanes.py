"""Lanes are permutations and shifts: every bit arrives, in parts of any size and from any place in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal.errors import CheckpointError
from qhal_schemes import checks, lanes, packing
from qhal_schemes.quip import unpack_e8p


@pytest.fixture(params=["1", "0"], ids=["compiled", "torch"], autouse=True, scope="module")
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of this file runs with the compiled loops and without."""
    with mock.patch.dict(os.environ, QHAL_COMPILED_LOOPS=request.param):
        yield


class Index:
    """Only makes the error."""

    def bad(self, name: str, expected: str, found: str) -> CheckpointError:
        return CheckpointError(f"{name}: expected {expected}, found {found}")


def words(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int32)


SIZES = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(0, 3), st.integers(0, 1000))
def test_transposed_words_and_bytes(m: int, n: int, start: int, seed: int) -> None:
    w = words(seed, m, n)
    assert torch.equal(lanes.transpose(w), w.t())
    raw = words(seed, m * n + 1).view(torch.uint8)[start : start + m * n].view(m, n)  # a file aligns bytes to nothing
    assert torch.equal(lanes.transpose_bytes(raw), raw.t())
    assert torch.equal(lanes.transpose_bytes(raw.view(torch.int8)), raw.view(torch.int8).t())
    assert torch.equal(lanes.turn(torch.stack([raw, raw])), torch.stack([raw, raw]).transpose(1, 2))
    assert torch.equal(lanes.interleave([w, w + 1]), torch.stack([w, w + 1], -1))


@pytest.mark.parametrize("bits", [0x7F800001, -0x7FFFFF, 0x7FC00001, 1, -(2**31)])
def test_words_that_look_like_nan_or_subnormal_keep_their_bits(bits: int) -> None:
    for shape in ((1, 5), (3, 7), (37, 19), (64, 64)):
        w = torch.full(shape, bits, dtype=torch.int32)
        assert torch.equal(lanes.transpose(w), w.t())


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 6), st.booleans(), st.booleans(), st.integers(1, 400), st.integers(0, 1000))
def test_columns_and_orders(k: int, runs: int, paired: bool, negative: bool, part: int, seed: int) -> None:
    codes = torch.randint(-8 if negative else 0, 8, (runs * 8, k), generator=torch.Generator().manual_seed(seed))
    codes = codes.to(torch.int8 if negative else torch.uint8)
    packed = (packing.pack_order if paired else lambda c: packing.pack(c.to(torch.uint8) & 15, 4))(
        codes.t().contiguous()
    )
    with mock.patch.object(lanes, "STEP", part):
        assert torch.equal(lanes.unpack_columns(packed, paired=paired, negative=negative), codes)
        if paired:
            assert torch.equal(lanes.unpack_order(packed, negative=negative), codes.t())


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, st.integers(1, 400), st.booleans(), st.integers(0, 1000))
def test_sums_of_rows_are_exact(n: int, k: int, part: int, magnitudes: bool, seed: int) -> None:
    codes = words(seed, n, k).view(torch.int8)
    with mock.patch.object(lanes, "STEP", part):
        got = lanes.row_sums(codes, magnitudes=magnitudes)
    assert torch.equal(got, (codes.long().abs() if magnitudes else codes.long()).sum(-1).double())


def test_e8p_words_follow_the_definition() -> None:
    n, k = 32, 128
    stored = words(0, n, k // 32 * 2).view(torch.int64)
    tiles = stored.reshape(n // 16, k // 64, 8, 4).transpose(1, 2).reshape(n // 2, k // 16)
    codes = unpack_e8p([stored], n, k)[..., 0]
    for row, column in ((0, 0), (3, 5), (15, 7)):
        word = int(tiles[row, column]) & (1 << 64) - 1
        for i in range(4):
            lower = sum((word >> (32 + 4 * j + i) & 1) << j for j in range(8))
            assert int(codes[2 * row + i % 2, 2 * column + i // 2]) == (word >> 8 * i & 255) << 8 | lower


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [1.0, -1.0, 0.0, -0.0, float("nan"), float("inf"), -float("inf"), 2.0**-6])
@pytest.mark.parametrize("how", [{}, {"zero_ok": True}, {"positive": True}])
def test_scales_are_judged_by_their_numbers(dtype: torch.dtype, value: float, how: dict[str, bool]) -> None:
    scale = torch.tensor([1.0, value, 0.5]).to(dtype)
    numbers = scale.float()
    good = bool(torch.isfinite(numbers).all()) and (
        "zero_ok" in how or bool((numbers > 0).all() if "positive" in how else (numbers != 0).all())
    )
    if good:
        checks.scales(Index(), "s", scale, **how)  # type: ignore[arg-type]
    else:
        with pytest.raises(CheckpointError, match="s: expected"):
            checks.scales(Index(), "s", scale, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("high_first", [False, True])
def test_every_byte_gives_its_two_nibbles(high_first: bool) -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    halves = [packed >> 4, packed & 15] if high_first else [packed & 15, packed >> 4]
    assert torch.equal(lanes.spread_bytes(packed, 4, high_first=high_first), torch.stack(halves, 1).flatten())
