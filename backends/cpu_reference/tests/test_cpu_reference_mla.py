"""Absorbed MLA against the attention it stands for: keys and values made from latent rows by kv_b_proj, in float64."""

from __future__ import annotations

import pytest
import torch

from qhal import Format, GemmRequest, GroupedRequest, KVRequest, Masked, NumericsClass, Offsets, QTensor
from qhal.elements import dtype_name
from qhal.encoding import encode
from qhal.mla import absorb
from qhal_portable.kv import read

H, NOPE, V, R, P, PAGE = 4, 8, 6, 32, 4, 4
KV_B = ("bf16", "e4m3fn.tensor*fp32", "e4m3fn.row*bf16", "int8.row*fp32", "int4.g16*fp16", "e4m3fn.2x16*fp32", "nvfp4")
CACHES = ("bf16", "e4m3fn.tensor*fp32", "e4m3fn.head*fp32", "e4m3fn.row*fp32", "int8.row*fp32", "int8.tensor*fp32")
BATCHES = {"prefill": ([7, 5], [7, 9]), "decode": ([1, 1, 1], [8, 1, 13]), "mixed": ([1, 6], [10, 6])}
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def per_head(ops, x, w, dtype):
    """x [T, H, K] through [H, N, K] -> [T, H, N], heads as experts; the two forms of groups agree."""
    fmt = w.format if isinstance(w, QTensor) else Format("bf16")
    x_format = Format(dtype_name(dtype))
    gemm = GemmRequest(
        w=fmt, n=w.shape[1], k=w.shape[2], x=(x_format,), out=dtype, numerics=NumericsClass.EXACT
    )  # fmt: skip
    tokens = x.shape[0]
    rows = x.transpose(0, 1).contiguous()
    counts = torch.full((H,), tokens, dtype=torch.int32)
    masked = ops.prepare(w, GroupedRequest(gemm=gemm, experts=H, groups="masked"))
    y = ops.grouped_gemm(rows, masked, Masked(counts))
    offsets = ops.prepare(w, GroupedRequest(gemm=gemm, experts=H, groups="offsets"))
    flat = ops.grouped_gemm(rows.flatten(0, 1), offsets, Offsets(torch.arange(H + 1, dtype=torch.int32) * tokens))
    assert torch.equal(flat.reshape(y.shape), y)
    return y.transpose(0, 1).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("phase", BATCHES)
@pytest.mark.parametrize("cache_format", CACHES)
@pytest.mark.parametrize("kv_b", KV_B)
def test_absorbed_is_unabsorbed(ops, attention_request, fill, plan, kv_b, cache_format, phase, dtype):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(H * (NOPE + V), R, generator=g)
    w = x.bfloat16() if kv_b == "bf16" else encode(x, Format.parse(kv_b))
    stacks = absorb(w, heads=H, nope=NOPE, v=V)
    f = Format.parse(cache_format)
    kv = KVRequest(kind="mla", k=f, v=Format("bf16"), heads=1, k_dim=R, v_dim=P, page=PAGE)
    queries, lens = BATCHES[phase]
    cache, table, _ = fill(ops, kv, lens)
    request = attention_request(kv, heads=H, scale=0.2, phase=phase, q=Format(dtype_name(dtype)), out=dtype)
    q_nope, q_rope = (torch.randn(sum(queries), H, n, generator=g).to(dtype) for n in (NOPE, P))

    q_latent = per_head(ops, q_nope, stacks.w_uk, dtype)
    latent = ops.attention(torch.cat([q_latent, q_rope], -1), cache, plan(ops, request, queries, lens, table))
    got = per_head(ops, latent, stacks.w_uv, dtype)

    by_head = (w.double() if kv_b == "bf16" else w.dequantize().double()).reshape(H, NOPE + V, R)
    w_uk, w_uv = by_head[:, :NOPE], by_head[:, NOPE:]
    u, at = UNIT[dtype], 0
    for b, (t, n) in enumerate(zip(queries, lens, strict=True)):
        pages = table[b, : -(-n // PAGE)].long()
        c, rope = read(cache, 0, pages, n)[:, 0].double(), read(cache, 1, pages, n)[:, 0].double()
        seen = torch.arange(n)[None] <= torch.arange(n - t, n)[:, None]
        for h in range(H):
            k = torch.cat([c @ w_uk[h].T, rope], -1)
            q = torch.cat([q_nope[at : at + t, h], q_rope[at : at + t, h]], -1).double()
            p = torch.softmax((q @ k.T * 0.2).masked_fill(~seen, -torch.inf), -1)
            want = p @ (c @ w_uv[h].T)
            # what may differ: q_latent, the result over latents and the result are each rounded once to dtype; scores
            # then err by at most ds, so every weight by the factor e^(2 ds)
            absorbed = (q_nope[at : at + t, h].double() @ w_uk[h]).abs()
            ds = (0.2 * u * absorbed @ c.abs().T).amax(-1, keepdim=True)
            middle = torch.expm1(2 * ds) * (p @ c.abs())
            middle = middle + u * ((p @ c).abs() + middle)
            bound = middle @ w_uv[h].abs().T
            bound = bound + u * (want.abs() + bound) + 2.0**-40 * (p @ c.abs()) @ w_uv[h].abs().T
            assert ((got[at : at + t, h].double() - want).abs() <= bound).all(), (b, h)
        at += t
