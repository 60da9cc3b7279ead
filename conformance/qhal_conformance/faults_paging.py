"""Planted faults in the forms of paged caches and attention: far sizes, options, what is written when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.requests import AttentionRequest
from qhal_conformance.wrapping import Wrapped


def _written(change: Callable[[Tensor, Tensor, Tensor, KVCache], tuple[Tensor, Tensor, Tensor]]) -> type[Wrapped]:
    def quant_kv(self: Wrapped, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        k, v, slots = change(k, v, slots, cache)
        self._inner.quant_kv(k, v, cache, slots)

    return type("WriteFault", (Wrapped,), {"quant_kv": quant_kv})


def _dropped(which: Callable[[Tensor, KVCache], Tensor]) -> type[Wrapped]:
    """Some slots are not written."""
    return _written(lambda k, v, s, c: (k, v, torch.where(which(s, c), torch.full_like(s, -1), s)))


def _all_skipped(k: Tensor, v: Tensor, slots: Tensor, cache: KVCache) -> tuple[Tensor, Tensor, Tensor]:
    """A step in which every token is skipped is written to slot 0."""
    return k, v, slots.clamp(min=0) if len(slots) and bool((slots < 0).all()) else slots


def _consecutive(k: Tensor, v: Tensor, slots: Tensor, cache: KVCache) -> tuple[Tensor, Tensor, Tensor]:
    """The slots of a call are taken as consecutive from its first."""
    if not len(slots):
        return k, v, slots
    line = (slots[0] + torch.arange(len(slots), device=slots.device)).clamp(max=cache.pages * cache.request.page - 1)
    return k, v, torch.where(slots < 0, slots, line.to(slots.dtype))


class SecondWriteIgnored(Wrapped):
    """A cache takes rows once."""

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Only the first time."""
        seen: set[int] = self.__dict__.setdefault("_caches", set())
        if id(cache) not in seen:
            self._inner.quant_kv(k, v, cache, slots)
        seen.add(id(cache))


