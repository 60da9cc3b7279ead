"""Pieces of a step of attention: products of parts, scales of rows, how P is held."""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.bits import dot, integer_code, minifloat_code, minifloat_value, narrow, widen
from qhal_triton.kv.kernels.decode import numbers, parts


@triton.jit
def product(a, a_rest, b, b_rest, acc, A: tl.constexpr, B: tl.constexpr):
    """acc + (a + a_rest) @ (b + b_rest); A and B say how many parts there are."""
    acc = dot(a, b, acc)
    if B == 2:
        acc = dot(a, b_rest, acc)
    if A == 2:
        acc = dot(a_rest, b, acc)
        if B == 2:
            acc = dot(a_rest, b_rest, acc)
    return acc


@triton.jit
def tanh(x):
    """Within 2^-22 of tanh x: a series where x is small, which keeps small numbers, else by exp."""
    square = x * x
    series = x + x * square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(square < 0.04, series, tl.where(x < 0, -far, far))


@triton.jit
def held(e, P: tl.constexpr, scale, DIVIDES: tl.constexpr, STATIC: tl.constexpr):
    """exp(s - max) as the request holds P: fp32 of the rounded number, or of the code under a static scale."""
    if STATIC:
        e = e * scale if DIVIDES else tl.div_rn(e, scale + tl.zeros_like(e))
    if P == "bf16":
        kept = widen(narrow(e, tl.bfloat16))
    elif P == "fp16":
        kept = widen(narrow(e, tl.float16))
    elif P == "e4m3fn":
        kept = tl.where(e != e, e, minifloat_value(minifloat_code(e, 4, 3, 7, 0x7E, 0x7F), 4, 3, 7))
    elif P == "e5m2":
        kept = tl.where(e != e, e, minifloat_value(minifloat_code(e, 5, 2, 15, 0x7B, 0x7F), 5, 2, 15))
    elif P == "int8":
        kept = tl.where(e != e, e, integer_code(e, -128, 127).to(tl.float32))
    elif P == "uint8":
        kept = tl.where(e != e, e, integer_code(e, 0, 255).to(tl.float32))
    else:
        tl.static_assert(P == "fp32", "how P is held")
        kept = e
    return kept


@triton.jit
def queries(q, at, scale, s_at, s_head, zero, outer, ok, ODD: tl.constexpr, STEP: tl.constexpr,
            R: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr,
            M: tl.constexpr):  # fmt: skip
    """Parts [M, COLS] of every STEP-th column of the query rows, from column ODD on."""
    cols = tl.arange(0, COLS) * STEP + ODD
    value = numbers(tl.load(q + at[:, None] + cols[None, :], mask=ok[:, None] & (cols < D)[None, :], other=0),
                    tl.constexpr(R.element))  # fmt: skip
    if R.zero != "":
        if R.kind == "row":
            z = numbers(tl.load(zero + s_at, mask=ok, other=0), tl.constexpr(R.zero))[:, None]
        elif R.kind == "head":
            z = numbers(tl.load(zero + s_head, mask=ok, other=0), tl.constexpr(R.zero))[:, None]
        else:
            z = numbers(tl.load(zero), tl.constexpr(R.zero))
        value = tl.where((cols < D)[None, :], value - z, 0.0)
    if R.kind == "group":
        s = numbers(tl.load(scale + s_at[:, None] + (cols // R.group)[None, :],
                            mask=ok[:, None] & (cols < D)[None, :], other=0), tl.constexpr(R.scale))  # fmt: skip
        if R.outer:
            s = s * tl.load(outer).to(tl.float32)
        value = tl.where((cols < D)[None, :], value * s, 0.0)
    return parts(value, PARTS, TYPE)


@triton.jit
def query_scale(scale, s_at, s_head, outer, ok, R: tl.constexpr, M: tl.constexpr):
    """fp32 [M]: what the products of a query row are multiplied by."""
    if R.kind == "row":
        s = numbers(tl.load(scale + s_at, mask=ok, other=1), tl.constexpr(R.scale))
        if R.outer:
            s = s * tl.load(outer).to(tl.float32)
    elif R.kind == "head":
        s = numbers(tl.load(scale + s_head, mask=ok, other=1), tl.constexpr(R.scale))
    elif R.kind == "tensor":
        s = tl.zeros([M], tl.float32) + numbers(tl.load(scale), tl.constexpr(R.scale))
    else:
        s = tl.full([M], 1.0, tl.float32)
    return 1.0 / s if R.divides else s


@triton.jit
def fixed_scale(scale, outer, R: tl.constexpr):
    """What all products with a head's rows are multiplied by: a static scale, or the outer level of a computed one."""
    s = 1.0
    if R.kind == "tensor" or R.kind == "head":
        s = numbers(tl.load(scale), tl.constexpr(R.scale))
        if R.divides:
            s = 1.0 / s
    if R.outer:
        s = s * tl.load(outer).to(tl.float32)
    return s


@triton.jit
def row_scale(scale, at, ok, R: tl.constexpr):
    """fp32 [ROWS]: what the products with each row are multiplied by."""
    s = numbers(tl.load(scale + at, mask=ok, other=1), tl.constexpr(R.scale))
    return 1.0 / s if R.divides else s


@triton.jit
def place(plane, page, first, slots, head, in_page, in_slot, in_head, ONE: tl.constexpr):
    """(pointer, offsets [ROWS]) of a head's rows at `slots` after slot `first` of their pages; ONE: of one page.

    What does not depend on the page is the same in every step, so that it leaves the loop.
    """
    to = plane + head.to(tl.int64) * in_head
    if ONE:
        to += page.to(tl.int64) * in_page + first * in_slot
        at = slots * in_slot
    else:
        at = page.to(tl.int64) * in_page + slots.to(tl.int64) * in_slot
    return to, at


@triton.jit
def visible(key, token, last, before, count, length, tree, ok, TREE: tl.constexpr):
    """[M, N]: which keys a row sees; tree: where the sequence's entries begin."""
    if TREE:
        new = key - (length - count)
        inside = (ok & (new >= 0))[None, :] & (token < count)[:, None]
        seen = tl.load(tree + token[:, None] * count + new[None, :], mask=inside, other=1) != 0
    else:
        seen = (key[None, :] <= last[:, None]) & (key[None, :] > before[:, None])
    return seen & ok[None, :]
