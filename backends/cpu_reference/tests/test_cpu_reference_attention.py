"""quant_kv and attention against torch's own attention in float64, and what must be exact."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qhal import AttentionRequest, BatchError, Format, FormatError, KVCache, KVRequest, Limits, UnsupportedError
from qhal.tensors import same_bits
from qhal_portable.kv import read

PAGE = 4


def by_torch(q, k, v, request: AttentionRequest, sinks=None):
    """One sequence by scaled_dot_product_attention where it can, else by a loop over scalars; float64."""
    t, heads, _ = q.shape
    n, groups = k.shape[:2]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // groups, 0) for x in (k, v))
    mask = torch.zeros(t, n, dtype=torch.bool)
    for i in range(t):
        for j in range(n):
            position = n - t + i
            mask[i, j] = (not request.causal or j <= position) and (
                request.window is None or position - j < request.window
            )
    if request.softcap is None and sinks is None:
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=request.scale)
        scores = (q @ k.transpose(1, 2) * request.scale).masked_fill(~mask, -math.inf)
        return o.transpose(0, 1), torch.logsumexp(scores, -1).T
    out, lse = torch.zeros(t, heads, v.shape[-1], dtype=torch.float64), torch.zeros(t, heads, dtype=torch.float64)
    for i in range(t):
        for h in range(heads):
            s = [float(q[h, i] @ k[h, j]) * request.scale for j in range(n) if mask[i, j]]
            if request.softcap is not None:
                s = [request.softcap * math.tanh(x / request.softcap) for x in s]
            total = sum(math.exp(x) for x in s) + (math.exp(float(sinks[h])) if sinks is not None else 0)
            weights = [math.exp(x) / total for x in s]
            out[i, h] = sum(p * v[h, j] for p, j in zip(weights, mask[i].nonzero().flatten(), strict=True))
            lse[i, h] = math.log(total)
    return out, lse


VARIANTS = [{}, {"causal": False}, {"window": 3}, {"window": 1}, {"softcap": 2.0}, {"sinks": True}, {"heads": 2},
            {"heads": 6}, {"window": 4, "softcap": 1.5, "sinks": True}, {"causal": False, "window": 2}]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("queries", [[1, 1, 1, 1], [1, 4, 5, 9], [0, 3, 2, 1]])
def test_attention_is_torchs(ops, variant, queries, kv_request, attention_request, fill, plan):
    lens = [1, 4, 5, 9]  # one, a page, a page and one, two pages and one
    request = attention_request(kv_request(), lse=True, **variant)
    cache, table, rows = fill(ops, request.kv, lens)
    batch = plan(ops, request, queries, lens, table)
    q = torch.randn(sum(queries), request.heads, 8)
    sinks = torch.randn(request.heads) if request.sinks else None
    lse = torch.empty(sum(queries), request.heads)
    o = ops.attention(q, cache, batch, sinks=sinks, lse=lse)
    at = 0
    for t, (k, v) in zip(queries, rows, strict=True):
        want, want_lse = by_torch(q[at : at + t], k, v, request, sinks)
        assert torch.allclose(o[at : at + t].double(), want, atol=1e-6, rtol=1e-6)
        assert torch.allclose(lse[at : at + t].double(), want_lse, atol=1e-6, rtol=1e-6)
        at += t


def test_codes_and_scales_are_the_bits_of_quantize(ops, kv_request):
    for name in ("int8.row*fp32", "int8.g4*fp16", "e4m3fn.row*fp32"):
        kv = kv_request(name)
        cache = KVCache.allocate(kv, 2, "cpu")
        k, v = torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 2, 8).bfloat16()
        slots = torch.tensor([7, -1, 0, 2, 5])
        keep = (k.clone(), v.clone(), slots.clone())
        before = {n: t.clone() for n, t in cache.planes.items()}
        ops.quant_kv(k, v, cache, slots)
        assert torch.equal(k, keep[0]) and torch.equal(v, keep[1]) and torch.equal(slots, keep[2])
        for row, x in (("k", k), ("v", v)):
            for token, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    q = ops.quantize(x[token], kv.k)
                    assert same_bits(cache.planes[f"{row}.codes"][slot // PAGE, slot % PAGE], q.codes)
                    scale = cache.planes[f"{row}.scale"][slot // PAGE, slot % PAGE]
                    assert same_bits(scale.reshape(2, -1), q.scale)
            untouched = [s for s in range(2 * PAGE) if s not in slots.tolist()]
            for n in (f"{row}.codes", f"{row}.scale"):
                after, old = (t.reshape(2 * PAGE, *t.shape[2:]) for t in (cache.planes[n], before[n]))
                assert all(same_bits(after[s], old[s]) for s in untouched)


def test_relabelling_pages_changes_no_bit(ops, kv_request, attention_request, fill, plan):
    request = attention_request(kv_request("int8.row*fp32"))
    cache, table, _ = fill(ops, request.kv, [9, 5])
    batch = plan(ops, request, [2, 5], [9, 5], table)
    q = torch.randn(7, 4, 8)
    o = ops.attention(q, cache, batch)
    order = torch.randperm(cache.pages)
    back = torch.argsort(order)
    moved = KVCache(cache.request, {n: t[order] for n, t in cache.planes.items()})
    relabelled = torch.where(table < cache.pages, back[table.clamp(max=cache.pages - 1).long()].int(), table)
    batch.plan(torch.tensor([2, 5]).int(), torch.tensor([9, 5]).int(), relabelled)
    assert torch.equal(ops.attention(q, moved, batch), o)
    strided = {n: torch.stack([t, t], 2)[:, :, 0] for n, t in moved.planes.items()}
    assert torch.equal(ops.attention(q, KVCache(cache.request, strided), batch), o)


def test_hidden_nan_does_not_leak_and_seen_nan_does(ops, kv_request, attention_request, fill, plan):
    request = attention_request(kv_request(), window=3)
    cache, table, _ = fill(ops, request.kv, [7], poison=True)
    batch = plan(ops, request, [7], [7], table)
    q = torch.randn(7, 4, 8)
    o = ops.attention(q, cache, batch)
    assert torch.isfinite(o).all()
    cache.planes["v.codes"][table[0, 1], 0] = float("nan")  # token 4: seen by queries 4, 5, 6
    cache.planes["k.codes"][table[0, 0], 0] = float("nan")  # token 0: seen by queries 0, 1, 2
    y = ops.attention(q, cache, batch)
    assert torch.allclose(y[3], o[3], atol=1e-6)
    assert y[[0, 1, 2, 4, 5, 6]].isnan().all()


def test_rows_without_keys_give_zeros(ops, kv_request, attention_request, fill, plan):
    request = attention_request(kv_request(), lse=True, sinks=True)
    cache, table, _ = fill(ops, request.kv, [0, 2])
    batch = plan(ops, request, [2, 4], [0, 2], table)  # the second sequence has more queries than keys
    lse = torch.empty(6, 4)
    o = ops.attention(torch.randn(6, 4, 8), cache, batch, sinks=torch.zeros(4), lse=lse)
    assert (o[:4] == 0).all() and (lse[:4] == -torch.inf).all()
    assert (o[4:] != 0).all() and torch.isfinite(lse[4:]).all()
    empty = plan(ops, request, [], [], table[:0])
    assert ops.attention(torch.randn(0, 4, 8), cache, empty, sinks=torch.zeros(4)).shape == (0, 4, 8)


def test_exact_families(ops, kv_request, attention_request, fill, plan):
    request = attention_request(kv_request(), causal=False)
    cache, table, rows = fill(ops, request.kv, [8])
    batch = plan(ops, request, [1], [8], table)
    o = ops.attention(torch.zeros(1, 4, 8), cache, batch)
    assert torch.equal(o, rows[0][1].double().mean(0).float().repeat_interleave(2, 0)[None])  # the mean of v
    q = rows[0][0][5].repeat_interleave(2, 0)[None] * 1e4
    peaked = by_torch(q, *rows[0], request)[0]
    assert torch.allclose(ops.attention(q, cache, batch).double(), peaked, atol=1e-6)


def test_declared_p_and_q_are_used(ops, kv_request, attention_request, fill, plan):
    kv = kv_request()
    cache, table, rows = fill(ops, kv, [7])
    q = torch.randn(1, 4, 8)
    base = ops.attention(q, cache, plan(ops, attention_request(kv), [1], [7], table))
    for name, step in (("bf16", 2**-8), ("fp16", 2**-11), ("e4m3fn", 2**-4)):
        o = ops.attention(q, cache, plan(ops, attention_request(kv, p=Format(name)), [1], [7], table))
        difference = (o - base).abs().max().item()
        assert 0 < difference <= step * rows[0][1].abs().max().item()
    rounded = ops.attention(q, cache, plan(ops, attention_request(kv, q=Format("bf16")), [1], [7], table))
    assert torch.equal(rounded, ops.attention(q.bfloat16(), cache, plan(ops, attention_request(kv), [1], [7], table)))
    fp8 = attention_request(kv, q=Format.parse("e4m3fn.row*fp32"))
    held = ops.quantize(q.reshape(4, 8), fp8.q).dequantize().reshape(1, 4, 8)
    assert torch.equal(
        ops.attention(q, cache, plan(ops, fp8, [1], [7], table)),
        ops.attention(held, cache, plan(ops, attention_request(kv), [1], [7], table)),
    )


def test_mla(ops, attention_request, fill, plan):
    kv = KVRequest(kind="mla", k=Format("bf16"), v=Format("bf16"), heads=1, k_dim=16, v_dim=4, page=PAGE)
    request = attention_request(kv, out=torch.bfloat16)
    cache, table, rows = fill(ops, kv, [6])
    q = torch.randn(3, 4, 20)
    o = ops.attention(q, cache, plan(ops, request, [3], [6], table))
    latent, rope = (x.bfloat16().double()[:, None] for x in rows[0])
    want, _ = by_torch(q, torch.cat([latent, rope], -1), latent, request)
    assert o.shape == (3, 4, 16) and o.dtype == torch.bfloat16
    assert torch.allclose(o.double(), want, atol=2**-8, rtol=2**-8)


def test_device_lengths_win_within_their_bounds(ops, kv_request, attention_request, fill, plan):
    request = attention_request(kv_request())
    cache, table, rows = fill(ops, request.kv, [9])
    batch = ops.attention_batch(request, Limits(batch=1, tokens=1, pages=3))
    device = torch.tensor([5], dtype=torch.int32)
    batch.plan(torch.tensor([1]).int(), torch.tensor([9]).int(), table, kv_lens_device=device)
    q = torch.randn(1, 4, 8)
    for n in (5, 9, 1):
        device.fill_(n)
        want, _ = by_torch(q, rows[0][0][:n], rows[0][1][:n], request)
        assert torch.allclose(ops.attention(q, cache, batch).double(), want, atol=1e-6)
    device.fill_(10)
    with pytest.raises(BatchError, match="bound"):
        ops.attention(q, cache, batch)


def test_errors(ops, kv_request, attention_request, fill, plan):
    request = attention_request(kv_request("int8.row*fp32"))
    cache, table, _ = fill(ops, request.kv, [5])
    batch = ops.attention_batch(request, Limits(batch=1, tokens=4, pages=2))
    for queries, lens, word in (
        ([1, 1], [1, 1], "sequences"),
        ([5], [5], "tokens"),
        ([1], [9], "pages"),
        ([-1], [5], "negative"),
    ):
        with pytest.raises(BatchError, match=word):
            batch.plan(torch.tensor(queries).int(), torch.tensor(lens).int(), torch.zeros(2, 4).int())
    batch.plan(torch.tensor([1]).int(), torch.tensor([5]).int(), table)
    q = torch.zeros(1, 4, 8)
    for bad, error in ((q[:, :3], FormatError), (q.double(), FormatError), (torch.zeros(2, 4, 8), BatchError)):
        with pytest.raises(error):
            ops.attention(bad, cache, batch)
    with pytest.raises(FormatError, match="sinks"):
        ops.attention(q, cache, batch, sinks=torch.zeros(4))
    with pytest.raises(FormatError, match="out is"):
        ops.attention(q, cache, batch, out=torch.zeros(1, 4, 8).half())
    with pytest.raises(FormatError, match="the batch was made for"):
        ops.attention(q, KVCache.allocate(kv_request(), 4, "cpu"), batch)
    batch.plan(torch.tensor([1]).int(), torch.tensor([5]).int(), torch.full((1, 2), 99).int())
    with pytest.raises(BatchError, match="pages"):
        ops.attention(q, cache, batch)
    rows = torch.zeros(1, 2, 8)
    for slots, error in (
        (torch.tensor([10**6]), BatchError),
        (torch.tensor([-2]), BatchError),
        (torch.zeros(1), FormatError),
    ):
        with pytest.raises(error):
            ops.quant_kv(rows, rows, cache, slots)
    with pytest.raises(FormatError, match="v is"):
        ops.quant_kv(rows, rows[:, :1], cache, torch.tensor([0]))
    for fmt in ("int8.128x128*fp32", "int3.row*fp32", "e2m1.g16*(e4m3fn.row*fp32)", "lut4.row*fp32"):
        with pytest.raises(UnsupportedError):
            ops.kv_planes(replace(request.kv, k=Format.parse(fmt)))
    for name, plane in (("k.scale", None), ("k.codes", torch.zeros(4, PAGE, 2, 8)), ("v.scale", torch.zeros(2))):
        broken = KVCache.allocate(kv_request("int8.row*fp32"), 4, "cpu")
        if plane is None:
            del broken.planes[name]
        else:
            broken.planes[name] = plane
        with pytest.raises(FormatError, match=f"the cache's {name} must be"):
            ops.quant_kv(rows, rows, broken, torch.tensor([0]))


def test_static_power_of_two_scales_are_read_and_written(ops, kv_request):
    cache = KVCache.allocate(kv_request("e4m3fn.tensor*e8m0"), 1, "cpu")
    cache.set_static("k.scale", torch.tensor(0.5))
    x = torch.tensor([[[1.0, -2.0, 0.5, 3.0, 0, 0, 0, 0]] * 2])
    ops.quant_kv(x, x, cache, torch.tensor([1]))
    assert torch.equal(cache.planes["k.codes"][0, 1].float(), x[0] * 2)
    assert torch.equal(read(cache, 0, torch.tensor([0]), 2)[1], x[0])