class ValuesByKeyScale(Wrapped):
    """V is quantized with the static scale of K."""

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Exchange the plane for the call."""
        planes, static = cache.planes, ("k.scale", "v.scale")
        if not all(n in planes and planes[n].numel() == 1 for n in static):
            return self._inner.quant_kv(k, v, cache, slots)
        spoiled = dict(planes) | {"v.scale": planes["k.scale"].clone()}
        return self._inner.quant_kv(k, v, KVCache(cache.request, spoiled, cache.layout, cache.host), slots)


class _Planned(AttentionBatch):
    """A batch planned with other lengths."""

    first_page = 0

    def __init__(self, inner: AttentionBatch, longest: int, device_lengths: bool) -> None:
        self.inner, self._longest, self._device_lengths = inner, longest, device_lengths

    def plan(
        self,
        query_lens: Tensor,
        kv_lens: Tensor,
        page_table: Tensor,
        *,
        kv_lens_device: Tensor | None = None,
        **how: Any,
    ) -> None:
        """Cut, or without the lengths on the device."""
        type(self).first_page = int(page_table.reshape(-1)[0]) if page_table.numel() else 0
        known = kv_lens_device if self._device_lengths else None
        keys = kv_lens.clamp(max=self._longest)
        known = None if known is None else known.clamp(max=self._longest)
        self.inner.plan(query_lens, keys, page_table, kv_lens_device=known, **how)


class _Attention(Wrapped):
    """Attention over a changed request or plan; `_spoil` changes the result."""

    _longest = 1 << 30
    _device_lengths = True

    def _request(self, r: AttentionRequest) -> AttentionRequest:
        return r

    def _spoil(self, y: Tensor, lse: Tensor | None, r: AttentionRequest, sinks: Tensor | None) -> None:
        return None

    def _sinks(self, sinks: Tensor) -> Tensor:
        return sinks

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """For the changed request."""
        made = self._inner.attention_batch(self._request(request), limits)
        return _Planned(made, self._longest, self._device_lengths)

    def attention(
        self,
        q: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        *,
        sinks: Tensor | None = None,
        lse: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        """Attend, change."""
        assert isinstance(batch, _Planned)
        changed = None if sinks is None else self._sinks(sinks)
        y = self._inner.attention(q, cache, batch.inner, sinks=changed, lse=lse, **how)
        self._spoil(y, lse, batch.inner.request, sinks)  # type: ignore[attr-defined]
        return y


def _attention(**members: Any) -> type[Wrapped]:
    return type("AttentionForm", (_Attention,), members)


def _usual_scale(self: _Attention, r: AttentionRequest) -> AttentionRequest:
    return replace(r, scale=r.kv.k_dim**-0.5)


def _lse_without_sinks(
    self: _Attention, y: Tensor, lse: Tensor | None, r: AttentionRequest, sinks: Tensor | None
) -> None:
    if lse is not None and sinks is not None:
        kept = torch.log((torch.exp(lse.double()) - torch.exp(sinks.double())).clamp(min=1e-30))
        lse.copy_(torch.where(torch.isinf(lse), lse, kept.to(lse.dtype)))


def _lse_finite(self: _Attention, y: Tensor, lse: Tensor | None, r: AttentionRequest, sinks: Tensor | None) -> None:
    if lse is not None:
        lse.nan_to_num_(neginf=-1e30)


def _by_page(self: _Attention, y: Tensor, lse: Tensor | None, r: AttentionRequest, sinks: Tensor | None) -> None:
    if r.p.plain and r.p.element in ("bf16", "fp16") and _Planned.first_page % 2:
        y.mul_(1 + torch.finfo(y.dtype).eps / 2)


def _one_sided(self: _Attention, r: AttentionRequest) -> AttentionRequest:
    return replace(r, causal=True) if r.window is not None else r


PAGING_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
    ("tokens-past-512", "kv", "tokens past 512 are not written",
     _dropped(lambda s, c: torch.arange(len(s), device=s.device) >= 512)),
    ("one-token", "kv", "a single token is not written",
     _dropped(lambda s, c: torch.full_like(s == 0, len(s) == 1))),
    ("page-of-64", "kv", "pages of 64 slots are filled from their start",
     _written(lambda k, v, s, c: (k, v, torch.where(s > 0, s - s % 64, s)) if c.request.page == 64 else (k, v, s))),
    ("heads-of-eight", "kv", "eight heads are written in another order",
     _written(lambda k, v, s, c: (k.roll(1, 1), v, s) if k.shape[1] == 8 else (k, v, s))),
    ("all-skipped", "kv", _all_skipped.__doc__ or "", _written(_all_skipped)),
    ("slots-consecutive", "kv", _consecutive.__doc__ or "", _written(_consecutive)),
    ("pages-order-sums", "kv", "the last bit depends on which page a sequence starts in",
     _attention(_spoil=_by_page)),
    ("second-write", "kv", SecondWriteIgnored.__doc__ or "", SecondWriteIgnored),
    ("values-by-key-scale", "kv", ValuesByKeyScale.__doc__ or "", ValuesByKeyScale),
    ("cache-through-fp16", "kv", "bf16 rows pass through fp16",
     _written(lambda k, v, s, c: (k.half().to(k.dtype), v.half().to(v.dtype), s))),
    ("keys-past-1024", "kv", "keys past 1024 are not seen", _attention(_longest=1024)),
    ("keys-past-48", "kv", "pages past the third are not seen", _attention(_longest=48)),
    ("device-lengths-ignored", "kv", "the host's upper bounds are taken for lengths",
     _attention(_device_lengths=False)),
    ("usual-scale", "kv", "scores are scaled by 1 / sqrt d, whatever was asked",
     _attention(_request=_usual_scale)),
    ("window-is-causal", "kv", "a window without causal mask hides later keys",
     _attention(_request=_one_sided)),
    ("sinks-rolled", "kv", "each head has its neighbour's sink", _attention(_sinks=lambda self, s: s.roll(1))),
    ("lse-without-sinks", "kv", "lse leaves the sinks out", _attention(_spoil=_lse_without_sinks)),
    ("lse-finite", "kv", "lse of a row without keys is finite", _attention(_spoil=_lse_finite)),
)  # fmt: skip
"""(name, profile, what is wrong, class)"""
