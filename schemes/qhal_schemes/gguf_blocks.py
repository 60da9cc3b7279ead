"""The block types of GGML: bytes of a tensor's rows as canonical planes, to the bit.

A row of a tensor is a run of whole blocks. The value of every type is the format named in `TYPES`; the places of its
bits follow ggml-common.h and ggml-quants.c. K quants are blocks of 256 with 8 or 16 inner scales. The i-quants that
look eight weights up in a grid (IQ1, IQ2, IQ3) are not read, nor are types for activations only (Q8_1, Q8_K).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qhal.formats import Format
from qhal.tensors import QTensor
from qhal_schemes.compiled import loops
from qhal_schemes.lanes import empty, part_size, transpose_bytes, turn

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The table of IQ4_NL and IQ4_XS (kvalues_iq4nl)."""


class Bits(NamedTuple):
    """Fields of the bytes start:stop of a block, in the order of codes.

    Every run of `run` bytes gives its fields at the first shift, byte after byte, then those at the next one. `up` is
    where a field lies in its code, 0 for the first of several. base 3: shift i is digit i of the byte, a fraction in
    base 3, whose next digit is (3 * byte) >> 8.
    """

    start: int
    stop: int
    run: int
    bits: int
    shifts: Sequence[int]
    up: int = 0
    base: int = 2


