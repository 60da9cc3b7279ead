"""Packing: small codes inside larger words, as files hold them, to one code per byte and back. Exact both ways.

Every packing is little endian: code 0 sits in the lowest bits. Nothing here knows a format; `lanes` moves the bits.
"""

from __future__ import annotations

from math import gcd

import numpy as np
import torch
from torch import Tensor

from qhal_schemes.compiled import loops
from qhal_schemes.lanes import (
    array,
    empty,
    part_size,
    spread_bytes,
    transpose,
    unpack_columns,
    unpack_fields,
    unpack_stream,
)

AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""AWQ's gemm order: logical column j of a run of eight sits in nibble AWQ_NIBBLES[j] (AutoAWQ, WQLinear_GEMM)."""


def words(count: int, bits: int, *, aligned: bool = False) -> int:
    """int32 words that `count` codes take: one dense bit stream, or (aligned) whole codes in every word."""
    return -(-count // (32 // bits)) if aligned else -(-count * bits // 32)


def unpack(packed: Tensor, bits: int, count: int, *, aligned: bool = False, negative: bool = False) -> Tensor:
    """Codes [..., count] from int32 [..., words(count, bits)]; 1 to 8 bits, of 8 a view where that is possible.

    dense     one bit stream, codes straddle words (3, 5, 6, 7 bits: 32 codes in `bits` words)
    aligned   32 // bits codes in every word, the top bits unused
    negative  int8 code = field - 2^(bits-1), else uint8
    """
    _, run = _run(bits, aligned)
    minus = 1 << (bits - 1) if negative else 0
    if bits == 8:
        codes = _bytes(packed)[..., :count]
        return codes.bitwise_xor(0x80).view(torch.int8) if negative else codes
    if 32 % bits == 0:
        codes = spread_bytes(_bytes(packed), bits, minus=minus)
    elif aligned:
        codes = unpack_fields(packed, bits, minus)
    else:
        short = -packed.shape[-1] % run
        codes = unpack_stream(torch.nn.functional.pad(packed, (0, short)) if short else packed, bits, minus)
    return codes[..., :count].contiguous()


def unpack_wide(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 codes [..., count] of 1 to 32 bits from int32 [..., words(count, bits)], one dense bit stream."""
    shared = gcd(32, bits)
    per_run, run, mask = 32 // shared, bits // shared, (1 << bits) - 1 if bits < 32 else -1
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % run))
    if packed.numel() % (2 * run) == 0:  # words are transposed quickly in even numbers
        per_run, run = 2 * per_run, 2 * run
    rows = transpose(packed.reshape(-1, run))  # word i of every run
    codes = torch.empty(per_run, rows.shape[1], dtype=torch.int32, device=packed.device)
    for j, value in enumerate(codes):
        word, shift = divmod(j * bits, 32)
        torch.bitwise_right_shift(rows[word], shift, out=value)  # arithmetic: the copies of the sign are masked away
        inside = 32 - shift
        if inside < bits:
            value.bitwise_and_((1 << inside) - 1).bitwise_or_(rows[word + 1] << inside)
    rows = transpose(codes.bitwise_and_(mask)).view(*packed.shape[:-1], packed.shape[-1] * 32 // bits)
    return rows[..., :count].contiguous()


def pack(codes: Tensor, bits: int, *, aligned: bool = False) -> Tensor:
    """int32 [..., words(count, bits)] from codes [..., count]; the inverse of `unpack`. Unused bits are zero."""
    count = codes.shape[-1]
    per_run, run = _run(bits, aligned)
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -count % per_run))
    lead = codes.shape[:-1]
    runs = codes.reshape(*lead, codes.shape[-1] // per_run, per_run)
    packed = torch.zeros(*runs.shape[:-1], run, dtype=torch.int64, device=codes.device)
    mask = (1 << bits) - 1
    for j in range(per_run):
        word, shift = divmod(j * bits, 32)
        value = runs[..., j].long() & mask
        packed[..., word] |= (value << shift) & 0xFFFFFFFF
        if 32 - shift < bits:
            packed[..., word + 1] |= value >> (32 - shift)
    return wrap(packed.reshape(*lead, -1)[..., : words(count, bits, aligned=aligned)])


def wrap(values: Tensor) -> Tensor:
    """int64 values modulo 2^32 as int32 bit patterns."""
    low = values & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32).contiguous()


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """uint8 fields code + 2^(bits-1) from int8 codes; the inverse of `unpack(negative=True)` field by field."""
    return (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def unpack_nibbles(packed: Tensor, *, high_first: bool = False) -> Tensor:
    """uint8 [..., 2n] from uint8 [..., n], even positions in the low nibble, or (high_first) in the high one."""
    return spread_bytes(packed, 4, high_first=high_first)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., n] from codes [..., 2n]; the inverse of `unpack_nibbles`."""
    return (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)


def unpack_int4(packed: Tensor, dim: int) -> Tensor:
    """int8 codes -8..7 from int8 or uint8 pairs along `dim`: even positions in the low nibble, two's complement."""
    dim = dim % packed.dim()
    if dim == packed.dim() - 1:
        return spread_bytes(packed.view(torch.uint8), 4, flip=8, minus=8)
    signed = packed.contiguous().view(torch.int8)
    codes = empty([n * 2 if axis == dim else n for axis, n in enumerate(packed.shape)], torch.int8, packed.device)
    if not packed.numel():
        return codes
    rows = packed.shape[: dim + 1].numel()
    pairs, runs = signed.view(rows, -1), codes.view(rows, 2, -1)
    if fast := loops("words", packed):
        fast.split(array(pairs), runs.view(torch.uint8).numpy(), signed=True)
        return codes
    step = max(part_size() // max(2 * pairs.shape[1], 1), 1)
    for source, target in zip(pairs.split(step), runs.split(step), strict=True):
        even, odd = target.unbind(1)
        torch.bitwise_left_shift(source, 4, out=even).bitwise_right_shift_(4)  # an arithmetic shift copies the sign
        torch.bitwise_right_shift(source, 4, out=odd)
    return codes


def pack_int4(codes: Tensor, dim: int) -> Tensor:
    """int8 pairs from codes -8..7; the inverse of `unpack_int4`. The axis is even."""
    low, high = torch.unbind(codes.to(torch.int8).view(torch.uint8).unflatten(dim, (-1, 2)), dim % codes.dim() + 1)
    return ((low & 15) | (high << 4)).view(torch.int8)


def unpack_awq(packed: Tensor) -> Tensor:
    """uint8 codes [N, K] from AWQ's int32 [K, N/8], nibbles in the order of AWQ_NIBBLES."""
    return unpack_columns(packed, paired=True)


def pack_order(codes: Tensor) -> Tensor:
    """int32 [..., n] from codes [..., 8n]; the inverse of `lanes.unpack_order`."""
    runs = codes.unflatten(-1, (-1, 8)).long() & 15
    packed = torch.zeros(runs.shape[:-1], dtype=torch.int64, device=codes.device)
    for j, nibble in enumerate(AWQ_NIBBLES):
        packed |= runs[..., j] << (4 * nibble)
    return wrap(packed)


def unpack_down(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 codes [N, count] from int32 [words(count, bits), N]: one dense bit stream down each column."""
    _, run = _run(bits, False)
    if bits == 8 or packed.shape[0] % run or not (fast := loops("columns", packed)):
        return unpack(transpose(packed), bits, count)
    codes = empty((packed.shape[1], packed.shape[0] * 32 // bits), torch.uint8, packed.device)
    fast.spread_down(array(packed, np.uint32).reshape(packed.shape), codes.numpy(), bits)
    return codes[:, :count].contiguous()


def pack_awq(codes: Tensor) -> Tensor:
    """AWQ's int32 [K, N/8] from codes [N, K]; the inverse of `unpack_awq`."""
    packed = torch.zeros(codes.shape[1], codes.shape[0] // 8, dtype=torch.int64, device=codes.device)
    for j, nibble in enumerate(AWQ_NIBBLES):
        packed |= (codes[j::8].t().long() & 15) << (4 * nibble)
    return wrap(packed)


def unpack_six(packed: Tensor) -> Tensor:
    """uint8 6-bit codes [..., 4n] from uint8 [..., 3n]: four codes in three bytes, little endian."""
    count = packed.shape[-1] // 3 * 4
    short = -packed.shape[-1] % 4
    packed = torch.nn.functional.pad(packed, (0, short)) if short else packed
    aligned = packed if packed.storage_offset() % 4 == 0 else packed.clone()  # a file aligns bytes to nothing
    return unpack(aligned.contiguous().view(torch.int32), 6, count)


def pack_six(codes: Tensor) -> Tensor:
    """uint8 [..., 3n] from 6-bit codes [..., 4n]; the inverse of `unpack_six`."""
    return pack(codes, 6).view(torch.uint8)[..., : codes.shape[-1] // 4 * 3].contiguous()


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """bool [..., count] from uint8 [..., ceil(count / 8)], bit i of byte j is position 8j + i."""
    return spread_bytes(packed, 1).view(torch.bool)[..., :count]


def _bytes(words: Tensor) -> Tensor:
    """uint8 [..., 4n] of int32 [..., n]. Flat between: an axis of one word counts as contiguous with any stride."""
    return words.contiguous().view(-1).view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1])


def _run(bits: int, aligned: bool) -> tuple[int, int]:
    """The pattern that repeats: codes and words."""
    if not 1 <= bits <= 8:
        raise ValueError(f"{bits} bits: codes have 1 to 8 bits")
    if aligned:
        return 32 // bits, 1
    shared = gcd(32, bits)
    return 32 // shared, bits // shared
