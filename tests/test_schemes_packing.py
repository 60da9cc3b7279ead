"""Packing is a bijection: every width, both layouts of compressed-tensors, AWQ's order, GPTQ's borrowing zeros."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal_schemes import lanes, packing
from qhal_schemes.gptq import _WORD


@pytest.fixture(params=["1", "0"], ids=["compiled", "torch"], autouse=True, scope="module")
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of this file runs with the compiled loops and without."""
    with mock.patch.dict(os.environ, QHAL_COMPILED_LOOPS=request.param):
        yield


BITS = st.integers(1, 8)


def random_codes(seed: int, bits: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=g, dtype=torch.int64).to(torch.uint8)


def by_the_bit(row: torch.Tensor, bits: int, aligned: bool) -> list[int]:
    """Words of one row from the definition, bit by bit."""
    per_word = 32 // bits
    words = [0] * packing.words(len(row), bits, aligned=aligned)
    for i, code in enumerate(row.tolist()):
        start = 32 * (i // per_word) + bits * (i % per_word) if aligned else i * bits
        for b in range(bits):
            words[(start + b) // 32] |= ((code >> b) & 1) << ((start + b) % 32)
    return [w - (1 << 32) if w >> 31 else w for w in words]


@settings(max_examples=60, deadline=None)
@given(BITS, st.integers(1, 100), st.integers(1, 3), st.booleans(), st.integers(0, 1000))
def test_words_round_trip_and_follow_the_definition(bits: int, n: int, rows: int, aligned: bool, seed: int) -> None:
    codes = random_codes(seed, bits, rows, n)
    packed = packing.pack(codes, bits, aligned=aligned)
    assert packed.dtype == torch.int32 and packed.shape == (rows, packing.words(n, bits, aligned=aligned))
    assert packed[0].tolist() == by_the_bit(codes[0], bits, aligned)
    assert torch.equal(packing.unpack(packed, bits, n, aligned=aligned), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 32), st.integers(1, 70), st.integers(0, 1000))
def test_wide_codes_follow_the_definition(bits: int, n: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, n), generator=torch.Generator().manual_seed(seed))
    packed = torch.tensor([by_the_bit(row, bits, False) for row in codes], dtype=torch.int32)
    back = packing.unpack_wide(packed, bits, n)
    assert back.dtype == torch.int32 and torch.equal(back.long() & ((1 << bits) - 1), codes)


@pytest.mark.parametrize(("bits", "dense", "aligned"), [(3, 24, 26), (5, 40, 43), (6, 48, 52), (7, 56, 64)])
def test_the_two_packings_have_different_widths(bits: int, dense: int, aligned: int) -> None:
    assert packing.words(256, bits) == dense
    assert packing.words(256, bits, aligned=True) == aligned


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_widths_that_divide_a_word_have_one_packing(bits: int) -> None:
    codes = random_codes(1, bits, 2, 64)
    assert torch.equal(packing.pack(codes, bits), packing.pack(codes, bits, aligned=True))


@settings(max_examples=30, deadline=None)
@given(BITS, st.integers(0, 1000))
def test_signed_is_the_offset_and_comes_back(bits: int, seed: int) -> None:
    fields = random_codes(seed, bits, 4, 9)
    codes = packing.unpack(packing.pack(fields, bits), bits, 9, negative=True)
    assert torch.equal(codes.long(), fields.long() - (1 << (bits - 1)))
    assert torch.equal(packing.unsigned(codes, bits), fields)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 1000))
def test_awq_round_trip(k: int, runs: int, seed: int) -> None:
    codes = random_codes(seed, 4, runs * 8, k)
    packed = packing.pack_awq(codes)
    assert packed.shape == (k, runs)
    assert torch.equal(packing.unpack_awq(packed), codes)


def test_awq_order_is_the_documented_one() -> None:
    packed = packing.pack_awq(torch.arange(8, dtype=torch.uint8).reshape(8, 1))
    nibbles = [(packed.item() >> (4 * i)) & 15 for i in range(8)]
    assert nibbles == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_v1_zeros_borrow_across_fields_and_come_back(bits: int) -> None:
    zeros = random_codes(bits, bits, 3, 64)
    zeros[:, ::5] = 0
    stored = packing.wrap(packing.pack(zeros, bits).long() - _WORD[bits])  # the writer's one subtraction per word
    assert torch.equal(packing.unpack(packing.wrap(stored.long() + _WORD[bits]), bits, 64), zeros)
    per_field = (packing.unpack(stored, bits, 64).long() + 1) & ((1 << bits) - 1)
    assert not torch.equal(per_field, zeros.long()), "adding one per field is the known wrong reading"


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(0, 1000))
def test_nibbles_and_bits(n: int, seed: int) -> None:
    codes = random_codes(seed, 4, 3, 2 * n)
    assert torch.equal(packing.unpack_nibbles(packing.pack_nibbles(codes)), codes)
    mask = random_codes(seed, 1, 2, 8 * n).bool()
    weights = torch.tensor([1 << i for i in range(8)])
    stored = (mask.unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8)
    assert torch.equal(packing.unpack_bits(stored, 8 * n), mask)


def test_six_bit_codes_sit_in_three_bytes() -> None:
    codes = torch.tensor([[1, 2, 3, 63, 32, 0, 5, 7]], dtype=torch.uint8)
    stream = packing.pack(codes, 6).view(torch.uint8)[:, :6].contiguous()  # the same little-endian bit stream
    assert torch.equal(packing.unpack_six(stream), codes)


def test_bytes_of_a_file_may_lie_anywhere() -> None:
    raw = torch.arange(1, 98, dtype=torch.uint8)
    for start in range(4):  # safetensors aligns bytes to nothing
        here = raw[start : start + 93].reshape(1, 93)
        assert torch.equal(packing.unpack_six(here), packing.unpack_six(here.clone()))
        assert torch.equal(packing.unpack_nibbles(here), torch.stack([here & 15, here >> 4], -1).flatten(-2))
        assert torch.equal(packing.unpack_bits(here, 700), packing.unpack_bits(here.clone(), 700))


@settings(max_examples=40, deadline=None)
@given(BITS, st.booleans(), st.integers(1, 500))
def test_a_few_rows_at_a_time_change_nothing(bits: int, aligned: bool, part: int) -> None:
    codes = random_codes(bits, bits, 2, 9, 70)
    packed = packing.pack(codes, bits, aligned=aligned)
    before = packed.clone()
    with mock.patch.object(lanes, "STEP", part):
        assert torch.equal(packing.unpack(packed, bits, 70, aligned=aligned), codes)
        negative = packing.unpack(packed, bits, 70, aligned=aligned, negative=True)
        assert negative.dtype == torch.int8 and torch.equal(packing.unsigned(negative, bits), codes)
        words = packing.pack_awq(random_codes(1, 4, 24, 11))
        assert torch.equal(packing.unpack_awq(words), random_codes(1, 4, 24, 11))
    assert torch.equal(packed, before), "the file's own bytes stay as they are"


def test_widths_outside_one_to_eight_are_refused() -> None:
    with pytest.raises(ValueError, match="9 bits"):
        packing.unpack(torch.zeros(1, 1, dtype=torch.int32), 9, 1)
