"""Device code of the general rotation: features times small matrices, operands and sums in fp32, never fewer bits.

Every kernel reads features of any float type, multiplies them by `before` in fp32 first and the result by `after`
last, and rounds once to the type of y. Sums run over all of a unit, so NaN and Inf reach nothing but it. Runs of BK are
summed for themselves, times `factor`, so that an error grows with BK + width / BK additions, not with width.
"""

import triton
import triton.language as tl

from qhal_triton.bits import dot, narrow, widen


@triton.jit
def scale_kernel(x, y, values, n, stride, ystride, BLOCK: tl.constexpr):
    """y = x * values: a row by a block of features."""
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < n
    v = widen(tl.load(x + row * stride + col, mask=inside)) * widen(tl.load(values + col, mask=inside))
    tl.store(y + row * ystride + col, narrow(v, y.dtype.element_ty), mask=inside)


@triton.jit
def right_kernel(
    x, y, table, before, after, factor, units, across, width, stride, ystride,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Every unit of `width` neighbours, `across` of them in a row, times table [width, width]: BM units, BN results."""
    unit, new = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    row, base = (unit // across).to(tl.int64), (unit % across) * width
    known, made = unit < units, new < width
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, width, BK):
        old = start + tl.arange(0, BK)
        here = known[:, None] & (old < width)[None, :]
        v = widen(tl.load(x + row[:, None] * stride + base[:, None] + old[None, :], mask=here, other=0.0))
        if BEFORE:
            v *= widen(tl.load(before + base[:, None] + old[None, :], mask=here, other=0.0))
        t = tl.load(table + old[:, None] * width + new[None, :], mask=(old < width)[:, None] & made[None, :], other=0.0)
        total += dot(v, widen(t), tl.zeros((BM, BN), tl.float32)) * factor
    place, inside = base[:, None] + new[None, :], known[:, None] & made[None, :]
    if AFTER:
        total *= widen(tl.load(after + place, mask=inside, other=0.0))
    tl.store(y + row[:, None] * ystride + place, narrow(total, y.dtype.element_ty), mask=inside)


@triton.jit
def left_kernel(
    x, y, table, before, after, factor, across, height, width, stride, ystride,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Every unit, seen as [height, width], times table [height, height] from the left, transposed: BM by BN results."""
    unit = tl.program_id(0)
    row, base = (unit // across).to(tl.int64), (unit % across) * height * width
    new, col = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, height, BK):
        old = start + tl.arange(0, BK)
        here = (old < height)[:, None] & (col < width)[None, :]
        place = base + old[:, None] * width + col[None, :]
        v = widen(tl.load(x + row * stride + place, mask=here, other=0.0))
        if BEFORE:
            v *= widen(tl.load(before + place, mask=here, other=0.0))
        known = (new < height)[:, None] & (old < height)[None, :]
        t = tl.load(table + old[None, :] * height + new[:, None], mask=known, other=0.0)
        total += dot(widen(t), v, tl.zeros((BM, BN), tl.float32)) * factor
    place, inside = base + new[:, None] * width + col[None, :], (new < height)[:, None] & (col < width)[None, :]
    if AFTER:
        total *= widen(tl.load(after + place, mask=inside, other=0.0))
    tl.store(y + row * ystride + place, narrow(total, y.dtype.element_ty), mask=inside)
