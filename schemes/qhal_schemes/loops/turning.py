"""Matrices turned, 16 x 16 at a time: a load of 16 rows, four rounds of shuffles, a store of 16 columns.

Written in LLVM's instructions, which exist for every processor: of the plain loop it makes gathers and scatters, an
element at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from qhal_schemes.loops.jit import loop, part, shared

Array = np.ndarray[Any, Any]
SIDE = 16


def turn(source: Array, target: Array) -> None:
    """target [N, M] from source [M, N], both in order, of bytes or of words."""
    shared(lambda a, b: _turn(source, target, a, b), len(target), source.shape[0] * source.itemsize)


@loop
def _turn(source: Array, target: Array, first: int, last: int) -> None:
    height, step = source.shape[0], 8 * SIDE
    for n in range(first, last, step):
        for m in range(0, height, step):
            turn_tile(source, m, n, target, n, m, min(step, height - m), min(step, last - n))


@part
def turn_tile(source: Array, m: int, n: int, target: Array, k: int, j: int, height: int, width: int) -> None:
    """target[k + b, j + a] = source[m + a, n + b] for a < height, b < width."""
    whole_rows, whole_columns = height - height % SIDE, width - width % SIDE
    for b in range(0, whole_columns, SIDE):
        for a in range(0, whole_rows, SIDE):
            _turn_block(source, m + a, n + b, target, k + b, j + a)
    for a in range(height):
        for b in range(0 if a >= whole_rows else whole_columns, width):
            target[k + b, j + a] = source[m + a, n + b]


@intrinsic
def _turn_block(_: object, source: Any, m: Any, n: Any, target: Any, k: Any, j: Any) -> tuple[Any, Callable[..., Any]]:
    """The same for 16 rows and columns."""
    signature = types.void(source, types.intp, types.intp, target, types.intp, types.intp)

    def rows(context: Any, b: Any, kind: Any, array: Any, row: Any, column: Any) -> list[Any]:
        address, nbytes = ir.IntType(64), kind.dtype.bitwidth // 8
        place, made = ir.VectorType(ir.IntType(8 * nbytes), SIDE).as_pointer(), make_array(kind)(context, b, array)
        step = cgutils.unpack_tuple(b, made.strides)[0]
        first = b.add(b.ptrtoint(made.data, address), b.mul(column, address(nbytes)))
        return [b.inttoptr(b.add(first, b.mul(b.add(row, address(i)), step)), place) for i in range(SIDE)]

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        align = sig.args[0].dtype.bitwidth // 8
        block = [b.load(at, align=align) for at in rows(context, b, sig.args[0], *args[:3])]
        for vector, at in zip(riffled(b, block), rows(context, b, sig.args[3], *args[3:]), strict=True):
            b.store(vector, at, align=align)
        return context.get_dummy_value()

    return signature, code


def riffled(b: Any, rows: list[Any]) -> list[Any]:
    """The columns of 16 rows of 16 elements, or of several such blocks side by side, each in its place.

    One round riffles rows i and i + 8 like two halves of a deck of cards, into rows 2i and 2i + 1: the first bit of the
    row's number becomes the last one of the column's, and the other way round. Four rounds exchange all.
    """
    count = rows[0].type.count
    for _ in range(4):
        mixed = []
        for x, y in zip(rows[:8], rows[8:], strict=True):
            for half in (0, 8):
                places = [s + g + half + i for g in range(0, count, SIDE) for i in range(8) for s in (0, count)]
                mask = ir.Constant(ir.VectorType(ir.IntType(32), count), places)
                mixed.append(b.shuffle_vector(x, y, mask))
        rows = mixed
    return rows
