"""quant_kv in one kernel: rows are read once, scaled, coded, and written to their slots."""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.bits import store, widen
from qhal_triton.kv.kernels.decode import numbers
from qhal_triton.quantize.kernels.blocks import clean, codes_of, extremes, peak_of, range_of, scale_of, zero_of


@triton.jit
def given(plane, row_head, stride, cols, ok, ELEMENT: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """fp32 numbers of a static plane, in a shape that broadcasts to [rows, columns]."""
    if R.kind == "col":
        at = plane + row_head[:, None] * stride + cols[None, :]
        value = numbers(tl.load(at, mask=ok[:, None] & (cols < D)[None, :], other=1), ELEMENT)
    elif R.kind == "head":
        value = numbers(tl.load(plane + row_head * stride, mask=ok, other=1), ELEMENT)[:, None]
    else:
        value = numbers(tl.load(plane), ELEMENT) + tl.zeros_like(row_head).to(tl.float32)[:, None]
    return value


@triton.jit
def pack(code, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Two codes to a byte, the even column low: [ROWS, COLS] to [ROWS, COLS / 2]."""
    low, high = tl.split(tl.reshape(code & 0xF, (ROWS, COLS // 2, 2)))
    return low | (high << 4)


@triton.jit
def write_rows(
    x, x_token, x_head, slots, slot_stride, count, limit, heads, in_page,
    codes, c_page, c_slot, c_head, scale, s_page, s_slot, s_head, zero, z_page, z_slot, z_head, outer,
    R: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS rows (token, head); F is None for a wide float. A slot outside of the cache is not written."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // heads).to(tl.int64), row % heads
    slot = tl.load(slots + token * slot_stride, mask=row < count, other=-1).to(tl.int64)
    ok = (row < count) & (slot >= 0) & (slot < limit)
    page, place = slot // in_page, slot % in_page
    cols = tl.arange(0, COLS)
    inside = ok[:, None] & (cols < D)[None, :]
    from_ = x + (token * x_token + head * x_head)[:, None] + cols[None, :]
    v = tl.load(from_, mask=(row < count)[:, None] & (cols < D)[None, :], other=0.0)  # does not wait for slots
    PACKED: tl.constexpr = R.element == "int4" or R.element == "uint4" or R.element == "e2m1"
    to = codes + (page * c_page + place * c_slot + head * c_head)[:, None]
    if F is None:
        store(to + cols[None, :], widen(v), inside)
    else:
        v = clean(v, F)
        s_at = page * s_page + place * s_slot + head * s_head
        z_at = page * z_page + place * z_slot + head * z_head
        if R.kind == "tensor" or R.kind == "head" or R.kind == "col":
            s = given(scale, head, s_head, cols, ok, tl.constexpr(R.scale), R, D)
            z = s
            if R.zero != "":
                z = given(zero, head, z_head, cols, ok, tl.constexpr(R.zero), R, D)
            code = codes_of(v, s, z, s, s, F)
        else:
            EACH: tl.constexpr = R.group if R.kind == "group" and R.group < COLS else COLS
            GROUPS: tl.constexpr = COLS // EACH
            # one matrix of blocks, [ROWS * GROUPS, EACH]
            blocks = tl.reshape(v, (ROWS * GROUPS, EACH))
            down, up = extremes(blocks, 1, F)
            lo, hi = range_of(down, up, 1.0, 1.0, F)
            above = 1.0
            if R.outer:
                above = widen(tl.load(outer))
            plane, s = scale_of(peak_of(lo, hi, F), above, F)
            groups = tl.arange(0, GROUPS)
            here = ok[:, None] & (groups * EACH < D)[None, :]
            store(scale + s_at[:, None] + groups[None, :], tl.reshape(plane, (ROWS, GROUPS)), here)
            z = lo
            if R.zero != "":
                zeros, z = zero_of(lo, s, F)
                store(zero + z_at[:, None] + groups[None, :], tl.reshape(zeros, (ROWS, GROUPS)), here)
            code = codes_of(blocks, s[:, None], z[:, None], lo[:, None], hi[:, None], F)
            code = tl.reshape(code, (ROWS, COLS))
        if PACKED:
            half = tl.arange(0, COLS // 2)
            there = ok[:, None] & (half < (D + 1) // 2)[None, :]
            if D % 2 == 1:
                code = tl.where((cols < D)[None, :], code, 0)
            store(to + half[None, :], pack(code, ROWS, COLS), there)
        else:
            store(to + cols[None, :], code, inside)


# Every specialization is a kernel to compile: only what moves the most bytes is left to it.
_ANY = [
    "slot_stride", "count", "limit", "heads", "in_page", "ks_page", "ks_slot", "ks_head", "kz_page", "kz_slot",
    "kz_head", "vs_page", "vs_slot", "vs_head", "vz_page", "vz_slot", "vz_head",
]  # fmt: skip


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=["slots"])
def write(
    k, k_token, k_in_head, v, v_token, v_in_head, slots, slot_stride, count, limit, heads, in_page,
    kc, kc_page, kc_slot, kc_head, ks, ks_page, ks_slot, ks_head, kz, kz_page, kz_slot, kz_head, k_outer,
    vc, vc_page, vc_slot, vc_head, vs, vs_page, vs_slot, vs_head, vz, vz_page, vz_slot, vz_head, v_outer,
    K: tl.constexpr, KF: tl.constexpr, V: tl.constexpr, VF: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of ROWS rows, 2): keys, then values (MLA: latent rows, then rope rows)."""
    if tl.program_id(1) == 0:
        write_rows(k, k_token, k_in_head, slots, slot_stride, count, limit, heads, in_page,
                   kc, kc_page, kc_slot, kc_head,
                   ks, ks_page, ks_slot, ks_head, kz, kz_page, kz_slot, kz_head, k_outer,
                   K, KF, DK, ROWS, BK)  # fmt: skip
    else:
        write_rows(v, v_token, v_in_head, slots, slot_stride, count, limit, heads, in_page,
                   vc, vc_page, vc_slot, vc_head,
                   vs, vs_page, vs_slot, vs_head, vz, vz_page, vz_slot, vz_head, v_outer,
                   V, VF, DV, ROWS, BV)  # fmt: skip
