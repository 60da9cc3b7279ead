"""Codes of 1 to 7 bits, each to a byte of its own: beside its neighbours, or in another row than they.

Shifts and masks are constants of a loop, so that LLVM makes vectors of its steps: there is one loop for each width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import gcd
from typing import Any

import numpy as np

from qhal_schemes.loops.jit import loop, part, shared

Array = np.ndarray[Any, Any]
_LANE: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def spread(source: Array, target: Array, bits: int, *, flip: int = 0, minus: int = 0, order: str = "") -> None:
    """target, bytes [8n / bits]: (field ^ flip) - minus of a dense stream, bytes [n], the lowest first.

    order   high    4 bits, the upper field of a byte first
            paired  source is uint32 words whose nibbles stand in the order 0, 2, 4, 6, 1, 3, 5, 7
    """
    fields, size, lane = _lanes(bits, order)
    run, numbers, made = _spread(bits, order), _changes(fields, flip, minus), target.view(lane)
    shared(lambda a, b: run(source[size * a : size * b], made[a:b], *numbers), len(made), fields)


def _lanes(bits: int, order: str) -> tuple[int, int, Any]:
    """A lane of a dense stream: its codes, the items of the source that hold them, its dtype."""
    fields = 8 if order == "paired" else 8 // gcd(8, bits)
    return fields, 1 if order == "paired" else fields * bits // 8, _LANE[fields]


def _changes(fields: int, flip: int, minus: int) -> tuple[Any, Any, Any]:
    """flips, plus and top of a lane: ((codes ^ flips) + plus) ^ top borrows from no neighbour."""
    ones = sum(1 << at for at in range(0, 8 * fields, 8))
    flips, plus, top = (_LANE[fields](n * ones) for n in (flip, 128 - minus, 128))
    return flips, plus, top


@cache
def _spread(bits: int, order: str) -> Callable[..., None]:
    """Lanes from items. In halvings, the upper half of the codes moves to its bytes."""
    fields, size, lane = _lanes(bits, order)
    steps = []
    for run in (8, 4, 2):
        low = sum(((1 << run // 2 * bits) - 1) << 8 * at for at in range(0, fields, run))
        move = run // 2 * (8 - bits)
        steps.append((lane(move), lane(low), lane(low << 4 * run)) if run <= fields else None)
    (s0, l0, h0), (s1, l1, h1), (s2, l2, h2) = (step or (lane(0), ~lane(0), lane(0)) for step in steps)
    high, paired = order == "high", order == "paired"

    def spread_lanes(source: Array, target: Array, flips: Any, plus: Any, top: Any) -> None:
        for i in range(target.shape[0]):
            x = lane(0)
            for j in range(size):
                x |= lane(lane(source[size * i + j]) << lane(8 * j))
            if high:
                x = lane(lane(x << lane(4)) | lane(x >> lane(4))) & lane(0xFF)
            if paired:  # nibbles next to each other change places, first in pairs
                t = (x ^ (x >> lane(8))) & lane(0xFF00)
                x ^= t ^ lane(t << lane(8))
                t = (x ^ (x >> lane(4))) & lane(0x00F000F0)
                x ^= t ^ lane(t << lane(4))
            x = (x & l0) | (lane(x << s0) & h0)
            x = (x & l1) | (lane(x << s1) & h1)
            x = (x & l2) | (lane(x << s2) & h2)
            target[i] = lane(lane(x ^ flips) + plus) ^ top

    return loop(spread_lanes)


def cut(source: Array, target: Array, bits: int, minus: int) -> None:
    """target, bytes [n * (32 // bits)]: the whole fields of every uint32 of source [n], less `minus`."""
    fields = 32 // bits
    run, number = _cut(bits, fields), np.uint8(minus)
    shared(lambda a, b: run(source[a:b], target[fields * a : fields * b], number), len(source), fields)


@cache
def _cut(bits: int, fields: int) -> Callable[..., None]:
    mask = np.uint8((1 << bits) - 1)

    def cut_words(source: Array, target: Array, minus: Any) -> None:
        for i in range(source.shape[0]):
            for j in range(fields):
                target[fields * i + j] = (np.uint8(source[i] >> np.uint32(bits * j)) & mask) - minus

    return loop(cut_words)


def split(source: Array, target: Array, *, signed: bool = False) -> None:
    """target, bytes [R, 2, C]: the nibbles of bytes [R * C], in rows of their own; signed: in two's complement."""
    rows, _, columns = target.shape
    sign, source = np.uint8(8 if signed else 0), source.reshape(rows, columns)
    shared(lambda a, b: _split(source[a:b], target[a:b], sign), rows, 2 * columns)


@loop
def _split(source: Array, target: Array, sign: Any) -> None:
    for r in range(source.shape[0]):
        _split_row(source[r], target[r, 0], target[r, 1], sign)


@part
def _split_row(source: Array, low: Array, high: Array, sign: Any) -> None:
    for c in range(source.shape[0]):
        low[c] = ((np.uint8(source[c]) & np.uint8(15)) ^ sign) - sign
        high[c] = ((np.uint8(source[c]) >> np.uint8(4)) ^ sign) - sign
