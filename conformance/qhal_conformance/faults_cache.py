"""Planted faults in paged caches, attention, grouped products and rotations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.elements import dtype_name
from qhal.formats import Format
from qhal.groups import Groups, Indexed, Masked, Offsets
from qhal.prepared import Prepared
from qhal.requests import AttentionRequest
from qhal.tensors import QTensor
from qhal_conformance.wrapping import Wrapped

Plan = tuple[Tensor, Tensor, Tensor]


class _Replanned(AttentionBatch):
    """A batch whose lengths and pages are spoiled before they are planned."""

    def __init__(
        self, inner: AttentionBatch, spoil: Callable[[Plan], Plan], tree: Callable[[Tensor], Tensor], page: int
    ) -> None:
        self.inner, self._spoil, self._tree, self._page = inner, spoil, tree, page

    def plan(
        self, query_lens: Tensor, kv_lens: Tensor, page_table: Tensor, *, tree: Tensor | None = None, **how: Any
    ) -> None:
        """Spoil, keep within the table, plan."""
        queries, keys, table = self._spoil((query_lens, kv_lens, page_table))
        keys = keys.clamp(0, table.shape[1] * self._page).to(torch.int32)
        if tree is not None:
            squares = [n * n for n in query_lens.tolist()]
            parts = tree.split(squares)
            spoiled = [self._tree(t.reshape(n, n)) for t, n in zip(parts, query_lens.tolist(), strict=True)]
            tree = torch.cat([t.reshape(-1) for t in spoiled])
        self.inner.plan(queries, keys, table, tree=tree, **how)


class _Attention(Wrapped):
    """Attention over a spoiled plan, tree, request, query or static scale."""

    def _request(self, r: AttentionRequest) -> AttentionRequest:
        return r

    def _plan(self, plan: Plan) -> Plan:
        return plan

    def _tree(self, tree: Tensor) -> Tensor:
        return tree

    def _query(self, q: Tensor, kv_heads: int) -> Tensor:
        return q

    def _static(self, name: str, plane: Tensor) -> Tensor:
        return plane

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """For the spoiled request."""
        inner = self._inner.attention_batch(self._request(request), limits)
        return _Replanned(inner, self._plan, self._tree, request.kv.page)

    def attention(
        self, q: Tensor, cache: KVCache, batch: AttentionBatch, *, sinks: Tensor | None = None, **how: Any
    ) -> Tensor:
        """With the spoiled query and scales; a sink that the spoiled request no longer has is dropped."""
        assert isinstance(batch, _Replanned)
        planes = {name: self._static(name, plane) for name, plane in cache.planes.items()}
        cache = KVCache(cache.request, planes, cache.layout, cache.host)
        q = self._query(q, cache.request.heads)
        keep = sinks if self.__dict__.get("_sinks", True) else None
        return self._inner.attention(q, cache, batch.inner, sinks=keep, **how)


def _attention(**methods: Any) -> type[Wrapped]:
    return type("AttentionFault", (_Attention,), methods)


def _changed(**fields: Any) -> type[Wrapped]:
    """A request with other fields."""
    return _attention(_request=lambda self, r: replace(r, **fields))


def _window(step: int) -> type[Wrapped]:
    def request(self: _Attention, r: AttentionRequest) -> AttentionRequest:
        return r if r.window is None else replace(r, window=r.window + step)

    return _attention(_request=request)


def _scale(wanted: str, change: Callable[[Tensor], Tensor]) -> type[Wrapped]:
    return _attention(_static=lambda self, name, plane: change(plane) if name == wanted else plane)


def _tree(change: Callable[[Tensor], Tensor]) -> type[Wrapped]:
    return _attention(_tree=lambda self, tree: change(tree))


def _unquantized_q(self: _Attention, r: AttentionRequest) -> AttentionRequest:
    return r if r.q.plain else replace(r, q=Format(dtype_name(r.out)))


def _lengths(change: Callable[[Tensor, Tensor], Tensor]) -> type[Wrapped]:
    return _attention(_plan=lambda self, plan: (plan[0], change(plan[0], plan[1]), plan[2]))


def _table(change: Callable[[Tensor], Tensor]) -> type[Wrapped]:
    return _attention(_plan=lambda self, plan: (plan[0], plan[1], change(plan[2])))


def _heads_modulo(self: _Attention, q: Tensor, kv_heads: int) -> Tensor:
    """Head h is given to group h % G: query rows exchanged before, so results stand in the wrong place too."""
    heads = q.shape[1]
    order = torch.arange(heads).reshape(heads // kv_heads, kv_heads).T.reshape(-1)
    return q[:, order]


class NoSinks(_Attention):
    """Sinks do not join the denominator."""

    def _request(self, r: AttentionRequest) -> AttentionRequest:
        self.__dict__["_sinks"] = False
        return replace(r, sinks=False)


class LseBaseTwo(_Attention):
    """lse is a logarithm to base 2."""

    def attention(
        self, q: Tensor, cache: KVCache, batch: AttentionBatch, *, lse: Tensor | None = None, **how: Any
    ) -> Tensor:
        """Scale the logarithm."""
        y = super().attention(q, cache, batch, lse=lse, **how)
        if lse is not None:
            lse *= 1.4426950408889634
        return y


class _Cache(Wrapped):
    """quant_kv with spoiled arguments."""

    def _args(self, k: Tensor, v: Tensor, slots: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Spoil, then write."""
        k, v, slots = self._args(k, v, slots, cache.request.page)
        self._inner.quant_kv(k, v, cache, slots.clamp(max=cache.pages * cache.request.page - 1))


