"""The rotation kernel: two matrix products with signs, in 16-bit operands and fp32 sums, exact to an fp32 rounding.

Every transform is scaled by a power of two so that its largest feature is below 2^15 / group: sums then fit fp16 and
never overflow. The first product has the features themselves as operand. Its fp32 sums enter the second as two fp16
numbers, the rounded one and what it lacks: 23 bits and a sign, an error of 2^-24 of each sum. Features below 2^-39 of
the largest one may vanish in that. Transforms share a tile but no number: one with NaN or Inf enters as zeros and
leaves as NaN.

One product of the features themselves needs none of that: signs times 1 / order keep its sums in fp32, and only a
transform with NaN or Inf has a sum that is none.
"""

import triton
import triton.language as tl

from qhal_triton.bits import dot, narrow, store, widen
from qhal_triton.quantize.kernels.blocks import clean, codes_of, extremes, peak_of, range_of, scale_of, zero_of


@triton.jit
def _halves(x):
    """fp32 as two fp16 numbers whose sum is x, up to 2^-24 of it."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def rotate_kernel(
    x, y, scale, zero, left, right, before, after, factor, units, across, tiles, stride, ystride,
    M: tl.constexpr, B: tl.constexpr, USED: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    LIFT: tl.constexpr, LEFT: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Tiles of M units; a unit is WIDTH features beside each other, `across` of them in a row, `units` in all.

    y: the result, or codes if F is a Recipe; then scale and zero are written too, one for BLOCK features.
    LIFT: minus the largest feature's exponent field, that of the scaling; of one product: the bits of its order.
    factor: 1 / sqrt(order).
    """
    m = tl.arange(0, M)
    c = tl.arange(0, B)
    PLAIN: tl.constexpr = not (LEFT or BEFORE)
    h = tl.load(right + c[:, None] * B + c[None, :])
    if PLAIN:
        h = narrow(widen(h) * 2.0**-LIFT, x.dtype.element_ty)
    if LEFT:
        g = tl.load(left + m[:, None] * M + m[None, :])
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        unit = tile * USED + m
        row = (unit // across).to(tl.int64)
        col = (unit % across)[:, None] * WIDTH + c[None, :]
        inside = ((m < USED) & (unit < units))[:, None] & (c < WIDTH)[None, :]
        loaded = tl.load(x + row[:, None] * stride + col, mask=inside, other=0.0)
        if PLAIN:
            z = dot(loaded, h, tl.zeros([M, B], tl.float32))
            z = tl.where(tl.abs(z) < float("inf"), (z * factor) * 2.0**LIFT, float("nan"))
        else:
            v = widen(loaded)
            if BEFORE:
                v *= tl.load(before + col, mask=inside, other=0.0)
            top = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
            if GROUP > 1:
                if USED == M:  # whole powers of two: as many transforms as the tile has groups
                    most = tl.max(tl.reshape(top, [M // GROUP, GROUP]), 1)
                    top = tl.reshape(tl.broadcast_to(most[:, None], [M // GROUP, GROUP]), [M])
                else:
                    of = m // GROUP
                    each = top
                    for i in tl.static_range(USED // GROUP):
                        top = tl.where(of == i, tl.max(tl.where(of == i, each, 0), 0), top)
            lost = top >= 0x7F800000
            field = tl.minimum(tl.maximum(LIFT - (top >> 23), 1), 253)
            up = (field << 23).to(tl.float32, bitcast=True)
            down = ((254 - field) << 23).to(tl.float32, bitcast=True)
            v = tl.where(lost[:, None], 0.0, v * up[:, None])
            if LEFT:
                if BEFORE:
                    high, low = _halves(v)
                    z = dot(g, low, dot(g, high, tl.zeros([M, B], tl.float32)))
                else:
                    z = dot(g, narrow(v, x.dtype.element_ty), tl.zeros([M, B], tl.float32))
                high, low = _halves(z)
                z = dot(low, h, dot(high, h, tl.zeros([M, B], tl.float32)))
            else:
                high, low = _halves(v)
                z = dot(low, h, dot(high, h, tl.zeros([M, B], tl.float32)))
            z = (z * factor) * down[:, None]
            z = tl.where(lost[:, None], float("nan"), z)
        if AFTER:
            z *= tl.load(after + col, mask=inside, other=0.0)
        z = narrow(z, x.dtype.element_ty)
        here = row[:, None] * ystride + col
        if F is None:
            tl.store(y + here, z, mask=inside)
        else:
            q = tl.reshape(clean(tl.where(inside, widen(z), 0.0), F), [M * B // BLOCK, BLOCK])
            block = tile * (M * B // BLOCK) + tl.arange(0, M * B // BLOCK)
            known = block < units * WIDTH // BLOCK
            lowest, highest = extremes(q, 1, F)
            lo, hi = range_of(lowest, highest, 1.0, 1.0, F)
            plane, s = scale_of(peak_of(lo, hi, F), lo, F)
            store(scale + block, plane, known)
            origin = lo
            if F.zero != "":
                plane, origin = zero_of(lo, s, F)
                store(zero + block, plane, known)
            code = codes_of(q, s[:, None], origin[:, None], lo[:, None], hi[:, None], F)
            store(y + here, tl.reshape(code, [M, B]), inside)
