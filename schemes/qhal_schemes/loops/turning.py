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
    """The same for 16 rows and columns. In round d, rows whose numbers differ by d exchange the columns that do."""
    signature = types.void(source, types.intp, types.intp, target, types.intp, types.intp)

    def rows(context: Any, b: Any, kind: Any, array: Any, row: Any, column: Any) -> list[Any]:
        address, nbytes = ir.IntType(64), kind.dtype.bitwidth // 8
        place, made = ir.VectorType(ir.IntType(8 * nbytes), SIDE).as_pointer(), make_array(kind)(context, b, array)
        step = cgutils.unpack_tuple(b, made.strides)[0]
        first = b.add(b.ptrtoint(made.data, address), b.mul(column, address(nbytes)))
        return [b.inttoptr(b.add(first, b.mul(b.add(row, address(i)), step)), place) for i in range(SIDE)]

    def mask(columns: list[int]) -> Any:
        return ir.Constant(ir.VectorType(ir.IntType(32), SIDE), [ir.IntType(32)(c) for c in columns])

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        align = sig.args[0].dtype.bitwidth // 8
        block = [b.load(at, align=align) for at in rows(context, b, sig.args[0], *args[:3])]
        for d in (1, 2, 4, 8):
            for i in (i for i in range(SIDE) if not i & d):
                x, y = block[i], block[i + d]
                block[i] = b.shuffle_vector(x, y, mask([SIDE + c - d if c & d else c for c in range(SIDE)]))
                block[i + d] = b.shuffle_vector(x, y, mask([SIDE + c if c & d else c + d for c in range(SIDE)]))
        for vector, at in zip(block, rows(context, b, sig.args[3], *args[3:]), strict=True):
            b.store(vector, at, align=align)
        return context.get_dummy_value()

    return signature, code
