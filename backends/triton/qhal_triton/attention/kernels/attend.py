"""Scores, softmax and values of one block of query rows over one part of its keys."""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.attention.kernels.scores import (
    fixed_scale,
    held,
    place,
    product,
    queries,
    query_scale,
    row_scale,
    tanh,
    visible,
)
from qhal_triton.bits import dot, narrow
from qhal_triton.kv.kernels.decode import parts, tile

LOG2E = tl.constexpr(1.4426950408889634)


# Every specialization is a kernel to compile: only what the loop over keys gains from is left to it.
_ANY = [
    "q_token", "q_head", "q_groups", "p_token", "p_head", "p_groups", "table_row", "pages", "o_token", "o_head",
    "l_token", "l_head", "batch", "blocks", "splits", "shift", "heads", "share", "together", "causal", "window",
    "has_sinks", "has_lse", "ks_page", "ks_slot", "ks_head", "kz_page", "kz_slot", "kz_head", "vs_page", "vs_slot",
    "vs_head", "vz_page", "vz_slot", "vz_head", "scale", "softcap",
]  # fmt: skip
_ANYWHERE = [
    "q", "p", "out", "lse", "sinks", "tree", "table", "plan", "q_scale", "q_zero", "q_outer", "p_scale_of_q",
    "weight_scale", "k_zero", "v_zero", "k_outer", "v_outer",
]  # fmt: skip


