"""Codebook weights to dense rows: entries are gathered, summed in fp32 in the order of the books, rounded once."""

import triton
import triton.language as tl

from qhal_triton.bits import narrow, widen


@triton.jit
def decode_kernel(
    codes, out, table0, table1, table2, table3, scale, permutation, column_scale, column_bias,
    first, last, start, count, vectors, columns, before, ostride, per,
    A: tl.constexpr, B: tl.constexpr, BOOKS: tl.constexpr, DIVISORS: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
    SCALE: tl.constexpr, PERMUTED: tl.constexpr, COLUMN_SCALE: tl.constexpr, COLUMN_BIAS: tl.constexpr,
):  # fmt: skip
    """P vectors of one segment, E (padded) elements of each, into rows first:last of the weight.

    start, count: vectors that touch these rows, `vectors` in each line; before: columns of earlier segments; per: rows
    that share a scale.
    """
    at = tl.program_id(0) * P + tl.arange(0, P)
    vector = start + at
    e = tl.arange(0, E)[None, :]
    row = (vector // vectors)[:, None] * A + e // B
    column = before + (vector % vectors)[:, None] * B + e % B
    inside = (at < count)[:, None] & (e < A * B) & (row >= first) & (row < last) & (column < columns)
    known = at < count
    w = tl.zeros([P, E], tl.float32)
    for book in tl.static_range(BOOKS):
        code = tl.load(codes + vector.to(tl.int64) * BOOKS + book, mask=known, other=0)
        table = table0 if book == 0 else table1 if book == 1 else table2 if book == 2 else table3
        entry = widen(tl.load(table + code[:, None] * (A * B) + e, mask=inside, other=0.0))
        if DIVISORS[book] != 1:
            entry = tl.div_rn(entry, tl.full(entry.shape, DIVISORS[book], tl.float32))
        w = entry if book == 0 else w + entry
    if SCALE:
        w *= widen(tl.load(scale + row // per, mask=inside, other=0.0))
    if PERMUTED:
        column = tl.load(permutation + column, mask=inside, other=0).to(tl.int32)
    if COLUMN_SCALE:
        w *= widen(tl.load(column_scale + column, mask=inside, other=0.0))
    if COLUMN_BIAS:
        w += widen(tl.load(column_bias + column, mask=inside, other=0.0))
    here = (row - first).to(tl.int64) * ostride + column
    tl.store(out + here, narrow(w, out.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    x, codes, y, table0, table1, table2, table3, scale, bias, rows, n, vectors, columns, xstride, per,
    M: tl.constexpr, B: tl.constexpr, BOOKS: tl.constexpr, DIVISORS: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y [rows <= M, n] = x @ W.T for vectors of one row and B columns: each entry is gathered once, for all rows of x.

    Weights are fp32 sums of entries, products and sums fp32; the scale of a row multiplies its sum.
    """
    out = tl.program_id(0) * BN + tl.arange(0, BN)
    known = out < n
    e = tl.arange(0, B)
    m = tl.arange(0, M)
    sums = tl.zeros([BN, BV, M], tl.float32)  # joined after the loop: inside, threads have nothing to say to others
    for start in range(0, vectors, BV):
        v = start + tl.arange(0, BV)
        here = known[:, None] & (v < vectors)[None, :]
        place = out.to(tl.int64)[:, None] * vectors + v[None, :]
        # of every row of the weight, though it is the same: so it is read where the entry is
        column = tl.zeros([BN, BV, B], tl.int32) + (v[:, None] * B + e[None, :])[None, :, :]
        w = tl.zeros([BN, BV, B], tl.float32)
        for book in tl.static_range(BOOKS):
            code = tl.load(codes + place * BOOKS + book, mask=here, other=0)
            table = table0 if book == 0 else table1 if book == 1 else table2 if book == 2 else table3
            entry = widen(tl.load(table + code[:, :, None] * B + e[None, None, :], mask=here[:, :, None], other=0.0))
            if DIVISORS[book] != 1:
                entry = tl.div_rn(entry, tl.full(entry.shape, DIVISORS[book], tl.float32))
            w = entry if book == 0 else w + entry
        for row in tl.static_range(M):
            some = widen(
                tl.load(x + row * xstride + column, mask=(column < columns) & (column * 0 + row < rows), other=0.0)
            )
            part = tl.sum(w * some, 2)
            sums += tl.where((m == row)[None, None, :], part[:, :, None], 0.0)
    total = tl.sum(sums, 1)
    if SCALE:
        total *= widen(tl.load(scale + out // per, mask=known, other=0.0))[:, None]
    if BIAS:
        total += tl.load(bias + out, mask=known, other=0.0)[:, None]
    inside = known[:, None] & (m < rows)[None, :]
    tl.store(y + m.to(tl.int64)[None, :] * n + out[:, None], narrow(total, y.dtype.element_ty), mask=inside)
