"""The block types of GGML: bytes of a tensor's rows as canonical planes, to the bit.

A row of a tensor is a run of whole blocks. The value of every type is the format named in `TYPES`; the places of its
bits follow ggml-common.h and ggml-quants.c. K quants are blocks of 256 with 8 or 16 inner scales. The i-quants that
look eight weights up in a grid (IQ1, IQ2, IQ3) are not read, nor are types for activations only (Q8_1, Q8_K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

import torch
from torch import Tensor

from qhal.formats import Format
from qhal.tensors import QTensor
from qhal_schemes.lanes import empty, part_size, transpose_bytes, turn

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The table of IQ4_NL and IQ4_XS (kvalues_iq4nl)."""
_NIBBLES, _PAIRS, _BITS = (0, 4), (0, 2, 4, 6), tuple(range(8))

Pieces = dict[str, Tensor]
"""The planes of a tensor by dotted name, each [l, count in a block, m]: block l of every run of blocks, m runs."""
Unpack = Callable[[Tensor], Pieces]
"""Pieces from the bytes of blocks, uint8 [l, bytes, m]: what is the same in all blocks is a row, and rows are long."""


@dataclass(frozen=True)
class BlockType:
    """One GGML type: elements and bytes of a block. format, unpack, table: of quantized types that can be read.

    codes_at: where the codes of a block begin if they are bytes in their own order; `unpack` does the bytes before.
    """

    name: str
    elements: int
    nbytes: int
    format: str = ""
    unpack: Unpack | None = None
    table: tuple[int, ...] = ()
    codes_at: int = 0

    @property
    def readable(self) -> bool:
        """Whether tensors of this type can be read."""
        return self.elements == 1 or self.unpack is not None


