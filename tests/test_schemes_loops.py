"""The compiled loops give the bits of the tensor operations beside them: any width, shape, place, number of threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qhal_schemes import lanes, packing
from qhal_schemes.compiled import loops
from qhal_schemes.loops import columns, jit, turning

SIZES = st.sampled_from((0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 130, 192))
SEEDS = st.integers(0, 1000)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"], autouse=True, scope="module")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with mock.patch.object(jit, "_LEAST", 1):
        yield
    torch.set_num_threads(before)


def bytes_of(seed: int, *shape: int, start: int = 0) -> Tensor:
    """Random bytes that begin anywhere, as they do in a file."""
    count = int(np.prod(shape))
    raw = np.random.default_rng(seed).integers(0, 256, count + start, dtype=np.uint8)
    return torch.from_numpy(raw[start:]).view(*shape)


def words_of(seed: int, *shape: int, start: int = 0) -> Tensor:
    """Random words; start: bytes of the address that are left over."""
    raw = np.random.default_rng(seed).integers(0, 256, 4 * int(np.prod(shape)) + start, dtype=np.uint8)
    return torch.from_numpy(raw[start:].view(np.int32)).view(*shape)


def same(make: Callable[[], Tensor]) -> None:
    """Equal with the loops and without, in dtype, shape, bits and order in memory."""
    with mock.patch.dict(os.environ, QHAL_COMPILED_LOOPS="0"):
        assert loops("words") is None
        expected = make()
    with mock.patch.dict(os.environ, QHAL_COMPILED_LOOPS="1"):
        assert loops("words") is not None
        found = make()
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found, expected) and found.is_contiguous() == expected.is_contiguous()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((1, 2, 4)), SIZES, SIZES, st.integers(0, 7), st.booleans(), SEEDS)
def test_bytes_spread(bits: int, n: int, rows: int, start: int, signed: bool, seed: int) -> None:
    packed, top = bytes_of(seed, rows, n, start=start), 1 << (bits - 1)
    same(lambda: lanes.spread_bytes(packed, bits))
    same(lambda: lanes.spread_bytes(packed, bits, flip=top if signed else 0, minus=top))
    same(lambda: lanes.spread_bytes(packed.t(), 4, high_first=True))
    same(lambda: packing.unpack_bits(packed, max(8 * n - 3, 0)))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), SIZES, SIZES, st.integers(0, 3), st.booleans(), st.booleans(), SEEDS)
def test_words_along_a_row(bits: int, n: int, rows: int, start: int, aligned: bool, negative: bool, seed: int) -> None:
    packed = words_of(seed, rows, packing.words(n, bits, aligned=aligned), start=start)
    same(lambda: packing.unpack(packed, bits, n, aligned=aligned, negative=negative))
    turned = packed.t().contiguous().t()
    same(lambda: packing.unpack(turned, bits, n, aligned=aligned, negative=negative))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), SIZES, SIZES, st.integers(0, 3), SEEDS)
def test_words_down_a_column(bits: int, k: int, n: int, start: int, seed: int) -> None:
    packed = words_of(seed, packing.words(k, bits), n, start=start)
    same(lambda: packing.unpack_down(packed, bits, k))
    whole = words_of(seed, 3 * bits, n, start=start)
    same(lambda: packing.unpack_down(whole, bits, 96))


@settings(max_examples=60, deadline=None)
@given(SIZES.filter(bool), SIZES.filter(bool), st.integers(0, 3), st.booleans(), st.booleans(), SEEDS)
def test_nibbles_of_columns_and_orders(k: int, n: int, start: int, paired: bool, negative: bool, seed: int) -> None:
    packed = words_of(seed, k, n, start=start)
    same(lambda: lanes.unpack_columns(packed, paired=paired, negative=negative))
    same(lambda: lanes.unpack_order(packed, negative=negative))


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(0, 3), SEEDS)
def test_pairs_along_any_axis_and_six_bits(m: int, n: int, start: int, seed: int) -> None:
    packed = bytes_of(seed, 2, m, n, start=start)
    for dim in (0, 1, 2):
        same(lambda dim=dim: packing.unpack_int4(packed, dim))  # type: ignore[misc]
    same(lambda: packing.unpack_six(bytes_of(seed, m + 1, 3 * n + 3, start=start)))


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.sampled_from((torch.uint8, torch.int8, torch.float16, torch.int32, torch.int64)), SEEDS)
def test_matrices_turn(m: int, n: int, dtype: torch.dtype, seed: int) -> None:
    matrix = bytes_of(seed, m, n * dtype.itemsize).clone().view(torch.uint8)
    turned = lanes.transpose(matrix.view(dtype) if n else torch.zeros(m, 0, dtype=dtype))
    assert turned.dtype == dtype and turned.shape == (n, m) and turned.is_contiguous()
    raw = turned.view(torch.uint8).view(n, m, dtype.itemsize) if turned.numel() else turned.view(n, m, 1)
    expected = matrix.view(m, n, dtype.itemsize).transpose(0, 1) if turned.numel() else raw
    assert torch.equal(raw, expected)


def test_a_tile_touches_nothing_else() -> None:
    for height, width in ((16, 16), (17, 16), (16, 17), (5, 40), (40, 5), (47, 33)):
        source = np.arange(60 * 60, dtype=np.uint32).reshape(60, 60)
        target = np.zeros((60, 60), np.uint32)

        @jit.loop
        def run(source, target, height, width) -> None:  # type: ignore[no-untyped-def]
            turning.turn_tile(source, 3, 5, target, 7, 2, height, width)

        run(source, target, height, width)
        expected = np.zeros_like(target)
        expected[7 : 7 + width, 2 : 2 + height] = source[3 : 3 + height, 5 : 5 + width].T
        assert np.array_equal(target, expected)


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, st.booleans(), SEEDS)
def test_sums_of_rows(n: int, k: int, magnitudes: bool, seed: int) -> None:
    codes = bytes_of(seed, 2, n, k).view(torch.int8)
    same(lambda: lanes.row_sums(codes, magnitudes=magnitudes))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.int32])
def test_results_begin_at_a_line_of_the_cache(dtype: torch.dtype) -> None:
    kept = [lanes.empty((n, 3), dtype, torch.device("cpu")) for n in (1, 5, 64, 1000, 70000)]
    assert all(t.data_ptr() % lanes.LINE == 0 and t.is_contiguous() for t in kept)
    assert [t.untyped_storage().nbytes() for t in kept] == [t.nbytes for t in kept]


@pytest.mark.parametrize("start", [0, 1, 8, 16, 32])
def test_columns_go_to_any_place(start: int) -> None:
    packed = np.random.default_rng(start).integers(0, 1 << 32, (192, 36), dtype=np.uint32)
    raw = np.empty(36 * 8 * 192 + 2 * lanes.LINE, np.uint8)
    first = -raw.ctypes.data % lanes.LINE + start
    raw[:] = 99
    target = raw[first : first + 36 * 8 * 192]
    columns.split_columns(packed, target.reshape(36, 8, 192), paired=False, signed=False)
    assert np.array_equal(target.reshape(36, 8, 192), packed.T[:, None] >> np.arange(0, 32, 4)[:, None] & 15)
    down = target.reshape(36, 192 * 8)
    columns.spread_down(packed, down, 4)
    assert np.array_equal(down.reshape(36, 192, 8), packed.T[:, :, None] >> np.arange(0, 32, 4) & 15)
    assert (raw[:first] == 99).all() and (raw[first + target.size :] == 99).all()


def test_sums_of_long_rows_are_exact() -> None:
    codes = torch.full((1, (1 << 17) + 3), -128, dtype=torch.int8)
    assert lanes.row_sums(codes).item() == -128 * codes.shape[1]
    assert lanes.row_sums(codes, magnitudes=True).item() == 128 * codes.shape[1]
