"""Lanes: packed codes spread to one per byte inside wide integers, and words or bytes transposed, at memory speed.

Nothing here knows a format, and no bit changes. What counts is how often a byte moves: a part of a tensor stays in the
cache until it is done, scratch is used again, and results lie in memory that the system hands out in large pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qhal_schemes.compiled import loops

STEP = 1 << 20
"""Bytes of codes of a part for each thread. Half of it would fit a smaller cache and cost twice the calls."""

LINE = 64
"""Bytes of a line of the cache."""

_LANE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor for results, at the start of a line of the cache.

    numpy asks for huge pages where torch does not: a page fault for 2 MB, not for 4 KB. Only torch aligns to lines.
    """
    if device.type != "cpu" or 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    raw = np.empty(nbytes + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return torch.from_numpy(raw[start : start + nbytes]).view(dtype).view(*shape)


def spread_bytes(packed: Tensor, bits: int, *, flip: int = 0, minus: int = 0, high_first: bool = False) -> Tensor:
    """Codes [..., 8n / bits] from uint8 [..., n], of 1, 2 or 4 bits, the lowest first: (field ^ flip) - minus.

    uint8, or int8 where something is subtracted. high_first: two fields of 4 bits, the upper one first.
    """
    fields = 8 // bits
    flips = sum(flip << at for at in range(0, 8, bits))
    codes = empty((*packed.shape[:-1], packed.shape[-1] * fields), torch.uint8, packed.device)
    if fast := loops("words", packed):
        order = "high" if high_first else ""
        fast.spread(array(packed), array(codes), bits, flip=flip, minus=minus, order=order)
        return codes.view(torch.int8) if minus else codes
    for source, target, scratch in _parts(packed.contiguous().view(-1), codes.view(-1).view(_LANE[fields])):
        target.copy_(source.bitwise_xor(flips) if flips else source)
        if high_first:  # 16 h + l becomes h + 256 l = 256 (16 h + l) - 4095 h
            upper = torch.bitwise_right_shift(target, 4, out=scratch)
            target.mul_(256).sub_(upper, alpha=4095)
        else:
            spread(target, fields, bits, scratch)
        if minus:
            target.view(torch.int8).sub_(minus)
    return codes.view(torch.int8) if minus else codes


def spread(lanes: Tensor, fields: int, bits: int, scratch: Tensor) -> None:
    """In place: the `fields` fields of `bits` bits at the bottom of each integer become its bytes, in halving runs.

    There are zeros above the fields. One halving is one shift and one addition: low + upper * 2^hb becomes
    low + upper * 2^8h, and then the halves are lanes of their own. scratch is as large as the lanes.
    """
    while fields > 1:
        half = fields // 2
        upper = torch.bitwise_right_shift(lanes, half * bits, out=scratch)
        lanes.add_(upper, alpha=(1 << 8 * half) - (1 << half * bits))
        fields = half
        lanes, scratch = lanes.view(_LANE[fields]), scratch.view(_LANE[fields])


def unpack_stream(packed: Tensor, bits: int, minus: int = 0) -> Tensor:
    """Codes [..., 32n / bits] from a dense bit stream int32 [..., n] of 3, 5, 6 or 7 bits, n whole runs; less `minus`.

    A run is the shortest pattern of whole words and codes. Word i of many runs makes one row, and so do four codes of
    every run: a few shifts of rows cut out the lanes, and two transpositions lead from words to rows and back to codes.
    """
    codes = empty((*packed.shape[:-1], packed.shape[-1] * 32 // bits), torch.uint8, packed.device)
    if fast := loops("words", packed):
        fast.spread(array(packed), array(codes), bits, minus=minus)
        return codes.view(torch.int8) if minus else codes
    run = {3: 3, 5: 5, 6: 3, 7: 7}[bits]
    run = run * 2 if packed.numel() % (2 * run) == 0 else run  # words are transposed in even numbers
    fours = 8 * run // bits
    for source, target, scratch in _parts(packed.reshape(-1, run), codes.view(-1).view(torch.int32).view(-1, fours)):
        rows, lanes = transpose(source), torch.empty_like(scratch).view(fours, -1)
        for i, lane in enumerate(lanes):
            word, shift = divmod(4 * bits * i, 32)
            torch.bitwise_right_shift(rows[word], shift, out=lane)
            if shift + 4 * bits > 32:
                lane.bitwise_and_((1 << (32 - shift)) - 1).add_(rows[word + 1], alpha=1 << (32 - shift))
        spread(lanes.bitwise_and_((1 << 4 * bits) - 1), 4, bits, scratch.view(fours, -1))
        if minus:
            lanes.view(torch.int8).sub_(minus)
        target.copy_(transpose(lanes))
    return codes.view(torch.int8) if minus else codes


def unpack_fields(packed: Tensor, bits: int, minus: int = 0) -> Tensor:
    """Codes [..., n * (32 // bits)] from int32 [..., n] of whole codes each, the upper bits unused; less `minus`."""
    fields = 32 // bits
    codes = empty((*packed.shape[:-1], packed.shape[-1] * fields), torch.uint8, packed.device)
    if fast := loops("words", packed):
        fast.cut(array(packed, np.uint32), array(codes), bits, minus)
        return codes.view(torch.int8) if minus else codes
    for source, target, scratch in _parts(packed.reshape(-1), codes.view(-1, fields)):
        rows, shifted = scratch.view(fields, -1), torch.empty_like(source)
        for j, row in enumerate(rows):
            row.copy_(torch.bitwise_right_shift(source, j * bits, out=shifted))
        rows.bitwise_and_((1 << bits) - 1)
        target.copy_(turn(rows.sub_(minus) if minus else rows))  # modulo 256
    return codes.view(torch.int8) if minus else codes


def unpack_columns(packed: Tensor, *, paired: bool, negative: bool = False) -> Tensor:
    """Codes [N, K] from int32 [K, N/8], eight columns in a word. uint8, or (negative) int8 in two's complement.

    paired: nibbles stand in the order 0, 2, 4, 6, 1, 3, 5, 7 of their columns; otherwise in their own.
    """
    columns, rows = packed.shape
    dtype = torch.int8 if negative else torch.uint8
    codes = empty((rows, 8, columns), dtype, packed.device)
    if fast := loops("columns", packed):
        words, there = array(packed, np.uint32).reshape(columns, rows), array(codes).reshape(rows, 8, columns)
        fast.split_columns(words, there, paired=paired, signed=negative)
        return codes.view(rows * 8, columns)
    turned = transpose(packed).view(dtype).view(rows, columns, 4)
    step = max(part_size() // (8 * columns or 1), 1)
    for source, target in zip(turned.split(step), codes.split(step), strict=True):
        _nibbles(source, target, paired)
    return codes.view(rows * 8, columns)


def unpack_order(packed: Tensor, *, negative: bool = False) -> Tensor:
    """Codes [..., 8n] from int32 [..., n], nibbles in the order 0, 2, 4, 6, 1, 3, 5, 7. Dtypes as `unpack_columns`."""
    dtype = torch.int8 if negative else torch.uint8
    codes, flip = empty((*packed.shape, 2), torch.int32, packed.device), 8 if negative else 0
    if fast := loops("words", packed):
        fast.spread(array(packed, np.uint32), array(codes), 4, flip=flip, minus=flip, order="paired")
        return codes.view(dtype).flatten(-2)
    for source, target, scratch in _parts(packed.reshape(-1), codes.view(-1, 2)):
        rows = scratch.view(-1).view(dtype).view(1, 8, -1)
        _nibbles(source.view(dtype).view(1, -1, 4), rows, paired=True)
        fours = turn(rows.view(2, 4, -1)).view(2, -1)  # four rows to the bytes of one word, twice
        target.copy_(transpose(fours.view(torch.int32)))
    return codes.view(dtype).flatten(-2)


def turn(stack: Tensor) -> Tensor:
    """[..., N, M] contiguous from [..., M, N], bytes or words that look like float32.

    torch copies a transposed matrix an element at a time. To shuffle the channels of images of one pixel is the same
    permutation, and there it moves vectors of uint8 or of float32, as they are.
    """
    *lead, m, n = stack.shape
    if not stack.numel():
        return stack.transpose(-2, -1).contiguous()
    images, channels = stack.numel() // (m * n), m * n
    flat = stack.contiguous().view(torch.uint8 if stack.dtype == torch.int8 else stack.dtype).view(-1)
    images_last = flat.view(images, 1, 1, channels).permute(0, 3, 1, 2)
    turned = torch.channel_shuffle(images_last, m).permute(0, 2, 3, 1)
    return turned.reshape(*lead, n, m).view(stack.dtype)


def transpose(matrix: Tensor) -> Tensor:
    """[N, M] contiguous from [M, N], of any dtype."""
    m, n = matrix.shape
    size = matrix.element_size()
    if size == 1 and n % 4 == 0 and (fast := loops("columns", matrix)):
        turned = empty((n, m), matrix.dtype, matrix.device)
        fast.turn_bytes(array(matrix).reshape(m, n), array(turned).reshape(n, m))
        return turned
    if size <= 4 and (fast := loops("turning", matrix)):
        turned, kind = empty((n, m), matrix.dtype, matrix.device), {1: np.uint8, 2: np.uint16, 4: np.uint32}[size]
        fast.turn(array(matrix, kind).reshape(m, n), array(turned, kind).reshape(n, m))
        return turned
    if size == 1:
        return transpose_bytes(matrix.view(torch.uint8)).view(matrix.dtype)
    if size == 4:
        return turn(matrix.contiguous().view(torch.float32)).view(matrix.dtype)
    return matrix.t().clone(memory_format=torch.contiguous_format)  # one row alone counts as contiguous already


def interleave(columns: Sequence[Tensor]) -> Tensor:
    """int32 [..., C] contiguous from C tensors int32 [...]: `torch.stack` along a new last axis."""
    return transpose(torch.stack([column.flatten() for column in columns])).view(*columns[0].shape, len(columns))


def transpose_bytes(codes: Tensor) -> Tensor:
    """[N, M] contiguous from uint8 or int8 [M, N]: four columns at a time as words, then the bytes of each word."""
    m, n = codes.shape
    codes = codes.contiguous()
    if n % 4:
        return turn(codes)
    codes = codes if codes.storage_offset() % 4 == 0 else codes.clone()  # a file aligns bytes to nothing
    return turn(transpose(codes.view(torch.int32)).view(codes.dtype).view(n // 4, m, 4)).view(n, m)


def _nibbles(words: Tensor, rows: Tensor, paired: bool) -> None:
    """Fill rows [l, 8, k] from words [l, k, 4 bytes], uint8, or int8 for codes in two's complement."""
    pairs = turn(words).unflatten(1, (2, 2))
    eights = rows.unflatten(1, (2, 2, 2))
    low, high = (eights[:, :, i].transpose(1, 2) if paired else eights[:, :, :, i] for i in (0, 1))
    torch.bitwise_right_shift(pairs, 4, out=high)
    if rows.dtype == torch.int8:
        pairs = torch.bitwise_left_shift(pairs, 4).bitwise_right_shift_(4)
        low.copy_(pairs)
    else:
        torch.bitwise_and(pairs, 15, out=low)


def row_sums(codes: Tensor, *, magnitudes: bool = False) -> Tensor:
    """float64 sums of integer codes [n, ..., k], or of their magnitudes, along the last axis; exact.

    Up to 2^17 columns every partial sum of int8 is an integer that float32 holds.
    """
    sums = torch.empty(codes.shape[:-1], dtype=torch.float64, device=codes.device)
    if codes.dtype == torch.int8 and (fast := loops("sums", codes)):
        rows = array(codes, np.int8).reshape(sums.numel(), codes.shape[-1])
        fast.row_sums(rows, sums.view(-1).numpy(), magnitudes)
        return sums
    step = max(part_size() * len(codes) // (4 * codes.numel() or 1), 1)
    for part, target in zip(codes.split(step), sums.split(step), strict=True):
        numbers = part.to(torch.float32 if codes.shape[-1] <= 1 << 17 else torch.float64)
        target.copy_((numbers.abs_() if magnitudes else numbers).sum(-1))
    return sums


def array(t: Tensor, dtype: type[np.generic] = np.uint8) -> np.ndarray[Any, Any]:
    """Its bytes as a flat array, for the compiled loops; a copy where it is not contiguous or words are not aligned."""
    found: np.ndarray[Any, Any] = t.contiguous().view(-1).view(torch.uint8).numpy().view(dtype)
    return found if found.flags.aligned else found.copy()


def part_size() -> int:
    """Bytes of codes of a part, for all threads together."""
    return STEP * torch.get_num_threads()


def _parts(packed: Tensor, lanes: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Parts of both along their first axis, and scratch as large as those of the lanes, the same for every part."""
    step = max(part_size() * len(lanes) // max(lanes.nbytes, 1), 1)
    scratch = torch.empty_like(lanes[:step])
    for source, target in zip(packed.split(step), lanes.split(step), strict=True):
        yield source, target, scratch[: len(target)]
