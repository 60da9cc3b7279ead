"""attention: arguments checked, queries quantized if they are asked so, and the kernels started."""

from __future__ import annotations

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.errors import FormatError
from qhal.requests import AttentionRequest
from qhal_portable.attention import buffer, check_queries, same_cache
from qhal_portable.kv import check_planes, rows_of
from qhal_triton.attention.batch import TritonBatch
from qhal_triton.attention.config import power
from qhal_triton.attention.kernels.attend import attend
from qhal_triton.attention.kernels.merge import merge
from qhal_triton.attention.paths import Arithmetic
from qhal_triton.attention.queries import Held, hold
from qhal_triton.kv.planes import RowPlanes


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
    into = result if result.stride(-1) == 1 else torch.empty_like(result, memory_format=torch.contiguous_format)
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
    weight_scale = _static(cache, "p.scale", request) if a.p_static else batch.tops
    none = batch.tops  # for what is not there: a kernel is compiled by the types of its arguments
    log, at = (none, (0, 0)) if logs is None else (logs, logs.stride())
    share, split = request.heads // kv.heads, c.splits > 1
    has = (int(sinks is not None), int(logs is not None))
    attend[(batch.blocks, kv.heads * -(-share // c.together), c.splits)](
        *qs.flat(), rope.codes, *rope.codes.stride()[:2], rope.scale, rope.groups, *k.flat(), *v.flat(),
        batch.steps, batch.table, batch.table.stride(0), cache.pages, batch.tree,
        none if sinks is None else sinks, weight_scale, into, *into.stride()[:2], log, *at,
        *((batch.partial, batch.tops, batch.sums) if split else (none, none, none)),
        batch.limits.batch, batch.blocks, c.splits, kv.page.bit_length() - 1, request.heads, share, c.together,
        int(request.causal and not request.tree), request.window or 0, *has, request.scale, request.softcap or 1.0,
        **batch.constants, num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if split:
        merge[(batch.tokens * request.heads, -(-width // 64))](
            batch.partial, batch.tops, batch.sums, none if sinks is None else sinks, into, *into.stride()[:2], log,
            *at, c.splits, request.heads, width, *has, COLS=64, ALL=power(c.splits), num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return result if into is result else result.copy_(into)


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
