"""Device code after a product: sums of parts, the function between two products, a token's weighted sum."""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.bits import narrow


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) in fp32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def acted(g, NAME: tl.constexpr, alpha, limit, LIMITED: tl.constexpr):
    """The activation of fp32 g; see `qhal.layer_formats.Activation`. NaN stays NaN."""
    if NAME == "gelu":
        value = g * 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # 1 + tanh(u) = 2 sigmoid(2 u)
        value = g * sigmoid(1.5957691216057308 * (g + 0.044715 * (g * g * g)))
    elif NAME == "relu2":
        r = tl.where(g < 0.0, 0.0, g)
        value = r * r
    elif NAME == "swiglu":
        if LIMITED:
            g = tl.where(g > limit, limit, g)
        value = g * sigmoid(alpha * g)
    else:
        value = g * sigmoid(g)
    return value


@triton.jit
def part_sum(part, at, inside, part_stride, PARTS: tl.constexpr):
    """fp32 sum of the parts of a product, in their order."""
    total = tl.load(part + at, mask=inside, other=0.0)
    for _ in tl.static_range(1, PARTS):
        at += part_stride  # int64: parts of many rows are far away
        total += tl.load(part + at, mask=inside, other=0.0)
    return total


@triton.jit
def finish(
    part, y, weights, ids, part_stride, n, width, y_row, alpha, limit, shift,
    PARTS: tl.constexpr, TOP: tl.constexpr, WEIGHTED: tl.constexpr, NAME: tl.constexpr, GATED: tl.constexpr,
    LIMITED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [rows, width]: one row per program from TOP rows of part [PARTS, rows * TOP, n]; fp32, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(TOP):
        at = (row * TOP + j) * n + cols
        value = part_sum(part, at, inside, part_stride, PARTS)
        if NAME != "":
            value = acted(value, NAME, alpha, limit, LIMITED)
            if GATED:
                up = part_sum(part, at + width, inside, part_stride, PARTS)
                if NAME == "swiglu":
                    if LIMITED:
                        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
                    up += shift
                value = value * up
        if WEIGHTED:
            share = tl.load(weights + row * TOP + j).to(tl.float32)
            value = value * tl.where(tl.load(ids + row * TOP + j) < 0, 0.0, share)
        total += value
    tl.store(y + row * y_row + cols, narrow(total, y.dtype.element_ty), mask=inside)
