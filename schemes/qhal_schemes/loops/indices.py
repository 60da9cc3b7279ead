"""Indices of QuIP#'s lattice E8P12, four in a word of 64 bits: two rows and two columns (see `quip.unpack_e8p`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from qhal_schemes.lanes import empty
from qhal_schemes.loops.fields import address, like, load, shuffled, store
from qhal_schemes.loops.jit import loop, shared

_SWAPS = ((1, 0x22222222), (3, 0x0A0A0A0A), (6, 0x00CC00CC), (12, 0x0000F0F0))
"""Distance of bits that trade places, and the lower ones: bit 4j + i goes to 8i + j."""


def unpack_e8p(stages: Sequence[Tensor], n: int, k: int) -> Tensor:
    """int32 codes [N, K/8, stages] from int64 [N, K/32] of one or two stages."""
    codes = empty((n, k // 8, len(stages)), torch.int32, stages[0].device)
    rows = codes.view(n // 16, 8, 2, k // 64, 8 * len(stages)).numpy().view(np.uint8)
    shape = (n // 16, k // 2) if k % 128 else (n, k // 32)  # where four words of a tile would lie in two rows, one line
    lines = tuple(words.reshape(shape).numpy().view(np.uint8) for words in stages)
    shared(lambda start, stop: _tiles(lines, rows, start, stop), n // 16, 2 * k * len(stages))
    return codes


@loop
def _tiles(lines: Any, rows: Any, start: int, stop: int) -> None:
    """Rows [N/16, 8 pairs, 2, K/64 tiles, bytes] from lines [N/16 * some, bytes], which hold 32 bytes of each pair."""
    some, runs = len(lines[0]) // len(rows), lines[0].shape[1] // 32
    for i in range(start, stop):
        for line in range(some):
            for first in range(8):  # one pair after the other: eight would fall into one set of the cache
                for run in range(first, runs, 8):
                    place = line * runs + run
                    _words(lines, rows, i * some + line, run * 32, i, place & 7, place >> 3)


@intrinsic
def _words(typing: Any, lines: Any, rows: Any, line: Any, at: Any, i: Any, pair: Any, tile: Any) -> Any:
    """The codes of four words of every stage: eight columns of a pair of rows."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, _, line, at, i, pair, tile = args

        def place(kind: Any, array: Any, *index: Any) -> Any:
            return address(b, context.make_array(kind)(context, b, array), index)

        sources = zip(signature.args[0], cgutils.unpack_tuple(b, args[0]), strict=True)
        eight = ir.VectorType(ir.IntType(32), 8)
        codes = _codes(b, [load(b, place(kind, array, line, at), eight) for kind, array in sources])
        for row, some in enumerate(_halves(b, codes)):
            which, first = ir.Constant(i.type, row), ir.Constant(i.type, 0)
            target = place(signature.args[1], args[1], i, pair, which, tile, first)
            store(b, b.zext(some, ir.VectorType(ir.IntType(32), some.type.count)), target)
        return context.get_dummy_value()

    return types.void(lines, rows, *[types.intp] * 5), generate


def _codes(b: ir.IRBuilder, stages: Sequence[Any]) -> Any:
    """16-bit codes from four words of every stage: eight columns of one row, stage by stage, then of the other."""
    lanes, width = 4 * len(stages), 8 * len(stages)
    words = shuffled(b, stages[0], stages[-1], range(width))
    upper, signs = (shuffled(b, words, words, range(half, width, 2)) for half in (0, 1))
    for shift, mask in _SWAPS:
        distance = like(signs, [shift] * lanes)
        swapped = b.and_(b.xor(b.lshr(signs, distance), signs), like(signs, [mask] * lanes))
        signs = b.xor(b.xor(signs, swapped), b.shl(swapped, distance))
    order = (
        (stage, word, row + 2 * column) for row, word, column, stage in product(*map(range, (2, 4, 2, len(stages))))
    )
    places = [16 * stage + 4 * word + byte + part for stage, word, byte in order for part in (0, 4 * lanes)]
    raw = ir.VectorType(ir.IntType(8), 4 * lanes)
    mixed = shuffled(b, b.bitcast(signs, raw), b.bitcast(upper, raw), places)  # the lower byte first
    return b.bitcast(mixed, ir.VectorType(ir.IntType(16), 4 * lanes))


def _halves(b: ir.IRBuilder, value: Any) -> Iterator[Any]:
    half = value.type.count // 2
    return (shuffled(b, value, value, range(start, start + half)) for start in (0, half))
