"""Fields of bits out of records of bytes: blocks of GGUF, runs of eight indices. One loop, made for a plan.

A record gives some lanes to every plane, each a sum of fields, and the plan says where a field lies. LLVM gets whole
vectors: bytes loaded side by side, one shuffle, one shift and one mask for each field. Left to find vectors in a loop
over codes it moves one byte at a time, because for all it knows the results lie over the source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from qhal_schemes.lanes import empty
from qhal_schemes.loops.jit import loop, shared

Lane = Sequence[tuple[int, int, int]]
"""Fields (bit, mask, up) whose sum is a lane: ((the record's bits from `bit` on) & mask) << up, or see Plane.base."""


class Plane(NamedTuple):
    """What a record gives to one plane.

    size   bytes of a lane, 1 or 4; fields lie anywhere
    minus  is subtracted from every lane, modulo 2^(8 * size)
    base   3: a field (bit of its byte, 3^i, 0) is digit i of the byte, a fraction in base 3
    """

    size: int
    lanes: Sequence[Lane]
    minus: int = 0
    base: int = 2


class Records:
    """Records of nbytes, and the planes that they give."""

    def __init__(self, nbytes: int, planes: Sequence[Plane]) -> None:
        self._run, self._nbytes = _loop(json.dumps([nbytes, planes])), nbytes
        self._sizes = [len(p.lanes) * p.size for p in planes]

    def unpack(self, raw: Tensor, count: int) -> list[Tensor]:
        """uint8 [rows, count * lanes * size] of every plane, from `count` records at the start of every row."""
        if raw.shape[1] < count * self._nbytes:
            raise ValueError(f"{count} records of {self._nbytes} bytes from rows of {raw.shape[1]}")
        outs = [empty((len(raw), count * size), torch.uint8, raw.device) for size in self._sizes]
        source, targets = raw.contiguous().numpy(), tuple(t.numpy() for t in outs)
        shared(lambda start, stop: self._run(source, targets, count, start, stop), len(raw), count * sum(self._sizes))
        return outs


def _loop(plan: str) -> Callable[..., None]:
    """The loop of a plan: a text, which numba takes for a constant, and by which it finds what it compiled before."""

    def run(raw: Any, outs: Any, count: int, start: int, stop: int) -> None:
        for row in range(start, stop):
            for i in range(count):
                _record(plan, raw, outs, row, i)

    return loop(run)


@intrinsic(prefer_literal=True)
def _record(typing: Any, plan: Any, raw: Any, outs: Any, row: Any, i: Any) -> Any:
    """Record i of a row."""
    nbytes, planes = json.loads(plan.literal_value)

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        def place(kind: Any, array: Any, size: int) -> Any:
            at = b.mul(args[4], ir.Constant(args[4].type, size))
            return address(b, context.make_array(kind)(context, b, array), [args[3], at])

        source = place(signature.args[1], args[1], nbytes)
        targets = cgutils.unpack_tuple(b, args[2])
        for kind, target, plane in zip(signature.args[2], targets, planes, strict=True):
            p = Plane(*plane)
            start = place(kind, target, p.size * len(p.lanes))
            for first, lanes in _vectors(p):
                store(b, vector(b, source, p._replace(lanes=lanes)), start, first * p.size)
        return context.get_dummy_value()

    return types.void(plan, raw, outs, types.intp, types.intp), generate


def _vectors(p: Plane) -> Iterator[tuple[int, Sequence[Lane]]]:
    """Lanes by vectors, each with its first lane: the widest in which a field is one shift of bytes in line."""

    def uniform(width: int) -> bool:
        starts = [p.lanes[i - i % width] for i in range(len(p.lanes))]
        moved = [[(bit + 8 * (i % width), mask, up) for bit, mask, up in lane] for i, lane in enumerate(starts)]
        return len(p.lanes) % width == 0 and moved == [[*map(tuple, lane)] for lane in p.lanes]

    width = next((width for width in (64, 32, 16) if uniform(width)), 32 // p.size)
    for first in range(0, len(p.lanes), width):
        yield first, p.lanes[first : first + width]


def vector(b: ir.IRBuilder, source: Any, p: Plane) -> Any:
    """The lanes of a plane as one vector of integers."""
    terms = max(len(lane) for lane in p.lanes)
    padded = [[*lane, *[(lane[0][0], 0, 0)] * (terms - len(lane))] for lane in p.lanes]
    negative = -p.minus % (1 << 8 * p.size)
    total = ir.Constant(ir.VectorType(ir.IntType(8 * p.size), len(p.lanes)), [negative] * len(p.lanes))
    for fields in zip(*padded, strict=True):
        total = b.add(total, (_digits if p.base == 3 else _fields)(b, source, p.size, fields))
    return total


def _fields(b: ir.IRBuilder, source: Any, size: int, fields: Sequence[tuple[int, int, int]]) -> Any:
    """One field of every lane."""
    straddles = any(bit % 8 + mask.bit_length() > 8 * size for bit, mask, _ in fields)
    window = 2 * size if straddles else size
    value = _windows(b, source, window, fields)
    value = b.and_(b.lshr(value, like(value, [bit % 8 for bit, _, _ in fields])), like(value, [f[1] for f in fields]))
    value = b.shl(value, like(value, [up for _, _, up in fields]))
    return b.trunc(value, ir.VectorType(ir.IntType(8 * size), len(fields))) if window > size else value


def _digits(b: ir.IRBuilder, source: Any, size: int, fields: Sequence[tuple[int, int, int]]) -> Any:
    """(3 * (byte * 3^i modulo 256)) >> 8, which is how many thirds of 256 the byte has left behind."""
    value = _windows(b, source, size, fields)
    value = b.mul(value, like(value, [power for _, power, _ in fields]))
    passed = (
        b.zext(b.icmp_unsigned(">", value, like(value, [third] * len(fields))), value.type) for third in (85, 170)
    )
    return b.add(*passed)


def _windows(b: ir.IRBuilder, source: Any, size: int, fields: Sequence[tuple[int, int, int]]) -> Any:
    """Integers of `size` bytes, from the byte on in which a field begins; bits past the last one's end are any."""
    first = min(bit // 8 for bit, _, _ in fields)
    stop = max((bit + max(mask.bit_length(), 1) + 7) // 8 for bit, mask, _ in fields)
    value = load(b, source, ir.VectorType(ir.IntType(8), stop - first), first)
    places = [min(bit // 8 + i, stop - 1) - first for bit, _, _ in fields for i in range(size)]
    return b.bitcast(shuffled(b, value, value, places), ir.VectorType(ir.IntType(8 * size), len(fields)))


def address(b: ir.IRBuilder, array: Any, index: Sequence[Any]) -> Any:
    """Where an element of an array of bytes lies."""
    steps = [b.mul(i, stride) for i, stride in zip(index, cgutils.unpack_tuple(b, array.strides), strict=True)]
    return b.gep(array.data, [reduce(b.add, steps)])


def load(b: ir.IRBuilder, source: Any, kind: ir.VectorType, offset: int = 0) -> Any:
    """A vector from bytes that are aligned to nothing."""
    at = b.gep(source, [ir.Constant(ir.IntType(64), offset)])
    return b.load(b.bitcast(at, kind.as_pointer()), align=1)


def store(b: ir.IRBuilder, value: Any, target: Any, offset: int = 0, *, around: bool = False) -> None:
    """A vector of bytes or words to bytes that are aligned to nothing; around the cache, where aligned to its size."""
    at = b.bitcast(b.gep(target, [ir.Constant(ir.IntType(64), offset)]), value.type.as_pointer())
    stored = b.store(value, at, align=value.type.count * value.type.element.width // 8 if around else 1)
    if around:
        stored.set_metadata("nontemporal", b.module.add_metadata([ir.IntType(32)(1)]))


def shuffled(b: ir.IRBuilder, first: Any, second: Any, places: Sequence[int]) -> Any:
    """The elements of two vectors, one after the other, at `places`."""
    return b.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), list(places)))


def like(value: Any, numbers: Sequence[int]) -> ir.Constant:
    """A constant vector of a value's type."""
    return ir.Constant(value.type, list(numbers))