def _fields(raw: Tensor, run: int, shifts: Sequence[int]) -> Tensor:
    """Bit fields of bytes [l, b, m] as uint8 [l, b * len(shifts), m].

    Every run of `run` bytes holds its lowest fields first, byte after byte, then the next ones.
    """
    runs = raw.unflatten(1, (-1, run))
    codes = torch.empty(*runs.shape[:2], len(shifts), *runs.shape[2:], dtype=torch.uint8)
    for i, shift in enumerate(shifts):
        torch.bitwise_right_shift(runs, shift, out=codes[:, :, i])
    return codes.bitwise_and_((1 << 8 // len(shifts)) - 1).flatten(1, 3)


def _signed(codes: Tensor, middle: int) -> Tensor:
    """int8 code - middle; changes its argument."""
    return codes.view(torch.int8).sub_(middle)


def _half(raw: Tensor) -> Tensor:
    """float16 [l, 1, m] from two bytes of each block."""
    return turn(raw).reshape(-1).view(torch.float16).view(raw.shape[0], 1, raw.shape[2])


def _q4_0(b: Tensor) -> Pieces:
    return {"codes": _signed(_fields(b[:, 2:], 16, _NIBBLES), 8), "scale": _half(b[:, :2])}


def _q4_1(b: Tensor) -> Pieces:
    return {"codes": _fields(b[:, 4:], 16, _NIBBLES), "scale": _half(b[:, :2]), "offset": _half(b[:, 2:4])}


def _fifth(low: Tensor, high: Tensor) -> Tensor:
    """Codes of five bits: nibbles, and the highest bit from elsewhere."""
    return low.add_(high, alpha=16)


def _q5_0(b: Tensor) -> Pieces:
    codes = _fifth(_fields(b[:, 6:], 16, _NIBBLES), _fields(b[:, 2:6], 1, _BITS))
    return {"codes": _signed(codes, 16), "scale": _half(b[:, :2])}


def _q5_1(b: Tensor) -> Pieces:
    codes = _fifth(_fields(b[:, 8:], 16, _NIBBLES), _fields(b[:, 4:8], 1, _BITS))
    return {"codes": codes, "scale": _half(b[:, :2]), "offset": _half(b[:, 2:4])}


def _q8_0(b: Tensor) -> Pieces:
    return {"scale": _half(b)}


def _inner(scale: Tensor, d: Tensor, offset: Tensor, dmin: Tensor) -> Pieces:
    """Inner scales and minima [l, inner, m] of one half each."""
    return {"scale.codes": scale, "scale.scale": _half(d), "offset.codes": offset, "offset.scale": _half(dmin)}


def _q2_k(b: Tensor) -> Pieces:
    inner = _inner(b[:, :16] & 15, b[:, 80:82], b[:, :16] >> 4, b[:, 82:84])
    return {"codes": _fields(b[:, 16:80], 32, _PAIRS), **inner}


def _q3_k(b: Tensor) -> Pieces:
    codes = _fields(b[:, 32:96], 32, _PAIRS).add_(_fields(b[:, :32], 32, _BITS), alpha=4)
    scale = _fields(b[:, 96:104], 8, _NIBBLES) | (_fields(b[:, 104:108], 4, _PAIRS) << 4)
    return {"codes": _signed(codes, 4), "scale.codes": _signed(scale, 32), "scale.scale": _half(b[:, 108:])}


def _six_bits(s: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima [l, 8, m] of Q4_K and Q5_K from 12 bytes: six bits each, four bytes of one kind hold the first
    four values and, on top, the upper bits of the last four."""
    low, mins, both = s[:, :4], s[:, 4:8], s[:, 8:]
    scale = torch.cat([low & 63, (both & 15) | ((low >> 2) & 48)], 1)
    return scale, torch.cat([mins & 63, (both >> 4) | ((mins >> 2) & 48)], 1)


def _k_quant(b: Tensor, codes: Tensor) -> Pieces:
    scale, offset = _six_bits(b[:, 4:16])
    return {"codes": codes, **_inner(scale, b[:, :2], offset, b[:, 2:4])}


def _q4_k(b: Tensor) -> Pieces:
    return _k_quant(b, _fields(b[:, 16:], 32, _NIBBLES))


def _q5_k(b: Tensor) -> Pieces:
    return _k_quant(b, _fifth(_fields(b[:, 48:], 32, _NIBBLES), _fields(b[:, 16:48], 32, _BITS)))


def _q6_k(b: Tensor) -> Pieces:
    codes = _fields(b[:, :128], 64, _NIBBLES).add_(_fields(b[:, 128:192], 32, _PAIRS), alpha=16)
    return {
        "codes": _signed(codes, 32),
        "scale.codes": b[:, 192:208].view(torch.int8),
        "scale.scale": _half(b[:, 208:]),
    }


def _tq1_0(b: Tensor) -> Pieces:
    """Five digits of base 3 in a byte (four in the last ones), as a fraction: the next digit is (3 * byte) >> 8."""
    parts = []
    for raw, run, digits in ((b[:, :32], 32, 5), (b[:, 32:48], 16, 5), (b[:, 48:52], 4, 4)):
        powers = torch.tensor([3**i for i in range(digits)], dtype=torch.uint8)
        parts.append((raw.unflatten(1, (-1, 1, run)) * powers[:, None, None]).flatten(1, 3))  # modulo 256
    digit = torch.cat(parts, 1).short().mul_(3).bitwise_right_shift_(8)
    return {"codes": digit.to(torch.int8).sub_(1), "scale": _half(b[:, 52:])}


def _tq2_0(b: Tensor) -> Pieces:
    return {"codes": _signed(_fields(b[:, :64], 32, _PAIRS), 1), "scale": _half(b[:, 64:])}


def _iq4_nl(b: Tensor) -> Pieces:
    return {"codes": _fields(b[:, 2:], 16, _NIBBLES), "scale": _half(b[:, :2])}


def _iq4_xs(b: Tensor) -> Pieces:
    scale = _fields(b[:, 4:8], 1, _NIBBLES) | (_fields(b[:, 2:4], 1, _PAIRS) << 4)
    codes = _fields(b[:, 8:], 16, _NIBBLES)
    return {"codes": codes, "scale.codes": _signed(scale, 32), "scale.scale": _half(b[:, :2])}


def _mxfp4(b: Tensor) -> Pieces:
    return {"codes": _fields(b[:, 1:], 16, _NIBBLES), "scale": b[:, :1]}


TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18, "q4_0", _q4_0),
    3: BlockType("Q4_1", 32, 20, "q4_1", _q4_1),
    6: BlockType("Q5_0", 32, 22, "q5_0", _q5_0),
    7: BlockType("Q5_1", 32, 24, "q5_1", _q5_1),
    8: BlockType("Q8_0", 32, 34, "q8_0", _q8_0, codes_at=2),
    9: BlockType("Q8_1", 32, 36),
    10: BlockType("Q2_K", 256, 84, "q2_k", _q2_k),
    11: BlockType("Q3_K", 256, 110, "q3_k", _q3_k),
    12: BlockType("Q4_K", 256, 144, "q4_k", _q4_k),
    13: BlockType("Q5_K", 256, 176, "q5_k", _q5_k),
    14: BlockType("Q6_K", 256, 210, "q6_k", _q6_k),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18, "lut4.g32*fp16", _iq4_nl, _IQ4),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136, "lut4.g32*(int6.g8*fp16)", _iq4_xs, _IQ4),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54, "tq2_0", _tq1_0),
    35: BlockType("TQ2_0", 256, 66, "tq2_0", _tq2_0),
    39: BlockType("MXFP4", 32, 17, "mxfp4", _mxfp4),
    40: BlockType("NVFP4", 64, 36),
}
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
    """The tensor [N, K] from the bytes of its rows, uint8 [N, bytes of a row]; some rows at a time."""
    t, fmt, (n, width) = _BY_NAME[kind], format_of(kind), raw.shape
    assert t.unpack is not None, kind
    step = max(part_size() * t.nbytes // max(width * t.elements, 1), 1)
    planes: dict[str, Tensor] = {}
    blocks = raw.unflatten(1, (-1, t.nbytes))
    if t.codes_at:
        planes["codes"] = blocks[..., t.codes_at :].reshape(n, -1).view(torch.int8)
    for first in range(0, max(n, 1), step):
        part = blocks[first : first + step, :, : t.codes_at or None]
        for name, piece in t.unpack(_turned(part)).items():
            rows = _rows(piece, len(part))
            if name not in planes:
                planes[name] = empty((n, rows.shape[1]), rows.dtype, rows.device)
            planes[name][first : first + step] = rows

    def plane(name: str, inner: Format | None) -> Tensor | QTensor | None:
        if inner is None or inner.plain:
            return planes.get(name)
        return QTensor(inner, planes[f"{name}.codes"], planes[f"{name}.scale"])

    table = torch.tensor(t.table, dtype=torch.float32) if t.table else None
    return QTensor(fmt, planes["codes"], plane("scale", fmt.scale), offset=plane("offset", fmt.offset), table=table)


def _turned(blocks: Tensor) -> Tensor:
    """Blocks [..., bytes] as uint8 [l, bytes, m]; l blocks are whole words, which are quick to transpose."""
    *lead, nbytes = blocks.shape
    count = prod(lead)
    together = 4 // gcd(4, nbytes)
    together = together if count % together == 0 else 1
    return transpose_bytes(blocks.reshape(count // together, together * nbytes)).view(together, nbytes, -1)


def _rows(piece: Tensor, rows: int) -> Tensor:
    """[l, c, m] as the rows of a tensor, [rows, c of all blocks]."""
    if piece.element_size() > 1:
        return piece.permute(2, 0, 1).reshape(rows, -1)
    return turn(piece.flatten(0, 1)).view(rows, -1)
