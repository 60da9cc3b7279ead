"""The weight layout of humming 0.1.19 for 16-bit activations on sm_90, written in torch, and its exact inverse.

A weight [N, K] is cut into 64 rows x 16 columns. In such a tile each of 32 threads holds 32 codes: thread 4 r + c has
rows r, r + 8, ..., r + 56 and in each of them columns 2 c, 2 c + 1, 2 c + 8, 2 c + 9. Its codes are dealt to the slots
of `bits` words, P = 2, 4 or 8 bits a slot; where a slot is wider than a code, the next code's high bits fill its top.
Read from `weight_repack_nk` and `transform_humming_weight_scale` of the package; `tests/test_cuda_humming.py` checks
both directions, `tests/test_cuda_on_gpu.py` the library's own words against these where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS, COLUMNS = 64, 16
_PART = 1 << 22  # codes that are turned at a time: their int32 temporaries stay far below a layer


def padded(bits: int) -> int:
    """Bits of a slot: the next power of two."""
    return 1 << (bits - 1).bit_length()


def pack(codes: Tensor, bits: int, unsigned: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """uint8 codes [N, K] below 2**bits to int32 words [K / 16, N * bits / 2]; N in 64s, K in 16s.

    unsigned  makes such codes of a few rows of others
    """
    n, k = codes.shape
    words = torch.empty(k // COLUMNS, n * bits // 2, dtype=torch.int32, device=codes.device)
    for first in range(0, n, _rows(k)):
        part = codes[first : first + _rows(k)]
        part = part if unsigned is None else unsigned(part)
        tiles = part.reshape(-1, 4, 2, 8, k // COLUMNS, 2, 4, 2)  # n64, n16, n8, r, k16, k8, c, pair
        threads = tiles.permute(4, 0, 3, 6, 1, 2, 5, 7).reshape(k // COLUMNS, -1, 32)
        words[:, first * bits // 2 : (first + len(part)) * bits // 2] = _words(threads, bits).flatten(1)
    return words


def unpack(words: Tensor, bits: int) -> Tensor:
    """The codes [N, K], uint8, that `pack` was given."""
    k, n = words.shape[0] * COLUMNS, words.shape[1] * 2 // bits
    codes = torch.empty(n, k, dtype=torch.uint8, device=words.device)
    for first in range(0, n, _rows(k)):
        last = min(first + _rows(k), n)
        part = words[:, first * bits // 2 : last * bits // 2].reshape(k // COLUMNS, -1, bits)
        threads = _codes(part, bits).reshape(k // COLUMNS, -1, 8, 4, 4, 2, 2, 2)
        codes[first:last] = threads.permute(1, 4, 5, 2, 0, 6, 3, 7).reshape(last - first, k)
    return codes


def grid(plane: Tensor) -> Tensor:
    """Scales [N, G] to [G, N], every 64 rows with their 8 x 8 turned."""
    turned = plane.reshape(-1, 8, 8, plane.shape[1]).transpose(1, 2)
    return turned.reshape(plane.shape).t().contiguous()


def ungrid(plane: Tensor) -> Tensor:
    """The scales [N, G] that `grid` was given: turning twice is nothing."""
    return plane.t().reshape(-1, 8, 8, plane.shape[0]).transpose(1, 2).reshape(plane.shape[1], plane.shape[0])


def zeros(plane: Tensor, bits: int) -> Tensor:
    """uint8 zero points [N, G] to int32 [G, N * b / 32] of b = 4 bits each, or 8 above four."""
    turned = grid(plane)
    if bits <= 4:
        turned = turned[:, ::2] | (turned[:, 1::2] << 4)
    return turned.contiguous().view(torch.int32)


def unzeros(words: Tensor, bits: int) -> Tensor:
    """The zero points [N, G] that `zeros` was given."""
    turned = words.contiguous().view(torch.uint8)
    if bits <= 4:
        turned = torch.stack([turned & 15, turned >> 4], -1).flatten(1)
    return ungrid(turned)


def _rows(k: int) -> int:
    return max(_PART // k // ROWS, 1) * ROWS


def _words(values: Tensor, bits: int) -> Tensor:
    """[..., 32] codes of a thread to [..., bits] int32 words."""
    slot = padded(bits)
    per = 32 // slot
    # position p of a word holds code 2 p, then 2 p + 1 in its second half
    dealt = values.reshape(*values.shape[:-1], slot, per // 2, 2).transpose(-1, -2).flatten(-2)
    fields = dealt.to(torch.int32) if bits == slot else _fill(dealt.to(torch.int32), bits, slot)
    word = torch.zeros(fields.shape[:-1], dtype=torch.int32, device=values.device)
    for p in range(per):
        word |= fields[..., p] << (p * slot)
    return word


def _codes(words: Tensor, bits: int) -> Tensor:
    """[..., bits] int32 words to the 32 codes of a thread."""
    slot = padded(bits)
    per, mask = 32 // slot, (1 << slot) - 1
    fields = torch.stack([(words >> (p * slot)) & mask for p in range(per)], -1)
    dealt = fields if bits == slot else _drain(fields, bits, slot)
    half = dealt.reshape(*dealt.shape[:-1], 2, per // 2)
    return half.transpose(-1, -2).flatten(-3).to(torch.uint8)


def _cuts(bits: int, slot: int) -> list[tuple[int, int, int]]:
    """(field, bits already in it, code) of every piece of a code, low pieces first: codes fill fields from the bottom;
    one that does not fit leaves its high bits at the top and begins the next field with its low ones."""
    cuts, field, used = [], 0, 0
    for code in range(slot):
        room = slot - used
        if room >= bits:
            cuts.append((field, used, code))
            used += bits
        else:
            cuts.append((field, used, code))
            field, used = field + 1, bits - room
        if used == slot:
            field, used = field + 1, 0
    return cuts


def _fill(values: Tensor, bits: int, slot: int) -> Tensor:
    """[..., slot, per] codes to [..., bits, per] full fields."""
    fields = torch.zeros(*values.shape[:-2], bits, values.shape[-1], dtype=torch.int32, device=values.device)
    for field, used, code in _cuts(bits, slot):
        value, room = values[..., code, :], slot - used
        if room >= bits:
            fields[..., field, :] |= value << used
        else:
            if room:
                fields[..., field, :] |= (value >> (bits - room)) << used
            fields[..., field + 1, :] |= value & ((1 << (bits - room)) - 1)
    return fields


def _drain(fields: Tensor, bits: int, slot: int) -> Tensor:
    """[..., bits, per] fields back to [..., slot, per] codes."""
    codes = []
    for field, used, _ in _cuts(bits, slot):
        room, f = slot - used, fields[..., field, :]
        if room >= bits:
            codes.append((f >> used) & ((1 << bits) - 1))
        else:
            high = (f >> used) & ((1 << room) - 1)
            codes.append((high << (bits - room)) | (fields[..., field + 1, :] & ((1 << (bits - room)) - 1)))
    return torch.stack(codes, -2)
