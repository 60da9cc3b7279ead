"""Steps of the loops over columns, in LLVM's instructions: bytes that are turned or spread in registers.

Results leave a whole line of the cache at a time, around the cache. They are up to sixteen times as large as what they
are made of: an ordinary store would first read every line from memory, and push lines of the source out of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qhal_schemes.lanes import LINE
from qhal_schemes.loops.fields import Plane, address, like, load, shuffled, store, vector
from qhal_schemes.loops.turning import SIDE, riffled

Code = tuple[Any, Callable[..., Any]]


@intrinsic
def copy(typing: Any, source: Any, i: Any, j: Any, target: Any, k: Any, count: Any) -> Code:
    """target[k, :count] = source[i, j : j + count], of bytes."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        target = _place(context, b, signature, args, 3, (args[4], _index(0)))
        cgutils.raw_memcpy(b, target, _place(context, b, signature, args, 0, args[1:3]), args[5], 1)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def turn_fields(
    typing: Any, source: Any, i: Any, j: Any, target: Any, n: Any, k: Any, sign: Any, fields: Any, height: Any
) -> Code:
    """The columns of source[i : i + height, j : j + 16], bytes, to rows of target.

    target   bytes [N, 2, 2, fields, K]: four columns from n on, a number in two bits, and their fields; K from k on
    sign     (field ^ sign) - sign is stored
    fields   of a byte, the lowest first: 1 or 2 (a constant)
    height   16, or LINE, and then rows of the target are lines (a constant)
    """
    deep, count = height.literal_value, fields.literal_value
    bits = 8 // count

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        def row(number: int) -> Any:
            at = (b.add(args[1], _index(number)), args[2])
            return load(b, _place(context, b, signature, args, 0, at), ir.VectorType(ir.IntType(8), SIDE))

        rows = [_joined(b, [row(i) for i in range(first, deep, SIDE)]) for first in range(SIDE)]
        signs = b.insert_element(ir.Constant(rows[0].type, ir.Undefined), args[6], _index(0))
        signs = shuffled(b, signs, signs, [0] * deep)
        for c, column in enumerate(riffled(b, rows)):
            for f in range(count):
                field = b.lshr(column, like(column, [bits * f] * deep))
                field = b.and_(field, like(column, [(1 << bits) - 1] * deep))
                at = (b.add(args[4], _index(c // 4)), _index(c // 2 % 2), _index(c % 2), _index(f), args[5])
                place = _place(context, b, signature, args, 3, at)
                store(b, b.sub(b.xor(field, signs), signs), place, around=deep == LINE)
        return context.get_dummy_value()

    place = (types.intp, types.intp)
    return types.void(source, *place, target, *place, types.uint8, fields, height), generate


@intrinsic(prefer_literal=True)
def spread_record(typing: Any, source: Any, i: Any, j: Any, target: Any, n: Any, k: Any, bits: Any, count: Any) -> Code:
    """target[n, k : k + count], bytes: codes of a dense stream of `bits` bits, which begins at the byte source[i, j].

    count: LINE, and then rows of the target are lines, or less (bits, count: constants).
    """
    width, lanes = bits.literal_value, count.literal_value
    plane = Plane(1, [[(width * lane, (1 << width) - 1, 0)] for lane in range(lanes)])

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        codes = vector(b, _place(context, b, signature, args, 0, args[1:3]), plane)
        store(b, codes, _place(context, b, signature, args, 3, args[4:6]), around=lanes == LINE)
        return context.get_dummy_value()

    place = (types.intp, types.intp)
    return types.void(source, *place, target, *place, bits, count), generate


@intrinsic
def finish(typing: Any) -> Code:
    """Stores around the cache are done before any that follow: other threads are told of them by ordinary ones."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _place(context: Any, b: ir.IRBuilder, signature: Any, args: Any, which: int, index: Sequence[Any]) -> Any:
    """Where an element of the array that is argument `which` lies."""
    return address(b, context.make_array(signature.args[which])(context, b, args[which]), index)


def _index(number: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), number)


def _joined(b: ir.IRBuilder, parts: Sequence[Any]) -> Any:
    """One vector of 1, 2 or 4, in order."""
    while len(parts) > 1:
        parts = [shuffled(b, x, y, range(2 * x.type.count)) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