class Plane(NamedTuple):
    """Codes of a block less `minus`: parts follow each other, and the fields of a part are added up."""

    parts: Sequence[Sequence[Bits]]
    dtype: torch.dtype = torch.uint8
    minus: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that a block gives."""
        return sum((part[0].stop - part[0].start) * len(part[0].shifts) for part in self.parts)

    @property
    def copied(self) -> bool:
        """Whether its codes are many bytes as they are."""
        return self.parts[0][0].bits == 8 and self.nbytes >= 16


Planes = Mapping[str, Plane]
"""The planes of a tensor by dotted name."""


@dataclass(frozen=True)
class BlockType:
    """One GGML type: elements and bytes of a block. format, planes, table: of quantized types that can be read."""

    name: str
    elements: int
    nbytes: int
    format: str = ""
    planes: Planes = field(default_factory=dict)
    table: tuple[int, ...] = ()

    @property
    def readable(self) -> bool:
        """Whether tensors of this type can be read."""
        return self.elements == 1 or bool(self.planes)


def _fields(start: int, stop: int, run: int, bits: int, up: int = 0) -> Bits:
    """All fields of `bits` bits of some bytes."""
    return Bits(start, stop, run, bits, range(0, 8, bits), up)


def _codes(*fields: Bits, minus: int = 0) -> Plane:
    return Plane((fields,), torch.int8 if minus else torch.uint8, minus)


def _bytes(start: int, stop: int, dtype: torch.dtype) -> Plane:
    return Plane(((_fields(start, stop, stop - start, 8),),), dtype)


def _half(start: int) -> Plane:
    return _bytes(start, start + 2, torch.float16)


def _inner(scale: Plane, d: int, offset: Plane, dmin: int) -> Planes:
    """Inner scales and minima of one half each."""
    return {"scale.codes": scale, "scale.scale": _half(d), "offset.codes": offset, "offset.scale": _half(dmin)}


def _six_bits(start: int, shift: int) -> Plane:
    """Scales or minima of Q4_K and Q5_K: eight of six bits. Four bytes hold the first four values and, on top, the
    upper bits of the last four; of these the nibbles at `shift` of the bytes 12:16 are the lower ones."""
    first, upper = (Bits(start, start + 4, 4, 6, (0,)), Bits(start, start + 4, 4, 2, (6,), 4))
    return Plane(((first,), (Bits(12, 16, 4, 4, (shift,)), upper)))


_Q2_INNER = [Plane(((Bits(0, 16, 16, 4, (shift,)),),)) for shift in (0, 4)]
_K_INNER = _inner(_six_bits(4, 0), 0, _six_bits(8, 4), 2)
_TRITS = [(Bits(start, stop, stop - start, 2, range(digits), base=3),)
          for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4))]  # fmt: skip
"""TQ1_0: five digits in a byte, four in the last ones."""

TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18, "q4_0", {"codes": _codes(_fields(2, 18, 16, 4), minus=8), "scale": _half(0)}),
    3: BlockType("Q4_1", 32, 20, "q4_1",
                 {"codes": _codes(_fields(4, 20, 16, 4)), "scale": _half(0), "offset": _half(2)}),
    6: BlockType("Q5_0", 32, 22, "q5_0",
                 {"codes": _codes(_fields(6, 22, 16, 4), _fields(2, 6, 1, 1, 4), minus=16), "scale": _half(0)}),
    7: BlockType("Q5_1", 32, 24, "q5_1",
                 {"codes": _codes(_fields(8, 24, 16, 4), _fields(4, 8, 1, 1, 4)), "scale": _half(0),
                  "offset": _half(2)}),
    8: BlockType("Q8_0", 32, 34, "q8_0", {"codes": _bytes(2, 34, torch.int8), "scale": _half(0)}),
    9: BlockType("Q8_1", 32, 36),
    10: BlockType("Q2_K", 256, 84, "q2_k",
                  {"codes": _codes(_fields(16, 80, 32, 2)), **_inner(_Q2_INNER[0], 80, _Q2_INNER[1], 82)}),
    11: BlockType("Q3_K", 256, 110, "q3_k",
                  {"codes": _codes(_fields(32, 96, 32, 2), _fields(0, 32, 32, 1, 2), minus=4),
                   "scale.codes": _codes(_fields(96, 104, 8, 4), _fields(104, 108, 4, 2, 4), minus=32),
                   "scale.scale": _half(108)}),
    12: BlockType("Q4_K", 256, 144, "q4_k", {"codes": _codes(_fields(16, 144, 32, 4)), **_K_INNER}),
    13: BlockType("Q5_K", 256, 176, "q5_k",
                  {"codes": _codes(_fields(48, 176, 32, 4), _fields(16, 48, 32, 1, 4)), **_K_INNER}),
    14: BlockType("Q6_K", 256, 210, "q6_k",
                  {"codes": _codes(_fields(0, 128, 64, 4), _fields(128, 192, 32, 2, 4), minus=32),
                   "scale.codes": _bytes(192, 208, torch.int8), "scale.scale": _half(208)}),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18, "lut4.g32*fp16", {"codes": _codes(_fields(2, 18, 16, 4)), "scale": _half(0)}, _IQ4),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136, "lut4.g32*(int6.g8*fp16)",
                  {"codes": _codes(_fields(8, 136, 16, 4)),
                   "scale.codes": _codes(_fields(4, 8, 1, 4), _fields(2, 4, 1, 2, 4), minus=32),
                   "scale.scale": _half(0)}, _IQ4),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54, "tq2_0", {"codes": Plane(_TRITS, torch.int8, 1), "scale": _half(52)}),
    35: BlockType("TQ2_0", 256, 66, "tq2_0", {"codes": _codes(_fields(0, 64, 32, 2), minus=1), "scale": _half(64)}),
    39: BlockType("MXFP4", 32, 17, "mxfp4",
                  {"codes": _codes(_fields(1, 17, 16, 4)), "scale": _bytes(0, 1, torch.uint8)}),
    40: BlockType("NVFP4", 64, 36),
}  # fmt: skip
"""Every GGML type of today by its number in files."""

_BY_NAME = {kind.name: kind for kind in TYPES.values()}


def size_of(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of whole blocks."""
    t = _BY_NAME[kind]
    return prod(shape) // t.elements * t.nbytes


@lru_cache(maxsize=64)
def format_of(kind: str) -> Format:
    """The format of a type in blocks that can be read."""
    return Format.parse(_BY_NAME[kind].format)


