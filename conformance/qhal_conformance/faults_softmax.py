"""Planted faults inside softmax: its maximum, its denominator, the order of keys, the codes of P.

Attention is computed here from the planes of the cache; every mutant changes one step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.elements import element
from qhal.requests import AttentionRequest
from qhal_conformance.wrapping import Wrapped, rounded


class _Planned(AttentionBatch):
    """A batch that keeps what it was planned with."""

    def __init__(self, inner: AttentionBatch, request: AttentionRequest) -> None:
        self.inner, self.request = inner, request
        self.steps: list[tuple[int, int, Tensor]] = []

    def plan(self, query_lens: Tensor, kv_lens: Tensor, page_table: Tensor, **how: Any) -> None:
        """Keep (queries, keys, pages) of every sequence."""
        self.inner.plan(query_lens, kv_lens, page_table, **how)
        known, page = how.get("kv_lens_device"), self.request.kv.page
        keys = (kv_lens if known is None else known).tolist()
        self.steps = [(n, k, page_table[b, : -(-k // page)].cpu().long())
                      for b, (n, k) in enumerate(zip(query_lens.tolist(), keys, strict=True))]  # fmt: skip


class Softmax(Wrapped):
    """Attention in float64, a tile of keys after the other under a running maximum, rounded once. Trees, sinks,
    quantized queries, latent rows, and codes of P but for one mutant, are handed over."""

    _codes = False

    def _order(self, pages: Tensor) -> Tensor:
        """In which order the pages of a sequence are visited."""
        return torch.arange(len(pages))

    def _maximum(self, top: Tensor, s: Tensor) -> Tensor:
        """[H, T, 1]: what is subtracted, from the maximum so far and the scores [H, T, L] of a tile."""
        return torch.maximum(top, s.amax(-1, keepdim=True))

    def _total(self, e: Tensor) -> Tensor:
        """[H, T, 1]: a tile's part of the denominator, from exp(s - max)."""
        return e.sum(-1, keepdim=True)

    def _held(self, e: Tensor, request: AttentionRequest, scale: Tensor | None) -> Tensor:
        """P as it is multiplied with the values."""
        if scale is None:
            return rounded(e, element(request.p.element).storage).double()
        return (e / scale).round().clamp(max=request.p.qmax) * scale

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """One that remembers."""
        return _Planned(self._inner.attention_batch(request, limits), request)

    def attention(
        self,
        q: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        """As the backend inside does it, then the result and its logarithm again."""
        assert isinstance(batch, _Planned)
        y = self._inner.attention(q, cache, batch.inner, out=out, lse=lse, **how)
        r = batch.request
        held = r.p.plain or (self._codes and r.p.element in ("int8", "uint8"))
        if r.tree or r.sinks or not r.q.plain or r.kv.kind != "mha" or not held:
            return y
        k, v, at = _numbers(self._inner, cache, "k"), _numbers(self._inner, cache, "v"), 0
        scale = None if r.p.plain else cache.planes["p.scale"].double()
        for queries, keys, pages in batch.steps:
            o, log = self._sequence(q[at : at + queries].double(), k, v, keys, pages, r, scale)
            y[at : at + queries] = rounded(o, y.dtype)
            if lse is not None:
                lse[at : at + queries] = log
            at += queries
        return y

    def _sequence(
        self, q: Tensor, k: Tensor, v: Tensor, keys: int, pages: Tensor, r: AttentionRequest, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        share = r.heads // r.kv.heads
        top, total = torch.full((r.heads, len(q), 1), -torch.inf, dtype=torch.float64), torch.zeros(r.heads, len(q), 1)
        o = torch.zeros(r.heads, len(q), r.kv.v_dim, dtype=torch.float64)
        last = torch.arange(keys - len(q), keys)[:, None]
        for i in self._order(pages).tolist():
            place = torch.arange(i * r.kv.page, min((i + 1) * r.kv.page, keys))
            rows = (t[pages[i], : len(place)].repeat_interleave(share, 1) for t in (k, v))
            kt, vt = (row.permute(1, 0, 2) for row in rows)
            s = q.permute(1, 0, 2) @ kt.mT * r.scale
            if r.softcap is not None:
                s = r.softcap * torch.tanh(s / r.softcap)
            seen = place <= last if r.causal else torch.ones(len(q), len(place), dtype=torch.bool)
            seen = seen if r.window is None else seen & (place > last - r.window)
            s = s.masked_fill(~seen, -torch.inf)
            above = self._maximum(top, s)
            safe = torch.where(torch.isinf(above), 0.0, above)
            e, shrink = torch.exp((s - safe).float()).double(), torch.exp((top - safe).float()).double()
            total = total * shrink + self._total(e)
            o, top = o * shrink + self._held(e, r, scale) @ vt, above
        some = ~torch.isinf(top)
        o = torch.where(some, o / torch.where(some, total, 1.0), 0.0)
        return o.permute(1, 0, 2), (top + torch.log(total)).squeeze(-1).T.float()


def _numbers(ops: Any, cache: KVCache, name: str) -> Tensor:
    """float64 [pages, slots, G, D] of a cache."""
    whole = cache if cache.layout == "canonical" else ops.restore(cache)
    codes, scale = whole.planes[f"{name}.codes"].double(), whole.planes.get(f"{name}.scale")
    if scale is None:
        return codes
    return codes * (scale.double() if scale.numel() == 1 else scale.double()[..., None])


class FirstMaximum(Softmax):
    """The maximum of the first tile is subtracted from all: exp of a larger score overflows."""

    def _maximum(self, top: Tensor, s: Tensor) -> Tensor:
        return torch.where(torch.isinf(top), s.amax(-1, keepdim=True), top)


class EqualMaximaOnce(Softmax):
    """The denominator is 1 and the scores below the maximum: equal maxima count once."""

    def _total(self, e: Tensor) -> Tensor:
        below = torch.where(e < 1, e, 0.0).sum(-1, keepdim=True)
        return below + (e == 1).any(-1, keepdim=True)


class PagesInOrder(Softmax):
    """Pages are visited in the order in which they lie in the cache."""

    def _order(self, pages: Tensor) -> Tensor:
        return torch.argsort(pages)


class CodesCut(Softmax):
    """The kernel for mixed batches cuts integer codes of P, and rounds none."""

    _codes = True

    def _held(self, e: Tensor, request: AttentionRequest, scale: Tensor | None) -> Tensor:
        held = super()._held(e, request, scale)
        cut = scale is not None and request.phase == "mixed"
        return held if scale is None or not cut else (e / scale).floor().clamp(max=request.p.qmax) * scale


SOFTMAX_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = tuple(
    (name, "kv", kind.__doc__ or "", kind)
    for name, kind in (
        ("softmax-first-maximum", FirstMaximum),
        ("softmax-equal-maxima", EqualMaximaOnce),
        ("softmax-pages-in-order", PagesInOrder),
        ("softmax-codes-cut", CodesCut),
    )
)
"""(name, profile, what is wrong, class)"""
