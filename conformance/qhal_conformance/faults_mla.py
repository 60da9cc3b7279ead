"""Planted faults in latent attention: the parts of a row, their scales, the scale of scores, what is written where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.requests import AttentionRequest
from qhal_conformance.wrapping import Wrapped

Planes = dict[str, Tensor]


class _Latent(Wrapped):
    """Attention with a spoiled request, query, cache and result; r features of a query are its latent part."""

    def _request(self, r: AttentionRequest) -> AttentionRequest:
        return r

    def _query(self, q: Tensor, r: int) -> Tensor:
        return q

    def _planes(self, planes: Planes) -> Planes:
        return planes

    def _result(self, y: Tensor, rope: int) -> Tensor:
        return y

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """For the spoiled request."""
        return self._inner.attention_batch(self._request(request), limits)

    def attention(
        self, q: Tensor, cache: KVCache, batch: AttentionBatch, *, out: Tensor | None = None, **how: Any
    ) -> Tensor:
        """Spoil, attend, spoil."""
        latent, rope = cache.request.k_dim, cache.request.v_dim
        cache = KVCache(cache.request, self._planes(dict(cache.planes)), cache.layout, cache.host)
        y = self._inner.attention(self._query(q, latent), cache, batch, **how)
        y = self._result(y, rope).contiguous()
        return y if out is None else out.copy_(y)


def _request(change: Callable[[AttentionRequest], AttentionRequest]) -> type[Wrapped]:
    return type("MlaFault", (_Latent,), {"_request": lambda self, r: change(r)})


def _query(change: Callable[[Tensor, int], Tensor]) -> type[Wrapped]:
    return type("MlaFault", (_Latent,), {"_query": lambda self, q, r: change(q.clone(), r)})


def _result(change: Callable[[Tensor, int], Tensor]) -> type[Wrapped]:
    return type("MlaFault", (_Latent,), {"_result": lambda self, y, rope: change(y, rope)})


def _plane(name: str, change: Callable[[Tensor], Tensor]) -> type[Wrapped]:
    """One plane of the cache, if it has it, read in another way."""

    def planes(self: _Latent, found: Planes) -> Planes:
        return found | ({name: change(found[name])} if name in found else {})

    return type("MlaFault", (_Latent,), {"_planes": planes})


class RopeScaleOfLatent(_Latent):
    """The rope row is read with the scale of the latent row."""

    def _planes(self, planes: Planes) -> Planes:
        one, other = planes.get("latent.scale"), planes.get("rope.scale")
        same = one is not None and other is not None and one.shape == other.shape and one.dtype == other.dtype
        return planes | {"rope.scale": one} if same and one is not None else planes


class _Written(Wrapped):
    """quant_kv with spoiled rows."""

    def _rows(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Spoil, then write."""
        self._inner.quant_kv(*self._rows(k, v), cache, slots)


def _written(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> type[Wrapped]:
    return type("MlaFault", (_Written,), {"_rows": lambda self, latent, rope: change(latent, rope)})


class RopeNotWritten(Wrapped):
    """The rope row is left as it was."""

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Write, then put the rope planes back."""
        before = {name: t.clone() for name, t in cache.planes.items() if name.startswith("rope.")}
        self._inner.quant_kv(k, v, cache, slots)
        for name, t in before.items():
            cache.planes[name].copy_(t)


class LatentTwice(Wrapped):
    """The latent row is also written to the slot after, as a kernel that writes whole vectors past its row does."""

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """The last token's once more."""
        self._inner.quant_kv(k, v, cache, slots)
        limit = cache.pages * cache.request.page - 1
        if slots.numel() and 0 <= int(slots[-1]) < limit:
            self._inner.quant_kv(k[-1:], v[-1:], cache, slots[-1:] + 1)


def _values_late(y: Tensor, rope: int) -> Tensor:
    return torch.cat([y[..., rope:], torch.zeros_like(y[..., :rope])], -1)


def _rope_zero(q: Tensor, r: int) -> Tensor:
    q[..., r:] = 0
    return q


def _rope_half_negated(q: Tensor, r: int) -> Tensor:
    q[..., r : (q.shape[-1] + r) // 2] *= -1
    return q


def _latent_zero(q: Tensor, r: int) -> Tensor:
    q[..., :r] = 0
    return q


MLA_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
    ("mla-rope-missing", "mla", "scores lack the rope part", _query(_rope_zero)),
    ("mla-latent-missing", "mla", "scores have the rope part only", _query(_latent_zero)),
    ("mla-rope-first", "mla", "the rope part of a query is taken to stand first",
     _query(lambda q, r: torch.cat([q[..., -r:], q[..., :-r]], -1))),
    ("mla-rope-negated", "mla", "half of the rope part has the wrong sign",
     _query(_rope_half_negated)),
    ("mla-values-late", "mla", "values are one rope part late: features P to R + P of a row", _result(_values_late)),
    ("mla-values-block", "mla", "the last 16 features of the values are not summed",
     _result(lambda y, p: torch.cat([y[..., :-16], 0 * y[..., -16:]], -1))),
    ("mla-scale-latent", "mla", "scores are scaled by R^-1/2",
     _request(lambda r: replace(r, scale=r.kv.k_dim**-0.5))),
    ("mla-scale-row", "mla", "scores are scaled by (R + P)^-1/2",
     _request(lambda r: replace(r, scale=(r.kv.k_dim + r.kv.v_dim) ** -0.5))),
    ("mla-query-whole", "mla", "both parts of a query share one scale", _request(lambda r: replace(r, q_rope=None))),
    ("mla-query-plain", "mla", "a query that is held in codes stays in its own type",
     _request(lambda r: replace(r, q=r.p if r.p.plain else r.q, q_rope=None))),
    ("mla-heads-shifted", "mla", "head h reads the query of head h + 1", _query(lambda q, r: q.roll(-1, 1))),
    ("mla-token-scale", "mla", "the latent scale of the slot before",
     _plane("latent.scale", lambda t: t.roll(1, 1) if t.dim() > 1 else t)),
    ("mla-block-scale", "mla", "the latent scale of the next block of the row",
     _plane("latent.scale", lambda t: t.roll(-1, -1) if t.dim() == 3 else t)),
    ("mla-first-block-scale", "mla", "every block of a latent row has the scale of its first",
     _plane("latent.scale", lambda t: t[..., :1].expand_as(t).contiguous() if t.dim() == 3 else t)),
    ("mla-latent-scale-ignored", "mla", "the static scale of latent rows is taken for 1",
     _plane("latent.scale", lambda t: torch.ones_like(t) if t.dim() == 1 else t)),
    ("mla-rope-scale-ignored", "mla", "the scale of rope rows is taken for 1", _plane("rope.scale", torch.ones_like)),
    ("mla-rope-scale-of-latent", "mla", RopeScaleOfLatent.__doc__ or "", RopeScaleOfLatent),
    ("mla-rope-not-written", "mla", RopeNotWritten.__doc__ or "", RopeNotWritten),
    ("mla-rope-of-neighbour", "mla", "the rope row of the next token is written",
     _written(lambda c, p: (c, p.roll(-1, 0)))),
    ("mla-rope-from-latent", "mla", "the rope row is cut out of the latent row",
     _written(lambda c, p: (c, c[..., : p.shape[-1]].contiguous()))),
    ("mla-latent-halves", "mla", "the halves of a latent row are exchanged",
     _written(lambda c, p: (c.roll(c.shape[-1] // 2, -1), p))),
    ("mla-latent-twice", "mla", LatentTwice.__doc__ or "", LatentTwice),
)  # fmt: skip
"""(name, profile, what is wrong, class)"""
