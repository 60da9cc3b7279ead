"""Codes that a file holds in the other order than a weight: turned a tile at a time, in and out by long pieces."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from qhal_schemes.lanes import LINE
from qhal_schemes.loops.blocks import copy, finish, spread_record, turn_fields
from qhal_schemes.loops.jit import loop, shared
from qhal_schemes.loops.turning import SIDE, turn_tile

Array = np.ndarray[Any, Any]
_WIDE = 4 * LINE
"""Bytes of a row of a tile. Tiles are copied before they are turned: rows of a matrix are often a power of two apart,
and then their lines push each other out of the first cache."""


def spread_down(source: Array, target: Array, bits: int) -> None:
    """target, bytes [N, 32M / bits]: the dense streams down the columns of uint32 words [M, N], M whole runs."""
    run = _spread_down(bits, LINE if _whole_lines(target) else 8 if target.shape[1] % 32 else 32)
    raw = source.view(np.uint8)
    shared(lambda a, b: run(raw, target, a, b), len(target), target.shape[1])


@cache
def _spread_down(bits: int, count: int) -> Callable[..., None]:
    """count: codes that are stored together; they fill count * bits / 8 bytes of the stream."""
    rows, columns, step = SIDE * bits, _WIDE // 4, count * bits // 8

    def spread_columns(source: Array, target: Array, first: int, last: int) -> None:
        tile = np.empty((rows, _WIDE + LINE), np.uint8)
        turned = np.empty((columns, 4 * rows + LINE), np.uint8)
        for n in range(first, last, columns):
            width = min(columns, last - n)
            for m in range(0, source.shape[0], rows):
                height = min(rows, source.shape[0] - m)
                for i in range(height):
                    copy(source, m + i, 4 * n, tile, i, 4 * width)
                turn_tile(tile.view(np.uint32), 0, 0, turned.view(np.uint32), 0, 0, height, width)
                for i in range(width):
                    for j in range(4 * height // step):
                        spread_record(turned, i, j * step, target, n + i, 32 * m // bits + j * count, bits, count)
        finish()

    return loop(spread_columns)


def split_columns(source: Array, target: Array, *, paired: bool, signed: bool) -> None:
    """target, bytes [N, 8, K]: the nibbles of uint32 words [K, N], turned; signed: in two's complement.

    paired: nibbles stand in the order 0, 2, 4, 6, 1, 3, 5, 7 of their rows.
    """
    rows = target.reshape(len(target), 2, 2, 2, target.shape[2])
    rows = rows.transpose(0, 3, 1, 2, 4) if paired else rows  # nibble 4a + 2b + c is code a + 4b + 2c
    _turn(source.view(np.uint8), rows, 8 if signed else 0)


def turn_bytes(source: Array, target: Array) -> None:
    """target [4N, K] from source [K, 4N], both bytes."""
    _turn(source, target.reshape(len(target) // 4, 2, 2, 1, target.shape[1]), 0)


def _turn(source: Array, target: Array, sign: int) -> None:
    """target as in `turn_fields` from source, bytes [K, 4N]."""
    run = _turn_fields(target.shape[3], LINE if _whole_lines(target) else SIDE)
    shared(lambda a, b: run(source, target, a, b, np.uint8(sign)), len(target), 4 * source.shape[0])


@cache
def _turn_fields(fields: int, height: int) -> Callable[..., None]:
    rows, columns = 2 * LINE, _WIDE // 4
    bits, mask = np.uint8(8 // fields), np.uint8(255 >> 8 - 8 // fields)

    def turn_columns(source: Array, target: Array, first: int, last: int, sign: Any) -> None:
        tile = np.empty((rows, _WIDE + LINE), np.uint8)
        for n in range(first, last, columns):
            width = min(columns, last - n)
            for k in range(0, source.shape[0], rows):
                deep = min(rows, source.shape[0] - k)
                for i in range(deep):
                    copy(source, k + i, 4 * n, tile, i, 4 * width)
                whole, even = width - width % 4, deep - deep % height
                for j in range(0, whole, 4):
                    for i in range(0, even, height):
                        turn_fields(tile, i, 4 * j, target, n + j, k + i, sign, fields, height)
                for i in range(deep):
                    for j in range(0 if i >= even else whole, width):
                        for c in range(4):
                            for f in range(fields):
                                field = (tile[i, 4 * j + c] >> np.uint8(bits * f)) & mask
                                target[n + j, c // 2, c % 2, f, k + i] = (field ^ sign) - sign
        finish()

    return loop(turn_columns)


def _whole_lines(target: Array) -> bool:
    """Whether every row is whole lines of the cache, which can be stored around it."""
    return target.shape[-1] % LINE == 0 and target.ctypes.data % LINE == 0