@triton.jit(do_not_specialize=_ANY, do_not_specialize_on_alignment=_ANYWHERE)
def attend(
    q, q_token, q_head, q_scale, q_zero, q_outer, q_groups, p, p_token, p_head, p_scale_of_q, p_groups,
    k, k_page, k_slot, k_head, k_scale, ks_page, ks_slot, ks_head, k_zero, kz_page, kz_slot, kz_head, k_outer,
    v, v_page, v_slot, v_head, v_scale, vs_page, vs_slot, vs_head, v_zero, vz_page, vz_slot, vz_head, v_outer,
    plan, table, table_row, pages, tree, sinks, weight_scale,
    out, o_token, o_head, lse, l_token, l_head, partial, partial_max, partial_sum,
    batch, blocks, splits, shift, heads, share, together, causal, window, has_sinks, has_lse, scale, softcap,
    Q: tl.constexpr, QR: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    Q_PARTS: tl.constexpr, QR_PARTS: tl.constexpr, K_PARTS: tl.constexpr, V_PARTS: tl.constexpr,
    TYPE: tl.constexpr, QK_ROPE: tl.constexpr,
    P: tl.constexpr, P_STATIC: tl.constexpr, P_DIVIDES: tl.constexpr, P_PARTS: tl.constexpr, PV: tl.constexpr,
    MLA: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ONE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TREE: tl.constexpr, EDGES: tl.constexpr, SOFTCAP: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of query rows, key-value heads times blocks of their query heads, parts of the keys).

    A block's M rows are `together` of the `share` query heads of one key-value head, for M // together tokens of one
    sequence. Pages have 1 << shift slots; ONE: a tile lies in one. window 0: none;
    causal, has_sinks, has_lse: 0 or 1.

    What is rounded, each time to fp32 unless said: sums inside the products; a score times its key's scale, if rows
    have their own, then times one factor for all that its query row shares (scale of Q, static scale of K, the
    request's scale, log2 e); exp; P as the request holds it; P times the scale of the value's row, kept in two 16-bit
    parts (2^-17). Codes less zero points, and codes times scales inside of a row, enter the products exactly or in two
    parts. The static scale of V multiplies the sums.

    EDGES: only tiles that some row does not see whole are masked, by a branch; what addresses share stays in
    registers; a page outside of the cache spoils the sums of the block. Else every tile is masked and has its addresses
    made anew, for which fewer registers are enough, and the page spoils the rows that see it.
    """
    block = tl.program_id(0)
    sequence = tl.load(plan + 4 * batch + block)
    if sequence < 0:
        return
    head_blocks = tl.cdiv(share, together)
    tokens = M // together
    group = tl.program_id(1) // head_blocks
    first = tl.load(plan + 4 * batch + blocks + block)
    start = tl.load(plan + sequence)
    count = tl.load(plan + batch + sequence)
    length = tl.load(plan + 2 * batch + sequence)

    rows = tl.arange(0, M)
    token = first + rows // together
    of_group = (tl.program_id(1) % head_blocks) * together + rows % together
    head = group * share + of_group
    real = (token < count) & (rows < tokens * together) & (of_group < share)
    position = length - count + token

    # what each row sees, and what any row of this block does
    last = tl.where(causal != 0, position, length)
    before = tl.where(window > 0, position - window, -1)
    high = length
    if causal != 0:
        high = tl.minimum(length, length - count + first + tokens)
    low = 0
    if window > 0:
        low = tl.maximum(length - count + first - window + 1, 0)
    # every row of the block sees every key between these
    calm_low = tl.where(window > 0, tl.maximum(length - count + first + tokens - window, 0), 0)
    calm_high = tl.where(causal != 0, length - count + first + 1, length - count if TREE else length)
    begin = low // N * N
    tiles = tl.cdiv(tl.maximum(high - begin, 0), N)
    each = tl.cdiv(tiles, splits)
    begin += tl.program_id(2) * each * N
    high = tl.minimum(high, begin + each * N)

    row = (start + token).to(tl.int64)
    q_at = row * q_token + head * q_head
    K_WORDS: tl.constexpr = k.dtype.element_ty == tl.int16
    V_WORDS: tl.constexpr = v.dtype.element_ty == tl.int16
    STEP: tl.constexpr = 2 if K_WORDS or K.element == "int4" or K.element == "uint4" or K.element == "e2m1" else 1
    V_STEP: tl.constexpr = 2 if V_WORDS or V.element == "int4" or V.element == "uint4" or V.element == "e2m1" else 1
    KC: tl.constexpr = BK // 2 if K_WORDS else BK
    VC: tl.constexpr = BV // 2 if V_WORDS else BV
    s_at = (row * heads + head) * q_groups
    qa, qa_rest = queries(q, q_at, q_scale, s_at, head, q_zero, q_outer, real, 0, STEP, Q, DK, KC,
                          Q_PARTS, TYPE, M)  # fmt: skip
    if STEP == 2:
        qb, qb_rest = queries(q, q_at, q_scale, s_at, head, q_zero, q_outer, real, 1, STEP, Q, DK, KC,
                              Q_PARTS, TYPE, M)  # fmt: skip
    else:
        qb, qb_rest = qa, qa_rest
    row_q = query_scale(q_scale, s_at, head, q_outer, real, Q, M)
    if MLA:
        r_at = row * p_token + head * p_head
        rs_at = (row * heads + head) * p_groups
        ra, ra_rest = queries(p, r_at, p_scale_of_q, rs_at, head, q_zero, q_outer, real, 0, V_STEP, QR,
                              DV, VC, QR_PARTS, QK_ROPE, M)  # fmt: skip
        if V_STEP == 2:
            rb, rb_rest = queries(p, r_at, p_scale_of_q, rs_at, head, q_zero, q_outer, real, 1, V_STEP,
                                  QR, DV, VC, QR_PARTS, QK_ROPE, M)  # fmt: skip
        else:
            rb, rb_rest = ra, ra_rest
        row_r = query_scale(p_scale_of_q, rs_at, head, q_outer, real, QR, M)
    fixed_k = fixed_scale(k_scale + group * ks_head, k_outer, K)
    fixed_v = fixed_scale(v_scale + group * vs_head, v_outer, V)
    unit = scale if SOFTCAP else scale * LOG2E
    row_q *= fixed_k * unit if EDGES else fixed_k
    if MLA:
        row_r *= fixed_v * unit if EDGES else fixed_v
    p_scale = 1.0
    if P_STATIC:
        p_scale = tl.load(weight_scale).to(tl.float32)

    top = tl.full([M], float("-inf"), tl.float32)
    sink = tl.load(sinks + head, mask=real & (rows < has_sinks * M), other=float("-inf")) * LOG2E
    total = tl.zeros([M], tl.float32)
    WIDE_V: tl.constexpr = KC if MLA else VC
    acc = tl.zeros([M, WIDE_V], tl.float32)
    TWO: tl.constexpr = (STEP if MLA else V_STEP) == 2
    acc_odd = tl.zeros([M, WIDE_V if TWO else 1], tl.float32)

    in_page = (1 << shift) - 1
    slots = tl.arange(0, N) if ONE else tl.arange(0, N) & in_page
    branch = tree + tl.load(plan + 3 * batch + sequence)
    spoilt = begin < 0 if ONE else tl.full([N], 0, tl.int1)  # pages outside of the cache

    # a static scale of P may saturate: that is of exp(s - max) with the maximum of all keys, so it is found first
    PASSES: tl.constexpr = 2 if P_STATIC else 1
    of_keys = top
    for turn in tl.static_range(PASSES):
        if P_STATIC and turn == 1:
            of_keys = top
            top = tl.maximum(top, sink)
        for at in range(begin, high, N):
            key = at + tl.arange(0, N)
            ok = (key < high) & (key >= low)
            if ONE:
                page = tl.load(table + sequence * table_row + (at >> shift))
            else:
                page = tl.load(table + sequence * table_row + (key >> shift), mask=ok, other=0)
            fault = (page < 0) | (page >= pages)
            if EDGES:
                spoilt |= fault
            page = tl.where(fault, 0, page)
            slot = at & in_page
            if not EDGES:  # addresses that are made anew take no registers
                slots = key & in_page
                slot = 0
            k_in, k_at = place(k, page, slot, slots, group, k_page, k_slot, k_head, ONE)
            ks_in, ks_at = place(k_scale, page, slot, slots, group, ks_page, ks_slot, ks_head, ONE)
            kz_in, kz_at = place(k_zero, page, slot, slots, group, kz_page, kz_slot, kz_head, ONE)
            v_in, v_at = place(v, page, slot, slots, group, v_page, v_slot, v_head, ONE)
            vs_in, vs_at = place(v_scale, page, slot, slots, group, vs_page, vs_slot, vs_head, ONE)
            vz_in, vz_at = place(v_zero, page, slot, slots, group, vz_page, vz_slot, vz_head, ONE)

            ka, ka_rest, kb, kb_rest = tile(
                k_in, k_at, ks_in, ks_at, kz_in, kz_at, ok, K, DK, N, KC,
                NATIVE, K_PARTS, TYPE,
            )  # fmt: skip
            s = product(qa, qa_rest, tl.trans(ka), tl.trans(ka_rest), tl.zeros([M, N], tl.float32), Q_PARTS, K_PARTS)
            if STEP == 2:
                s = product(qb, qb_rest, tl.trans(kb), tl.trans(kb_rest), s, Q_PARTS, K_PARTS)
            if K.kind == "row":
                s = s * row_scale(ks_in, ks_at, ok, K)[None, :]
            s = s * row_q[:, None]
            if MLA:
                ra_k, ra_k_rest, rb_k, rb_k_rest = tile(
                    v_in, v_at, vs_in, vs_at, vz_in, vz_at, ok, V, DV, N, VC, NATIVE, V_PARTS,
                    QK_ROPE,
                )  # fmt: skip
                r = product(ra, ra_rest, tl.trans(ra_k), tl.trans(ra_k_rest),
                            tl.zeros([M, N], tl.float32), QR_PARTS, V_PARTS)  # fmt: skip
                if V_STEP == 2:
                    r = product(rb, rb_rest, tl.trans(rb_k), tl.trans(rb_k_rest), r, QR_PARTS, V_PARTS)
                if V.kind == "row":
                    r = r * row_scale(vs_in, vs_at, ok, V)[None, :]
                s += r * row_r[:, None]
            if not EDGES:
                s = s * unit
            if SOFTCAP:
                s = tanh(s / softcap) * (softcap * LOG2E)
            if EDGES:
                if (at < calm_low) | (at + N > calm_high):
                    seen = visible(key, token, last, before, count, length, branch, ok, TREE)
                    s = tl.where(seen, s, float("-inf"))
            else:
                s = tl.where(fault[None, :] if not ONE else fault, float("nan"), s)
                seen = visible(key, token, last, before, count, length, branch, ok, TREE)
                s = tl.where(seen, s, float("-inf"))
            if P_STATIC and turn == 0:
                top = tl.maximum(top, tl.max(s, 1))
            else:
                if P_STATIC:
                    e = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
                else:
                    higher = tl.maximum(top, tl.max(s, 1))
                    base = tl.where(higher == float("-inf"), 0.0, higher)
                    e = tl.exp2(s - base[:, None])
                    shrink = tl.exp2(top - base)
                    total = total * shrink
                    acc = acc * shrink[:, None]
                    if TWO:
                        acc_odd = acc_odd * shrink[:, None]
                    top = higher
                total += tl.sum(e, 1)
                w = held(e, P, p_scale, P_DIVIDES, P_STATIC)
                if MLA:
                    if K.kind == "row":
                        w = w * row_scale(ks_in, ks_at, ok, K)[None, :]
                    wa, wa_rest = parts(w, P_PARTS, PV)
                    if EDGES and P_PARTS == 2 and K_PARTS == 1:
                        if high > begin:  # always; products that do not see each other keep the same layout of sums
                            acc = dot(wa, ka.to(PV), acc)
                        acc = dot(wa_rest, ka.to(PV), acc)
                    else:
                        acc = product(wa, wa_rest, ka.to(PV), ka_rest.to(PV), acc, P_PARTS, K_PARTS)
                    if TWO:
                        acc_odd = product(wa, wa_rest, kb.to(PV), kb_rest.to(PV), acc_odd, P_PARTS, K_PARTS)
                else:
                    va, va_rest, vb, vb_rest = tile(
                        v_in, v_at, vs_in, vs_at, vz_in, vz_at, ok, V, DV,
                        N, VC, NATIVE, V_PARTS, PV,
                    )  # fmt: skip
                    if V.kind == "row":
                        w = w * row_scale(vs_in, vs_at, ok, V)[None, :]
                    wa, wa_rest = parts(w, P_PARTS, PV)
                    acc = product(wa, wa_rest, va, va_rest, acc, P_PARTS, V_PARTS)
                    if TWO:
                        acc_odd = product(wa, wa_rest, vb, vb_rest, acc_odd, P_PARTS, V_PARTS)

    if not P_STATIC:
        of_keys = top
    if ONE:
        total = tl.where(spoilt, float("nan"), total)
    else:
        total = tl.where(tl.max(spoilt.to(tl.int32), 0) != 0, float("nan"), total)
    seen_any = (of_keys != float("-inf")) | (total != 0)
    grow = fixed_k if MLA else fixed_v
    if P_STATIC:
        grow = grow / p_scale if P_DIVIDES else grow * p_scale
    acc = acc * grow
    acc_odd = acc_odd * grow
    OUT_STEP: tl.constexpr = 2 if TWO else 1
    DO: tl.constexpr = DK if MLA else DV
    cols = tl.arange(0, WIDE_V) * OUT_STEP
    if splits > 1:
        to = (row * heads + head) * splits + tl.program_id(2)
        tl.store(partial_max + to, top, mask=real)
        tl.store(partial_sum + to, total, mask=real)
        some = real & (total != 0)
        tl.store(partial + to[:, None] * DO + cols[None, :], acc, mask=some[:, None] & (cols < DO)[None, :])
        if TWO:
            tl.store(partial + to[:, None] * DO + cols[None, :] + 1, acc_odd,
                     mask=some[:, None] & (cols + 1 < DO)[None, :])  # fmt: skip
    else:
        with_sink = tl.maximum(top, sink)
        base = tl.where(with_sink == float("-inf"), 0.0, with_sink)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.exp2(sink - base)
        acc = acc * shrink[:, None]
        acc_odd = acc_odd * shrink[:, None]
        below = tl.where(seen_any, total, 1.0)[:, None]
        o_at = row * o_token + head * o_head
        o = tl.where(seen_any[:, None], acc / below, 0.0)
        tl.store(out + o_at[:, None] + cols[None, :], narrow(o, out.dtype.element_ty),
                 mask=real[:, None] & (cols < DO)[None, :])  # fmt: skip
        if TWO:
            o = tl.where(seen_any[:, None], acc_odd / below, 0.0)
            tl.store(out + o_at[:, None] + (cols + 1)[None, :], narrow(o, out.dtype.element_ty),
                     mask=real[:, None] & (cols + 1 < DO)[None, :])  # fmt: skip
        log = tl.where(seen_any, (base + tl.log2(total)) / LOG2E, float("-inf"))
        tl.store(lse + row * l_token + head * l_head, log, mask=real & (rows < has_lse * M))
