"""How the NPU lays out quantized weights, as bijections: FRACTAL_NZ, int4 packs, scale words, MX scale pairs.

FRACTAL_NZ is the device's own re-layout (`npu_format_cast`); `nz` here is the same order of bytes, so that a dump of
the storage can be compared on a processor. Sources: torch_npu's operator documents, and the wheel's own int4 packer.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUBE = 16
"""Rows of a fractal. Its columns are 32 bytes: 32 elements of int8, 16 of a 16-bit type."""
_LANES = 8
_WORD = 1 << 32
_CONVERTED = 1 << 46


def columns(dtype: torch.dtype) -> int:
    """Columns of a fractal."""
    return 32 // dtype.itemsize


def nz(w: Tensor) -> Tensor:
    """[..., K, N] to the storage of FRACTAL_NZ, [..., ceil(N/c), ceil(K/16), 16, c], padded with zeros."""
    c = columns(w.dtype)
    k, n = w.shape[-2:]
    padded = torch.nn.functional.pad(w, (0, -n % c, 0, -k % CUBE))
    lead, rows, wide = padded.shape[:-2], padded.shape[-2] // CUBE, padded.shape[-1] // c
    return padded.reshape(*lead, rows, CUBE, wide, c).movedim(-2, -4).contiguous()


def from_nz(stored: Tensor, k: int, n: int) -> Tensor:
    """The [..., K, N] that `nz` made this of."""
    return stored.movedim(-4, -2).flatten(-4, -3).flatten(-2, -1)[..., :k, :n].contiguous()


def pack_int4(codes: Tensor) -> Tensor:
    """Integers -8..7 [..., 8j] to int32 [..., j]; the first of eight is the low nibble."""
    lanes = (codes.to(torch.int32) & 15).reshape(*codes.shape[:-1], -1, _LANES)
    word = lanes[..., 0].clone()
    for i in range(1, _LANES):
        word |= lanes[..., i] << (4 * i)
    return word


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 codes -8..7 of `pack_int4`."""
    lanes = torch.stack([(packed >> (4 * i)) & 15 for i in range(_LANES)], -1).flatten(-2)
    return ((lanes ^ 8) - 8).to(torch.int8)


def scale_words(scale: Tensor) -> Tensor:
    """float32 scales as int64 words, all bits kept: what ModelSlim writes, and int8 x int4 products read."""
    bits = scale.float().contiguous().view(torch.int32).to(torch.int64)
    return bits & (_WORD - 1)


def from_scale_words(words: Tensor) -> Tensor:
    """float32 scales of int64 words, those of `npu_trans_quant_param` (bit 46 set, 19 bits kept) included."""
    bits = words & (_WORD - 1)
    signed = torch.where(bits >= _WORD // 2, bits - _WORD, bits)
    return signed.to(torch.int32).view(torch.float32)


def converted_words(scale: Tensor) -> Tensor:
    """What `npu_trans_quant_param` makes of a scale: its upper 19 bits and bit 46."""
    return (scale_words(scale) & 0xFFFFE000) | _CONVERTED


def mx_pairs(scale: Tensor) -> Tensor:
    """E8M0 bytes [R, K/32] to pairs [R, ceil(K/64), 2]; an odd last block gets the byte 0 beside it."""
    padded = torch.nn.functional.pad(scale, (0, scale.shape[-1] % 2))
    return padded.reshape(*scale.shape[:-1], -1, 2).contiguous()


def from_mx_pairs(pairs: Tensor, blocks: int) -> Tensor:
    """The E8M0 bytes [R, blocks] of pairs."""
    return pairs.flatten(-2)[..., :blocks].contiguous()


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit codes [..., 2j] to bytes [..., j]; the first of two is the low nibble."""
    low, high = codes[..., 0::2].to(torch.uint8) & 15, codes[..., 1::2].to(torch.uint8) & 15
    return (low | (high << 4)).contiguous()


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 codes of `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
