"""Device code of products: y[m, n] = sum over k of X[m, k] * W[n, k], for a gemm and for the experts of a grouped one.

A program holds [BN, BM] of the transposed result: the weight is the left operand, so that its tile is decoded in
registers, and few tokens waste little of a matrix instruction. Every step takes PARTS runs of CHUNK columns whose codes
share words, APART columns from each other; no two columns of UNIT neighbours have different scales.

`mode` says where a weight's scale comes in:
    late    one scale per row: after the last step
    step    the sum of a step, of exact products, is multiplied by the step's scales and added in fp32
    early   every weight is decoded as the contract says, in fp32, and rounded once to the type of x

Numerics. Products of codes, less their zero points, with a 16-bit x or with each other are exact (int8, bf16, fp16) and
summed in fp32 by the matrix instruction, in int32 for int8: class fp32-acc; fp8 instructions sum with fewer bits within
128 columns, fp32 between these: reduced-acc; "early" rounds the weight to 16 bits: dequant-16 (to fp32: fp32-acc).
Zero points of x that are no whole numbers take part as the nearest one, and with what that lacks in fp32.
Scales multiply sums: a sum of codes times x that leaves fp32 before its scale is Inf, and one that leaves it before
what divides the scales. Parts of K are added in order. Sums of 4-bit codes as fp8 stay a power of two too small until
all are added: none is Inf before its scale, and those that their scales bring below 2^-117 lose bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.bits import INTERPRETED, dot, narrow, times
from qhal_triton.gemm.kernels.eights import eights
from qhal_triton.gemm.kernels.values import (
    code_of,
    decoded,
    exact,
    fp8,
    number,
    plane,
    under,
    whole_activation,
    whole_weight,
)


@triton.jit
def product(
    x, w, y, bias, sx, ox, zx, sw, ow, zw, fw, table, index, order, starts,
    m, n, k, experts, steps, per_part, spread,
    x_row, sx_row, sx_col, zx_row, zx_col, ox_row,
    w_row, sw_row, sw_col, zw_row, zw_col, fw_row, fw_col, ow_row,
    w_exp, sw_exp, zw_exp, fw_exp, ow_exp, b_exp, y_row, y_part,
    TYPE: tl.constexpr, NATIVE: tl.constexpr, FOREIGN: tl.constexpr, POWER: tl.constexpr,
    PTX: tl.constexpr, PACKED: tl.constexpr,
    XKIND: tl.constexpr, WKIND: tl.constexpr, MODE: tl.constexpr,
    SX: tl.constexpr, OX: tl.constexpr, OVERX: tl.constexpr, ZX: tl.constexpr, GX: tl.constexpr,
    SW: tl.constexpr, OW: tl.constexpr, OVERW: tl.constexpr, ZW: tl.constexpr, FW: tl.constexpr,
    GW: tl.constexpr, RW: tl.constexpr,
    WSHIFT: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, APART: tl.constexpr, UNIT: tl.constexpr,
    BIAS: tl.constexpr, INDEXED: tl.constexpr,
    FORM: tl.constexpr, TOP: tl.constexpr, EXPERTS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of the result, or of the sum over the steps of one part.

    TYPE       what is multiplied: bf16, fp16, fp32, or int8 (int32 sums)
    NATIVE     fp8 codes are, as they are stored; every unit's sum is added in fp32, which its instructions do not do
    FOREIGN    they are of OCP's flavour, and the instruction reads the one where they are half as large
    POWER      not 1: w's codes of four bits become such, this many times too small
    PTX        NVIDIA's instructions may be written out
    PACKED     of MODE "early": scales are of TYPE, so 16-bit instructions round as fp32 would
    SX OX ZX   kind of x's scales, of their outer scale (OVERX: it divides them), of its zero points; GX columns share
               one, 0: all of a row
    SW OW OVERW ZW FW  the same of w, and its offset's sign; RW rows share one. WSHIFT is added to w's int8 zero points
    FORM       "": no experts; offsets, masked, indexed: rows come from `starts` (and `order`)
    """
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rn_in = rn < n
    tile, part = tl.program_id(1), tl.program_id(2)
    first, last = part * per_part, tl.minimum(part * per_part + per_part, steps)
    rows = tile * BM + tl.arange(0, BM)
    live = rows < m
    stored, expert = live, 0
    if FORM == "masked":
        expert = tile // spread
        at = (tile % spread) * BM + tl.arange(0, BM)
        rows = expert * m + at
        stored, live = at < m, at < tl.minimum(tl.load(starts + expert), m)
    elif FORM != "":
        # every expert has its own tiles, and behind them come those of rows that belong to none
        e = tl.arange(0, EXPERTS)
        begin = tl.minimum(tl.maximum(tl.load(starts + e, mask=e <= experts, other=m), 0), m)
        end = tl.minimum(tl.maximum(tl.load(starts + e + 1, mask=e < experts, other=m), begin), m)
        tiles = (end - begin + BM - 1) // BM
        ahead = tl.cumsum(tiles, 0) - tiles
        mine = (tile >= ahead) & (tile < ahead + tiles) & (e <= experts)
        expert = tl.sum(tl.where(mine, e, 0), 0)
        at = tl.sum(tl.where(mine, begin + (tile - ahead) * BM, 0), 0) + tl.arange(0, BM)
        stored = at < tl.sum(tl.where(mine, end, 0), 0)
        live = at < tl.sum(tl.where(mine & (e < experts), end, 0), 0)
        rows = tl.load(order + at, mask=stored, other=0) if FORM == "indexed" else at
    if FORM != "":
        last = tl.where(tl.sum(live.to(tl.int32), 0) > 0, last, first)
        expert = tl.minimum(expert, experts - 1)
        w += expert.to(tl.int64) * w_exp
        if SW != "":
            sw += expert * sw_exp
        if ZW != "":
            zw += expert * zw_exp
        if FW != "":
            fw += expert * fw_exp
        if OW != "":
            ow += expert * ow_exp
        if BIAS:
            bias += expert * b_exp
    source = (rows // TOP).to(tl.int64)
    WHOLE: tl.constexpr = tl.int8 == TYPE
    WLATE: tl.constexpr = MODE == "late" or MODE == "early"
    XLATE: tl.constexpr = GX == 0
    FRESH: tl.constexpr = NATIVE or not WLATE or not XLATE
    INTS: tl.constexpr = WHOLE and not FRESH
    total = tl.zeros((BN, BM), tl.int32 if INTS else tl.float32)
    outer = tl.full((BN,), 1.0, tl.float32)
    if OW != "":
        outer = tl.where(rn_in, plane(ow, rn * ow_row, rn_in, OW), 1.0)
    outer_x = tl.full((BM,), 1.0, tl.float32)
    if OX != "":
        outer_x = tl.where(live, plane(ox, source * ox_row, live, OX), 1.0)
    rest = tl.zeros((BM,), tl.float32)
    lost = tl.zeros((BN,), tl.int32)
    cols = tl.arange(0, CHUNK)
    w_at = w + rn.to(tl.int64)[:, None] * w_row + cols[None, :]
    for step in range(first, last):
        s, z, f = 1.0, 0.0, 0.0
        z_x = tl.zeros((BM,), tl.float32)
        inside = rn_in[:, None]
        if not EVEN:
            inside = inside & (step * CHUNK + cols < k // PARTS)[None, :]
        word = tl.load(w_at + step * CHUNK, mask=inside, other=0)
        for part_of in tl.static_range(PARTS):
            base = step * (CHUNK * PARTS)
            if APART == 1:
                columns = base + PARTS * cols + part_of
            else:
                base += part_of * CHUNK
                columns = base + cols
            valid = columns < k
            x_at = x + source[None, :] * x_row + columns[:, None]
            x_in = live[None, :] if EVEN else live[None, :] & valid[:, None]
            xt = tl.load(x_at, mask=x_in, other=0)
            gx = base // GX if GX > 0 else 0
            g = base // GW if GW > 0 else 0
            # what is the same for the columns of a unit is read at its start
            if INDEXED:
                at_w = (rn // RW)[:, None] * sw_row + tl.load(index + columns, mask=valid, other=0)[None, :] * sw_col
                s = plane(sw, at_w, rn_in[:, None] & valid[None, :], SW)
                s = under(s, outer[:, None], OW, OVERW)
                if ZW != "":
                    at_z = (rn // RW)[:, None] * zw_row + tl.load(index + columns, mask=valid, other=0)[
                        None, :
                    ] * zw_col
                    z = plane(zw, at_z, rn_in[:, None] & valid[None, :], ZW)
                if FW != "":
                    at_f = (rn // RW)[:, None] * fw_row + tl.load(index + columns, mask=valid, other=0)[
                        None, :
                    ] * fw_col
                    f = plane(fw, at_f, rn_in[:, None] & valid[None, :], "")
            elif part_of * CHUNK % UNIT == 0:
                if SW != "" and MODE == "early":
                    s = plane(sw, (rn // RW) * sw_row + g * sw_col, rn_in, SW)
                    s = under(s, outer, OW, OVERW)
                if ZW != "":
                    z = plane(zw, (rn // RW) * zw_row + g * zw_col, rn_in, ZW)
                if FW != "":
                    f = plane(fw, (rn // RW) * fw_row + g * fw_col, rn_in, "")
            if ZX != "" and part_of * CHUNK % UNIT == 0:
                z_x = plane(zx, source * zx_row + gx * zx_col, live, ZX)
            if FRESH and part_of * CHUNK % UNIT == 0:
                add = tl.zeros((BN, BM), tl.int32 if WHOLE else tl.float32)
                lost = tl.zeros((BN,), tl.int32)
            if WHOLE:
                w8, w_zero = whole_weight(word, z, valid, WKIND, part_of, PARTS, ZW, WSHIFT)
                x8, x_zero, rest = whole_activation(xt, z_x, valid, XKIND)
                ints = dot(w8, x8, tl.zeros((BN, BM), tl.int32))
                if (ZW != "" and PARTS == 1) or WSHIFT != 0:
                    ints -= w_zero[:, None] * tl.sum(x8.to(tl.int32), 0)[None, :]
                if ZX != "" or XKIND == "uint":
                    of_row = tl.sum(w8.to(tl.int32), 1) - tl.sum(valid.to(tl.int32), 0) * w_zero
                    ints -= x_zero[None, :] * of_row[:, None]
                    if ZX == "wide":
                        lost += of_row
                if FRESH:
                    add += ints
                else:
                    total += ints
            else:
                if XKIND == "":
                    xv = xt
                elif NATIVE:
                    xv = fp8(xt, XKIND, FOREIGN)
                else:
                    xv = number(xt, XKIND) - z_x[None, :]
                    xv = narrow(tl.where(valid[:, None], xv, 0.0), TYPE)
                if NATIVE and POWER != 1.0:
                    wv = fp8(eights(word, WKIND, part_of, PTX), "e4m3fn", False)
                elif NATIVE:
                    wv = fp8(word, WKIND, FOREIGN)
                elif PACKED and PTX and not INTERPRETED:
                    wv = exact(word, WKIND, TYPE, part_of, PARTS, table, z, ZW, PTX)
                    wv = times(wv, tl.broadcast_to(s.to(TYPE)[:, None], wv.shape))
                elif MODE == "early":
                    code = code_of(word, WKIND, part_of, PARTS)
                    wv = narrow(decoded(code, WKIND, table, s, z, f, SW, ZW, FW, INDEXED), TYPE)
                else:
                    wv = exact(word, WKIND, TYPE, part_of, PARTS, table, z, ZW, PTX)
                if FRESH:
                    add = dot(wv, xv, add)
                else:
                    total = dot(wv, xv, total)
            if FRESH and (part_of + 1) * CHUNK % UNIT == 0:
                scaled = add.to(tl.float32)
                if ZX == "wide":
                    scaled -= lost.to(tl.float32)[:, None] * rest[None, :]
                if FOREIGN:
                    scaled = scaled * 4.0
                if not WLATE:
                    s_w = plane(sw, (rn // RW) * sw_row + g * sw_col, rn_in, SW)
                    if not OVERW:
                        s_w = under(s_w, outer, OW, OVERW)
                    scaled = scaled * s_w[:, None]
                if not XLATE:
                    s_x = plane(sx, source * sx_row + gx * sx_col, live, SX)
                    if not OVERX:
                        s_x = under(s_x, outer_x, OX, OVERX)
                    scaled = scaled * s_x[None, :]
                total += scaled
    result = total.to(tl.float32)
    if POWER != 1.0:
        result = result * POWER
    if ZX == "wide" and not FRESH:
        result -= lost.to(tl.float32)[:, None] * rest[None, :]
    if MODE == "step" and OVERW:  # one number for a row: its sum is divided, and no step has a division
        result = tl.div_rn(result, outer[:, None] + tl.zeros((BN, BM), tl.float32))
    if not XLATE and OVERX:
        result = tl.div_rn(result, outer_x[None, :] + tl.zeros((BN, BM), tl.float32))
    if MODE == "late" and SW != "":
        s = plane(sw, (rn // RW) * sw_row, rn_in, SW)
        s = under(s, outer, OW, OVERW)
        result = result * s[:, None]
    if XLATE and SX != "":
        s_x = plane(sx, source * sx_row, live, SX)
        s_x = under(s_x, outer_x, OX, OVERX)
        result = result * s_x[None, :]
    if BIAS:
        once = rn_in & (tl.zeros((BN,), tl.int32) + part == 0)
        result += tl.load(bias + rn, mask=once, other=0.0)[:, None]
    result = tl.where(live[None, :], result, 0.0)
    y_at = y + part.to(tl.int64) * y_part + rows.to(tl.int64)[None, :] * y_row + rn[:, None]
    tl.store(y_at, narrow(result, y.dtype.element_ty), mask=stored[None, :] & rn_in[:, None])
