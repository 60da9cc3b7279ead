"""Layouts are bijections, and have the bytes that the device's documents and the wheel's own packer say (L0)."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qhal_npu import layouts


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([torch.int8, torch.bfloat16, torch.float32]))
def test_nz_and_back(k: int, n: int, dtype: torch.dtype) -> None:
    w = torch.randint(-128, 128, (2, k, n)).to(dtype)
    stored = layouts.nz(w)
    c = 32 // dtype.itemsize
    assert stored.shape == (2, -(-n // c), -(-k // 16), 16, c)
    assert torch.equal(layouts.from_nz(stored, k, n), w)


def test_nz_puts_an_element_where_the_document_says() -> None:
    w = torch.arange(64 * 96).reshape(64, 96).to(torch.int32).to(torch.int16).view(torch.int16)
    stored = layouts.nz(w.to(torch.bfloat16))
    assert stored.shape == (6, 4, 16, 16)  # [N/16, K/16, 16, 16]
    assert torch.equal(layouts.nz(torch.ones(32, 64, dtype=torch.int8)).flatten(), torch.ones(2048, dtype=torch.int8))
    one = torch.zeros(64, 96, dtype=torch.int8)
    one[37, 70] = 1
    assert layouts.nz(one).nonzero().tolist() == [[70 // 32, 37 // 16, 37 % 16, 70 % 32]]


@given(st.integers(1, 9), st.integers(1, 5))
def test_int4_and_back(rows: int, words: int) -> None:
    codes = torch.randint(-8, 8, (rows, 8 * words)).to(torch.int8)
    assert torch.equal(layouts.unpack_int4(layouts.pack_int4(codes)), codes)


def test_int4_words_are_those_of_the_wheels_packer() -> None:
    packed = layouts.pack_int4(torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8]]))
    assert packed.dtype == torch.int32
    assert int(packed) & 0xFFFFFFFF == 0x87654321


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8))
def test_scale_words_keep_every_bit(numbers: list[float]) -> None:
    scale = torch.tensor(numbers, dtype=torch.float32)
    assert torch.equal(layouts.from_scale_words(layouts.scale_words(scale)).view(torch.int32), scale.view(torch.int32))


def test_converted_words_are_read_too_and_lose_what_they_lose() -> None:
    scale = torch.tensor([0.5, 0.1, -3e-5])
    assert layouts.scale_words(scale)[0] == 0x3F000000  # what ModelSlim writes for 0.5
    read = layouts.from_scale_words(layouts.converted_words(scale))
    assert read[0] == 0.5
    assert bool(((read - scale).abs() <= scale.abs() * 2**-10).all())
    assert not torch.equal(read, scale)


@given(st.integers(1, 5), st.integers(1, 9))
def test_mx_pairs_and_back(rows: int, blocks: int) -> None:
    scale = torch.randint(0, 256, (rows, blocks), dtype=torch.uint8)
    pairs = layouts.mx_pairs(scale)
    assert pairs.shape == (rows, -(-blocks // 2), 2)
    assert torch.equal(layouts.from_mx_pairs(pairs, blocks), scale)


@given(st.integers(1, 5), st.integers(1, 9))
def test_nibbles_and_back(rows: int, half: int) -> None:
    codes = torch.randint(0, 16, (rows, 2 * half), dtype=torch.uint8)
    assert torch.equal(layouts.unpack_nibbles(layouts.pack_nibbles(codes)), codes)
