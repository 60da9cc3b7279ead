"""What follows a library's product: scales, bias and the one rounding, in one pass over its fp32 sums."""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.bits import narrow, widen

ROWS, COLUMNS = 16, 256


@triton.jit
def finish_kernel(
    sums, a, b, bias, out, m, n, sums_row, out_row,
    A: tl.constexpr, B: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = round(((sums * a) * b) + bias); A, B: 1 if there is a scale for every row of an operand, 0 for all rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, across = row < m, column < n
    mask = inside[:, None] & across[None, :]
    y = tl.load(sums + row[:, None] * sums_row + column[None, :], mask=mask, other=0.0)
    if SCALED:
        y = y * widen(tl.load(a + row * A, mask=inside, other=0))[:, None]
        y = y * widen(tl.load(b + column * B, mask=across, other=0))[None, :]
    if BIAS:
        y = y + tl.load(bias + column, mask=across, other=0)[None, :]
    tl.store(out + row[:, None] * out_row + column[None, :], narrow(y, out.dtype.element_ty), mask=mask)
