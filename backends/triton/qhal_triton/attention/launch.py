"""attention: arguments checked, queries quantized if they are asked so, and the kernels started."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.errors import FormatError
from qhal.requests import AttentionRequest
from qhal_portable.attention import buffer, check_queries, same_cache
from qhal_portable.kv import check_planes, rows_of
from qhal_triton.attention.batch import TritonBatch
from qhal_triton.attention.paths import Arithmetic
from qhal_triton.attention.queries import Held, hold
from qhal_triton.kv.planes import RowPlanes, remembered


def run(
    batch: TritonBatch, q: Tensor, cache: KVCache, sinks: Tensor | None, out: Tensor | None, lse: Tensor | None
) -> Tensor:
    """See QuantOps.attention."""
    request, kv, a, c = batch.request, batch.request.kv, batch.arithmetic, batch.config
    seen = remembered(cache, batch.reader, lambda: _Seen.of(cache, request, a, batch.words))
    mla = kv.kind == "mla"
    wide, width = (kv.k_dim + kv.v_dim, kv.k_dim) if mla else (kv.k_dim, kv.v_dim)
    check_queries(q, request, sinks, batch.tokens, wide)
    result = buffer(out, (batch.tokens, request.heads, width), request.out, "out", q.device)
    into = result if result.stride(-1) == 1 else torch.empty_like(result, memory_format=torch.contiguous_format)
    logs = None if lse is None else buffer(lse, (batch.tokens, request.heads), torch.float32, "lse", q.device)
    for name, t in (("q", q), ("sinks", sinks), ("out", out), ("lse", lse), ("the cache", seen.tensors[0])):
        if t is not None and t.device != batch.device:
            raise FormatError(f"attention: {name} is on {t.device}, must be on {batch.device}")
    if not batch.tokens:
        return result
    qs, rope = _queries(q.detach() if q.requires_grad else q, request, a, cache)
    weight_scale = _static(cache, "p.scale", request) if a.p_static else batch.tops
    none = batch.tops  # for what is not there: a kernel is compiled by the types of its arguments
    log, at = (none, (0, 0)) if logs is None else (logs, logs.stride())
    given = none if sinks is None else sinks
    has = (int(sinks is not None), int(logs is not None))
    batch.attend(
        batch.grid,
        (*qs.planes(), rope.codes, rope.scale, *seen.tensors, given, weight_scale, into, log),
        (*qs.numbers(), *rope.numbers(), *seen.numbers, *into.stride()[:2], *at, *has),
    )
    if c.splits > 1:
        grid = (batch.tokens * request.heads, -(-width // batch.columns), 1)
        batch.merge(grid, (given, into, log), (*into.stride()[:2], *at, *has))
    return result if into is result else result.copy_(into)


class _Seen(NamedTuple):
    """A cache as the kernel takes it: planes of K and V, their strides, and the number of pages."""

    tensors: tuple[Tensor, ...]
    numbers: tuple[int, ...]

    @staticmethod
    def of(cache: KVCache, request: AttentionRequest, a: Arithmetic, words: tuple[bool, bool]) -> _Seen:
        """FormatError for a cache that is not of the batch's kind, or whose planes are not canonical."""
        if not same_cache(cache.request, request.kv):
            raise FormatError(f"the cache is {cache.request}, the batch was made for {request.kv}")
        (first, _, _), (second, _, _) = rows_of(cache)
        check_planes(cache)
        k, v = RowPlanes.of(cache, first, a.k), RowPlanes.of(cache, second, a.v)
        k, v = (planes.in_words() if both else planes for planes, both in zip((k, v), words, strict=True))
        return _Seen((*k.tensors(), *v.tensors()), (*k.strides(), *v.strides(), cache.pages))


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
