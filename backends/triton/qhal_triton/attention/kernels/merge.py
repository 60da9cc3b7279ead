"""The parts of a row's keys together, in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.attention.kernels.attend import LOG2E
from qhal_triton.bits import narrow

_ANY = ["o_token", "o_head", "l_token", "l_head", "splits", "heads", "dim", "has_sinks", "has_lse"]


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=["sinks", "out", "lse"])
def merge(
    partial, partial_max, partial_sum, sinks, out, o_token, o_head, lse, l_token, l_head, splits, heads, dim,
    has_sinks, has_lse, COLS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One program for every (token, head) and COLS columns; a part that saw no key was never written nor is read."""
    at = tl.program_id(0).to(tl.int64)
    token, head = at // heads, at % heads
    part = tl.arange(0, ALL)
    tops = tl.load(partial_max + at * splits + part, mask=part < splits, other=float("-inf"))
    sums = tl.load(partial_sum + at * splits + part, mask=part < splits, other=0.0)
    top = tl.max(tops, 0)
    some = tl.max((sums != 0).to(tl.int32), 0) != 0
    one = tl.arange(0, 1)
    sink = tl.max(tl.load(sinks + head + one, mask=one < has_sinks, other=float("-inf")), 0) * LOG2E
    top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(tops - base)
    total = tl.sum(weight * sums, 0)
    total += tl.exp2(sink - base)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    here = (sums != 0)[:, None] & (cols < dim)[None, :]
    parts = tl.load(partial + (at * splits + part)[:, None] * dim + cols[None, :], mask=here, other=0.0)
    acc = tl.sum(parts * weight[:, None], 0)
    o = tl.where(some, acc / tl.where(some, total, 1.0), 0.0)
    tl.store(out + token * o_token + head * o_head + cols, narrow(o, out.dtype.element_ty), mask=cols < dim)
    log = tl.where(some, (base + tl.log2(total)) / LOG2E, float("-inf"))
    tl.store(lse + token * l_token + head * l_head + one, log + tl.zeros([1], tl.float32), mask=one < has_lse)
