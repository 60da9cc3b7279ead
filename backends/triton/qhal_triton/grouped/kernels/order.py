"""Device code that sorts pairs of tokens and experts by expert, without a look at the host."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order(ids, starts, sorted_pairs, pairs, experts, BLOCK: tl.constexpr):
    """Program e writes where expert e starts and the pairs of its own, in rising order.

    ids int32 or int64 [pairs]; program `experts` takes the pairs of no expert, so `sorted_pairs` is a permutation.
    """
    e = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, pairs, BLOCK):
        inside = first + lanes < pairs
        at = tl.load(ids + first + lanes, mask=inside, other=-1).to(tl.int32)
        at = tl.where((at < 0) | (at > experts), experts, at)
        before += (inside & (at < e)).to(tl.int32)
    start = tl.sum(before, 0)
    tl.store(starts + e, start)
    for first in range(0, pairs, BLOCK):
        inside = first + lanes < pairs
        at = tl.load(ids + first + lanes, mask=inside, other=-1).to(tl.int32)
        at = tl.where((at < 0) | (at > experts), experts, at)
        mine = (inside & (at == e)).to(tl.int32)
        tl.store(sorted_pairs + start + tl.cumsum(mine, 0) - 1, first + lanes, mask=mine > 0)
        start += tl.sum(mine, 0)