def _cache(change: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]) -> type[Wrapped]:
    return type("CacheFault", (_Cache,), {"_args": lambda self, k, v, s, p: change(k, v, s, p)})


class _Grouped(Wrapped):
    """grouped_gemm with spoiled groups."""

    def _groups(self, groups: Groups, rows: int) -> Groups:
        return groups

    def grouped_gemm(self, x: Tensor | QTensor, w: Prepared, groups: Groups, **how: Any) -> Tensor | QTensor:
        """Spoil, then multiply."""
        return self._inner.grouped_gemm(x, w, self._groups(groups, x.shape[-2]), **how)


class OffsetPlusOne(_Grouped):
    """Every expert starts one row late."""

    def _groups(self, groups: Groups, rows: int) -> Groups:
        if not isinstance(groups, Offsets):
            return groups
        ends = groups.offsets.clone()
        ends[1:-1] = (ends[1:-1] + 1).clamp(max=int(ends[-1]))
        return Offsets(ends)


class ExpertPlusOne(_Grouped):
    """Tokens go to the next expert."""

    def _groups(self, groups: Groups, rows: int) -> Groups:
        if not isinstance(groups, Indexed):
            return groups
        return replace(groups, ids=torch.where(groups.ids < 0, groups.ids, (groups.ids + 1) % 5), cache={})


class ElsewhereIsZero(_Grouped):
    """id -1 is computed with expert 0."""

    def _groups(self, groups: Groups, rows: int) -> Groups:
        return replace(groups, ids=groups.ids.clamp(min=0), cache={}) if isinstance(groups, Indexed) else groups


class LastRowOfExpertLost(_Grouped):
    """The last row of every expert is not computed."""

    def _groups(self, groups: Groups, rows: int) -> Groups:
        return Masked((groups.counts - 1).clamp(min=0)) if isinstance(groups, Masked) else groups


class GateUpSwapped(Wrapped):
    """act(up) * gate."""

    def grouped_gemm(
        self, x: Tensor | QTensor, w: Prepared, groups: Groups, *, out: Tensor | QTensor | None = None
    ) -> Tensor | QTensor:
        """With the halves of the weight exchanged: shown through negated results where there is an activation."""
        y = self._inner.grouped_gemm(x, w, groups, out=out)
        request = w.request
        swapped = getattr(request, "activation", None) is not None and isinstance(y, Tensor)
        return y.roll(1, -1) if swapped and out is None and isinstance(y, Tensor) else (
            out.copy_(y.roll(1, -1)) if swapped and isinstance(out, Tensor) and isinstance(y, Tensor) else y
        )  # fmt: skip