def unpack(kind: str, raw: Tensor) -> QTensor:
    """The tensor [N, K] from the bytes of its rows, uint8 [N, bytes of a row]."""
    t, fmt = _BY_NAME[kind], format_of(kind)
    assert t.planes, kind
    compiled = loops("fields", raw)
    found = _rows(t, raw) if compiled is None else _records(compiled, kind).unpack(raw, raw.shape[1] // t.nbytes)
    planes = {name: rows.view(t.planes[name].dtype) for name, rows in zip(t.planes, found, strict=True)}

    def plane(name: str, inner: Format | None) -> Tensor | QTensor | None:
        if inner is None or inner.plain:
            return planes.get(name)
        return QTensor(inner, planes[f"{name}.codes"], planes[f"{name}.scale"])

    table = torch.tensor(t.table, dtype=torch.float32) if t.table else None
    return QTensor(fmt, planes["codes"], plane("scale", fmt.scale), offset=plane("offset", fmt.offset), table=table)


@lru_cache(maxsize=64)
def _records(compiled: Any, kind: str) -> Any:
    """The blocks of a type as `loops.fields` has them."""

    def lanes(f: Bits) -> list[tuple[int, int, int]]:
        places = [(8 * (r + j), s) for r in range(f.start, f.stop, f.run) for s in f.shifts for j in range(f.run)]
        if f.base == 3:
            return [(bit, 3**s, f.up) for bit, s in places]
        return [(bit + s, (1 << f.bits) - 1, f.up) for bit, s in places]

    t, planes = _BY_NAME[kind], []
    for p in t.planes.values():
        every = [lane for part in p.parts for lane in zip(*map(lanes, part), strict=True)]
        planes.append(compiled.Plane(1, every, p.minus, p.parts[0][0].base))
    return compiled.Records(t.nbytes, planes)


def _rows(t: BlockType, raw: Tensor) -> list[Tensor]:
    """uint8 [N, bytes of a row] of every plane with tensor operations, some rows at a time."""
    n, width = raw.shape
    found = [empty((n, width // t.nbytes * p.nbytes), torch.uint8, raw.device) for p in t.planes.values()]
    step = max(part_size() * t.nbytes // max(width * t.elements, 1), 1)
    last = max(f.stop for p in t.planes.values() if not p.copied for part in p.parts for f in part)
    for first in range(0, n, step):
        blocks = raw[first : first + step].unflatten(1, (-1, t.nbytes))
        turned = _turned(blocks[..., :last].flatten(0, 1))
        for p, rows in zip(t.planes.values(), found, strict=True):
            if p.copied:
                rows[first : first + step] = blocks[..., p.parts[0][0].start : p.parts[0][0].stop].flatten(1)
                continue
            codes = torch.cat([_sum(turned, fields) for fields in p.parts], 1).flatten(0, 1)
            rows[first : first + step] = turn(codes.sub_(p.minus) if p.minus else codes).view(len(blocks), -1)
    return found


def _turned(blocks: Tensor) -> Tensor:
    """Blocks [count, bytes] as uint8 [l, bytes, m]; l blocks are whole words, which are quick to transpose."""
    count, nbytes = blocks.shape
    together = 4 // gcd(4, nbytes)
    together = together if count % together == 0 else 1
    return transpose_bytes(blocks.reshape(count // together, together * nbytes)).view(together, nbytes, -1)


def _sum(raw: Tensor, fields: Sequence[Bits]) -> Tensor:
    """Codes [l, count in a block, m] from bytes [l, b, m], modulo 256."""
    total: Tensor | None = None
    for f in fields:
        runs = raw[:, f.start : f.stop].unflatten(1, (-1, f.run))
        codes = torch.empty(*runs.shape[:2], len(f.shifts), *runs.shape[2:], dtype=torch.uint8, device=raw.device)
        for i, shift in enumerate(f.shifts):
            if f.base == 3:
                codes[:, :, i] = ((runs * 3**shift).short() * 3).bitwise_right_shift_(8)
            else:
                torch.bitwise_right_shift(runs, shift, out=codes[:, :, i])
        if f.base == 2 and f.bits < 8:
            codes.bitwise_and_((1 << f.bits) - 1)
        codes = codes.flatten(1, 3)
        total = codes if total is None else total.add_(codes, alpha=1 << f.up)
    assert total is not None
    return total
