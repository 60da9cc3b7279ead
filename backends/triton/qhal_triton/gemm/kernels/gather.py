"""Device code that puts the columns of x in the order of a weight's."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather(x, order, y, k, x_row, BLOCK: tl.constexpr):
    """y [.., k] of one row: y[j] = x[order[j]]."""
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < k
    at = tl.load(order + cols, mask=inside, other=0)
    tl.store(y + row * k + cols, tl.load(x + row * x_row + at, mask=inside), mask=inside)