def _neighbour(k: Tensor, v: Tensor, slots: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    return k, v, torch.where(slots >= 0, (slots // page) * page + (slots % page + 1) % page, slots)


def _half_pages(k: Tensor, v: Tensor, slots: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    return k, v, torch.where(slots > page, slots - page // 2, slots)


CACHE_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
    ("page-off-by-one", "kv", "the page table is read one entry late", _table(lambda t: t.roll(-1, 1))),
    ("pages-of-neighbour", "kv", "the page table of the next sequence", _table(lambda t: t.roll(-1, 0))),
    ("kv-length-short", "kv", "the last key is not read", _lengths(lambda q, k: k - 1)),
    ("kv-length-long", "kv", "one key too many is read", _lengths(lambda q, k: torch.where(k > 0, k + 1, k))),
    ("causal-top-left", "kv", "the causal mask aligns top left", _lengths(lambda q, k: torch.minimum(q, k))),
    ("not-causal", "kv", "no causal mask", _changed(causal=False)),
    ("window-plus-one", "kv", "the window is one key wider", _window(1)),
    ("window-minus-one", "kv", "the window is one key narrower", _window(-1)),
    ("heads-modulo", "kv", "head h reads group h % G", _attention(_query=_heads_modulo)),
    ("scale-missing", "kv", "scores are not scaled", _changed(scale=1.0)),
    ("softcap-ignored", "kv", "scores are not capped", _changed(softcap=None)),
    ("p-in-fp8", "kv", "P is rounded to e4m3fn, undeclared", _changed(p=Format("e4m3fn"))),
    ("sinks-ignored", "kv", NoSinks.__doc__ or "", NoSinks),
    ("tree-ignored", "kv", "new tokens see each other causally", _tree(lambda t: torch.ones_like(t).tril())),
    ("tree-transposed", "kv", "a token sees its descendants", _tree(lambda t: t.T)),
    ("q-scale-ignored", "kv", "the static scale of Q is taken for 1", _scale("q.scale", torch.ones_like)),
    ("q-scale-shared", "kv", "every head has the scale of head 0", _scale("q.scale", lambda t: t[:1].expand_as(t))),
    ("q-unquantized", "kv", "Q stays in its own type", _attention(_request=_unquantized_q)),
    ("p-scale-ignored", "kv", "the static scale of P is taken for 1", _scale("p.scale", torch.ones_like)),
    ("p-scale-start", "kv", "the static scale of P that was set is not used", _scale("p.scale", lambda t: t / 0.75)),
    ("lse-base-2", "kv", LseBaseTwo.__doc__ or "", LseBaseTwo),
    ("slot-skipped-written", "kv", "slot -1 is written to slot 0", _cache(lambda k, v, s, p: (k, v, s.clamp(min=0)))),
    ("slot-neighbour", "kv", "every token is written one slot late", _cache(_neighbour)),
    ("slot-page-size", "kv", "pages of half the size", _cache(_half_pages)),
    ("k-in-v", "kv", "K is written to V", _cache(lambda k, v, s, p: (k, k, s))),
    ("heads-rolled", "kv", "heads are written in another order", _cache(lambda k, v, s, p: (k.roll(1, 1), v, s))),
    ("expert-offset", "moe", OffsetPlusOne.__doc__ or "", OffsetPlusOne),
    ("expert-plus-one", "moe", ExpertPlusOne.__doc__ or "", ExpertPlusOne),
    ("elsewhere-is-zero", "moe", ElsewhereIsZero.__doc__ or "", ElsewhereIsZero),
    ("expert-row-lost", "moe", LastRowOfExpertLost.__doc__ or "", LastRowOfExpertLost),
    ("gate-up-shifted", "moe", "results of act(gate) * up stand one feature off", GateUpSwapped),
)  # fmt: skip
"""(name, profile, what is wrong, class)"""
