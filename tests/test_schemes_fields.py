"""Compiled loops and tensor operations read the same bits: GGUF blocks, indices of codebooks, words of E8P12."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qhal_schemes import gguf_blocks, indices, packing, quip
from qhal_schemes.compiled import loops

pytest.importorskip("numba")

KINDS = [kind for kind in gguf_blocks.TYPES.values() if kind.planes]
STREAMS = [((12,), 16), ((12,), 24), ((16, 8), 16), ((8, 4), 10), ((3, 2), 48), ((13,), 8), ((13,), 7),
           ((16, 16), 5), ((32,), 3), ((31,), 8)]  # fmt: skip
"""Bits of the fields of a code, codes of a row; seven times 13 bits end inside a byte."""


def random_bytes(seed: int, *shape: int, skip: int = 0) -> Tensor:
    """Random bytes, `skip` bytes after the start of their storage: a file aligns bytes to nothing."""
    count = torch.Size(shape).numel()
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count + skip,), generator=g, dtype=torch.uint8)[skip:].view(*shape)


def both(read: Callable[[], object]) -> Iterator[object]:
    """The result with compiled loops, and without."""
    for wanted in "10":
        with mock.patch.dict(os.environ, QHAL_COMPILED_LOOPS=wanted):
            assert (loops("fields") is not None) == (wanted == "1")
            yield read()


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    with mock.patch("qhal_schemes.loops.jit._LEAST", 1):
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 1000))
def test_blocks(kind: gguf_blocks.BlockType, rows: int, blocks: int, skip: int, seed: int) -> None:
    raw = random_bytes(seed, rows, blocks * kind.nbytes, skip=skip)
    one, other = both(lambda: gguf_blocks.unpack(kind.name, raw))
    assert one.equal(other)  # type: ignore[attr-defined]
    assert one.shape == (rows, blocks * kind.elements)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_rows_of_another_tensor(kind: gguf_blocks.BlockType) -> None:
    raw = random_bytes(0, 6, 2 * kind.nbytes)[1::2]
    one, other = both(lambda: gguf_blocks.unpack(kind.name, raw))
    assert one.equal(other)  # type: ignore[attr-defined]


def test_parts_of_threads_are_whole(four_threads: None) -> None:
    for rows in (1, 3, 9):
        one, other = both(lambda rows=rows: gguf_blocks.unpack("Q3_K", random_bytes(rows, rows, 220)))
        assert one.equal(other)  # type: ignore[attr-defined]
    words = random_bytes(0, 80, 8 * 4).view(torch.int64)
    same(lambda: quip.unpack_e8p([words], 80, 128))


def same(read: Callable[[], object]) -> Tensor:
    one, other = both(read)
    assert isinstance(one, Tensor) and isinstance(other, Tensor)
    assert one.dtype == other.dtype == torch.int32 and one.is_contiguous() and torch.equal(one, other)
    return one


@pytest.mark.parametrize(("fields", "count"), STREAMS, ids=str)
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 4), st.integers(0, 1), st.integers(0, 1000))
def test_streams_of_indices(fields: tuple[int, ...], count: int, rows: int, skip: int, seed: int) -> None:
    width = packing.words(count, sum(fields))
    stored = random_bytes(seed, rows + skip, 2, 4 * width).view(torch.int32)[skip:]
    codes = same(lambda: indices.from_stream(stored, fields, count))
    assert codes.shape == (rows, 2, count, len(fields))
    for row, found in zip(stored.flatten(0, 1), codes.flatten(0, 1), strict=True):
        stream = int.from_bytes(bytes(row.view(torch.uint8).tolist()), "little")
        for code in found.tolist():
            for field, value in zip(fields, code, strict=True):
                assert value % (1 << 32) == stream & ((1 << field) - 1)
                stream >>= field


def test_rows_that_are_too_short_are_not_read_past_their_end() -> None:
    with pytest.raises(ValueError, match="records of 24 bytes from rows of 44"):
        indices.from_stream(torch.zeros(3, 11, dtype=torch.int32), (12,), 32)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        quip.unpack_e8p([torch.zeros(16, 3, dtype=torch.int64)], 16, 128)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.int8, 6), (torch.int8, 8), (torch.int16, 11), (torch.int16, 16)])
@pytest.mark.parametrize("count", [1, 6, 32])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_indices_in_containers(dtype: torch.dtype, bits: int, count: int, rows: int) -> None:
    stored = random_bytes(rows, rows, 3, count * dtype.itemsize).view(dtype)
    codes = same(lambda: indices.from_containers(stored, bits))
    assert torch.equal(codes.long(), stored.long() % (1 << bits))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 1000))
def test_words_of_e8p(rows: int, columns: int, stages: int, side_by_side: bool, seed: int) -> None:
    n, k = 16 * rows, 64 * columns
    words = random_bytes(seed, n, stages * 8 * k // 32).view(torch.int64)
    parts = list(words.split(k // 32, 1))
    parts = parts if side_by_side else [part.contiguous() for part in parts]
    codes = same(lambda: quip.unpack_e8p(parts, n, k))
    assert codes.shape == (n, k // 8, stages)
