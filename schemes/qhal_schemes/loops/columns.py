"""Codes of words that stand in the other order than the codes: turned a panel at a time, and spread from the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from qhal_schemes.loops.jit import loop, shared
from qhal_schemes.loops.turning import SIDE, turn_tile
from qhal_schemes.loops.words import changes, lanes, split_piece, spread_piece

Array = np.ndarray[Any, Any]
_PANEL = 1 << 16
"""Words of a panel that is more than SIDE columns wide: they stay in the second cache, and reads are long."""


def spread_down(source: Array, target: Array, bits: int) -> None:
    """target, bytes [N, 32M / bits]: the dense streams down the columns of uint32 words [M, N], M whole runs."""
    fields, _, lane = lanes(bits)
    run, numbers, made = _spread_down(bits), changes(fields, 0, 0), target.view(lane)
    shared(lambda a, b: run(source, made, a, b, *numbers), len(target), target.shape[1])


@cache
def _spread_down(bits: int) -> Callable[..., None]:
    piece = spread_piece(bits)

    def spread_columns(source: Array, target: Array, first: int, last: int, flips: Any, plus: Any, top: Any) -> None:
        height = source.shape[0]
        step = min(max(_PANEL // max(height, 1) // SIDE, 1), 4) * SIDE
        words = np.empty((step, height), np.uint32)
        raw = words.view(np.uint8)
        for n in range(first, last, step):
            width = min(step, last - n)
            turn_tile(source, 0, n, words, 0, 0, height, width)
            piece(raw[:width].reshape(-1), target[n : n + width].reshape(-1), flips, plus, top)

    return loop(spread_columns)


def split_columns(source: Array, target: Array, *, paired: bool, signed: bool) -> None:
    """target, bytes [M, 8, K]: the nibbles of uint32 words [K, M], turned. paired, signed: as `words.split`."""
    run, sign = _split_columns(paired), np.uint8(8 if signed else 0)
    shared(lambda a, b: run(source, target, a, b, sign), len(target), 8 * len(source))


@cache
def _split_columns(paired: bool) -> Callable[..., None]:
    piece = split_piece(8, paired)

    def split_turned(source: Array, target: Array, first: int, last: int, sign: Any) -> None:
        height = source.shape[0]
        words = np.empty((SIDE, height), np.uint32)
        for m in range(first, last, SIDE):
            width = min(SIDE, last - m)
            turn_tile(source, 0, m, words, 0, 0, height, width)
            for i in range(width):
                piece(words[i], target[m + i], sign)

    return loop(split_turned)
