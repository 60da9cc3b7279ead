"""attention: arguments checked, queries quantized if they are asked so, and the kernels started."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from qhal.caches import KVCache
from qhal.errors import FormatError
from qhal.requests import AttentionRequest
from qhal_portable.attention import buffer, check_queries, same_cache
from qhal_portable.kv import check_planes, rows_of
from qhal_triton.attention.batch import TritonBatch
from qhal_triton.attention.config import Config, power
from qhal_triton.attention.kernels.attend import attend
from qhal_triton.attention.kernels.merge import merge
from qhal_triton.attention.paths import Arithmetic
from qhal_triton.attention.queries import Held, hold
from qhal_triton.kv.planes import RowPlanes
from qhal_triton.target import Target

_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}


def run(
    batch: TritonBatch, q: Tensor, cache: KVCache, sinks: Tensor | None, out: Tensor | None, lse: Tensor | None
) -> Tensor:
    """See QuantOps.attention."""
    request, kv, a, c = batch.request, batch.request.kv, batch.arithmetic, batch.config
    if not same_cache(cache.request, kv):
        raise FormatError(f"the cache is {cache.request}, the batch was made for {kv}")
    (first, _, _), (second, _, _) = rows_of(cache)
    check_planes(cache)
    mla = kv.kind == "mla"
    wide, width = (kv.k_dim + kv.v_dim, kv.k_dim) if mla else (kv.k_dim, kv.v_dim)
    check_queries(q, request, sinks, batch.tokens, wide)
    result = buffer(out, (batch.tokens, request.heads, width), request.out, "out", q.device)
    logs = None if lse is None else buffer(lse, (batch.tokens, request.heads), torch.float32, "lse", q.device)
    for name, t in (
        ("q", q),
        ("sinks", sinks),
        ("out", out),
        ("lse", lse),
        ("the cache", next(iter(cache.planes.values()))),
    ):
        if t is not None and t.device != batch.device:
            raise FormatError(f"attention: {name} is on {t.device}, must be on {batch.device}")
    if not batch.tokens:
        return result
    qs, rope = _queries(q.detach(), request, a, cache)
    k, v = RowPlanes.of(cache, first, a.k), RowPlanes.of(cache, second, a.v)
    weight_scale = _static(cache, "p.scale", request) if a.p_static else qs.codes
    log = result if logs is None else logs
    share = request.heads // kv.heads
    attend[(batch.blocks, kv.heads * -(-share // c.together), c.splits)](
        *qs.flat(), rope.codes, *rope.codes.stride(), rope.scale, rope.groups, *k.flat(), *v.flat(),
        batch.steps, batch.table, batch.table.stride(0), cache.pages, batch.tree,
        log if sinks is None else sinks, weight_scale,
        result, *result.stride(), log, *log.stride()[:2],
        *((batch.partial, batch.tops, batch.sums) if c.splits > 1 else (log, log, log)),
        batch.limits.batch, batch.blocks, c.splits, request.scale, request.softcap or 1.0,
        **constants(request, a, c, batch.target), SINKS=sinks is not None, LSE=logs is not None,
        num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if c.splits > 1:
        merge[(batch.tokens * request.heads, -(-width // 64))](
            batch.partial, batch.tops, batch.sums, log if sinks is None else sinks, result, *result.stride(), log,
            *log.stride()[:2], c.splits, HEADS=request.heads, D=width, COLS=64,
            ALL=power(c.splits), SINKS=sinks is not None, LSE=logs is not None, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return result


@lru_cache(maxsize=1024)
def constants(request: AttentionRequest, a: Arithmetic, c: Config, target: Target) -> dict[str, Any]:
    """The constexpr arguments of `attend` that follow from the request."""
    kv = request.kv
    native = target.kind == "cuda" and "e4m3fn" in target.fp8
    columns = (max(power(-(-dim // (1 + row.packed))), 16) for dim, row in ((kv.k_dim, a.k), (kv.v_dim, a.v)))
    return dict(
        Q=a.q, QR=a.rope, K=a.k, V=a.v,
        Q_PARTS=a.q_parts, QR_PARTS=a.rope_parts, K_PARTS=a.k_parts, V_PARTS=a.v_parts,
        TYPE=_TYPES[a.type], QK_ROPE=_TYPES[a.rope_type],
        P=a.p, P_STATIC=a.p_static, P_DIVIDES=a.p_divides, P_PARTS=a.p_parts, PV=_TYPES[a.pv],
        MLA=kv.kind == "mla", HEADS=request.heads, SHARE=request.heads // kv.heads, TOGETHER=c.together,
        DK=kv.k_dim, DV=kv.v_dim, **dict(zip(("BK", "BV"), columns, strict=True)), PAGE=kv.page,
        M=c.m, N=c.n, SPLIT=c.splits > 1,
        CAUSAL=request.causal, WINDOW=request.window or 0, TREE=request.tree, SOFTCAP=request.softcap is not None,
        NATIVE_K=native, NATIVE_V=native,
    )  # fmt: skip


def _queries(q: Tensor, request: AttentionRequest, a: Arithmetic, cache: KVCache) -> tuple[Held, Held]:
    """The rows that meet the keys, and those that meet the rope keys (MLA; else the same)."""
    latent = request.kv.k_dim
    if request.q_rope is not None:
        return hold(q[..., :latent], request.q, a.q, cache), hold(q[..., latent:], request.q_rope, a.rope, cache)
    whole = hold(q, request.q, a.q, cache)
    return whole, whole.after(latent, a.q) if request.kv.kind == "mla" else whole


def _static(cache: KVCache, name: str, request: AttentionRequest) -> Tensor:
    plane = cache.planes.get(name)
    if plane is None:
        raise FormatError(
            f"the cache has no plane {name} for p={request.p}; make it from kv_planes(request, attention=[...])"
        )
    return plane
