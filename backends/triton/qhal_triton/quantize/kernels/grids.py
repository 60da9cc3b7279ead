"""The kernels of `quantize`: over blocks, over rows too long for registers, over a tensor with one scale.

x is a matrix of rows with stride `stride` and `cols` contiguous columns; codes are contiguous. What is shared by all
blocks (a tensor's extremes) comes in parts of `PARTS` programs, down parts first, so no program waits for another.
"""

import triton
import triton.language as tl

from qhal_triton.bits import store, widen
from qhal_triton.quantize.kernels.blocks import (
    clean,
    codes_of,
    extremes,
    peak_of,
    range_of,
    scale_of,
    wide_scale,
    zero_of,
)


@triton.jit
def _joined(parts, low_kept, high_kept, PARTS: tl.constexpr, F: tl.constexpr):
    """(lo, hi) [1] of all parts."""
    at = tl.arange(0, PARTS)
    down = tl.max(tl.load(parts + at)[None, :], 1)
    up = tl.max(tl.load(parts + PARTS + at)[None, :], 1)
    return range_of(down, up, low_kept, high_kept, F)


@triton.jit
def _outer(outer, parts, low_kept, high_kept, PARTS: tl.constexpr, NB: tl.constexpr, F: tl.constexpr):
    """Number of the level above for NB blocks, given or computed; the first program stores what it computed."""
    same = tl.zeros([NB], tl.int32)
    if F.static:
        number = widen(tl.load(outer + same))
    else:
        at = tl.arange(0, PARTS)
        down = tl.max(tl.load(parts + at), 0) + same
        up = tl.max(tl.load(parts + PARTS + at), 0) + same
        lo, hi = range_of(down, up, low_kept, high_kept, F)
        LEVEL: tl.constexpr = F.outer
        number = wide_scale(peak_of(lo, hi, F), LEVEL)
        if tl.program_id(0) == 0:
            store(outer + same, number, tl.arange(0, NB) == 0)
    return number


@triton.jit
def block_kernel(
    x, codes, scale, zero, outer, parts, low_kept, high_kept, rows, cols, stride, across, count,
    ROWS: tl.constexpr, COLS: tl.constexpr, NB: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """NB blocks of ROWS x COLS elements in one pass, C of them (padded) in registers; COLS 0: a whole row.

    across: blocks beside each other; count: blocks in all. ROWS above 1 needs rows in whole bands of ROWS for a stack.
    """
    block = tl.program_id(0) * NB + tl.arange(0, NB)
    e = tl.arange(0, C)
    if COLS == 0:
        row, col = block[:, None], e[None, :]
        inside = (block < count)[:, None] & (col < cols)
    else:
        row = (block // across)[:, None] * ROWS
        col = (block % across)[:, None] * COLS
        if ROWS > 1:
            row += (e // COLS)[None, :]
            col += (e % COLS)[None, :]
        else:
            col += e[None, :]
        inside = (block < count)[:, None] & (e < ROWS * COLS)[None, :] & (col < cols) & (row < rows)
    row = row.to(tl.int64)
    v = clean(tl.load(x + row * stride + col, mask=inside, other=0.0), F)
    down, up = extremes(v, 1, F)
    lo, hi = range_of(down, up, low_kept, high_kept, F)
    number = lo
    if F.outer is not None:
        number = _outer(outer, parts, low_kept, high_kept, PARTS, NB, F)
    plane, s = scale_of(peak_of(lo, hi, F), number, F)
    store(scale + block, plane, block < count)
    z = lo
    if F.zero != "":
        plane, z = zero_of(lo, s, F)
        store(zero + block, plane, block < count)
    code = codes_of(v, s[:, None], z[:, None], lo[:, None], hi[:, None], F)
    store(codes + row * cols + col, code, inside)


@triton.jit
def long_kernel(
    x, codes, scale, zero, low_kept, high_kept, cols, stride, C: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """One row, C columns at a time, read twice."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, C)[None, :]
    down = tl.zeros([1], tl.int32)
    up = tl.zeros([1], tl.int32)
    for start in range(0, cols, C):
        col = start + e
        v = clean(tl.load(x + row * stride + col, mask=col < cols, other=0.0), F)
        some_down, some_up = extremes(v, 1, F)
        down = tl.maximum(down, some_down)
        up = tl.maximum(up, some_up)
    lo, hi = range_of(down, up, low_kept, high_kept, F)
    plane, s = scale_of(peak_of(lo, hi, F), lo, F)
    here = row + tl.arange(0, 1)
    store(scale + here, plane, here >= 0)
    z = lo
    if F.zero != "":
        plane, z = zero_of(lo, s, F)
        store(zero + here, plane, here >= 0)
    for start in range(0, cols, C):
        col = start + e
        v = clean(tl.load(x + row * stride + col, mask=col < cols, other=0.0), F)
        code = codes_of(v, s[:, None], z[:, None], lo[:, None], hi[:, None], F)
        store(codes + row * cols + col, code, col < cols)


@triton.jit
def _chunk(x, chunk, rows, cols, stride, beside, C: tl.constexpr, WIDTH: tl.constexpr):
    """(values, row, col, inside) [1, C] of one chunk: C / WIDTH rows of WIDTH columns, `beside` chunks in a band."""
    e = tl.arange(0, C)[None, :]
    row = ((chunk // beside) * (C // WIDTH) + e // WIDTH).to(tl.int64)
    col = (chunk % beside) * WIDTH + e % WIDTH
    inside = (row < rows) & (col < cols)
    return tl.load(x + row * stride + col, mask=inside, other=0.0), row, col, inside


@triton.jit
def part_kernel(
    x, parts, rows, cols, stride, beside, count,
    PARTS: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Extremes of every PARTS-th chunk; count: chunks in all."""
    down = tl.zeros([1], tl.int32)
    up = tl.zeros([1], tl.int32)
    for chunk in range(tl.program_id(0), count, PARTS):
        value, _, _, _ = _chunk(x, chunk, rows, cols, stride, beside, C, WIDTH)
        some_down, some_up = extremes(clean(value, F), 1, F)
        down = tl.maximum(down, some_down)
        up = tl.maximum(up, some_up)
    here = tl.program_id(0) + tl.arange(0, 1)
    tl.store(parts + here, down)
    tl.store(parts + PARTS + here, up)


@triton.jit
def tensor_kernel(
    x, codes, scale, zero, parts, low_kept, high_kept, rows, cols, stride, beside,
    PARTS: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """One chunk under the scale of the whole tensor: given, or from all parts."""
    chunk = tl.program_id(0)
    value, row, col, inside = _chunk(x, chunk, rows, cols, stride, beside, C, WIDTH)
    first = tl.arange(0, 1)
    lo = tl.zeros([1], tl.float32)
    hi = lo
    if not F.static or F.clamp:
        lo, hi = _joined(parts, low_kept, high_kept, PARTS, F)
    z = lo
    if F.static:
        s = widen(tl.load(scale + first))
        if F.zero != "":
            z = widen(tl.load(zero + first))
    else:
        plane, s = scale_of(peak_of(lo, hi, F), lo, F)
        if chunk == 0:
            store(scale + first, plane, first == 0)
        if F.zero != "":
            plane, z = zero_of(lo, s, F)
            if chunk == 0:
                store(zero + first, plane, first == 0)
    code = codes_of(clean(value, F), s[:, None], z[:, None], lo[:, None], hi[:, None], F)
    store(codes + row * cols + col, code, inside)
