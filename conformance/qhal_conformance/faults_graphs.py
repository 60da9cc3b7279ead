"""Planted faults in graph capture, around an honest replay (`replaying.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.codebooks import CodebookTensor
from qhal.errors import UnsupportedError
from qhal.prepared import Prepared
from qhal.requests import AttentionRequest, GemmRequest, Support
from qhal.tensors import QTensor
from qhal_conformance.replaying import Replaying
from qhal_conformance.wrapping import Weight, WeightRequest, Wrapped


class ReplayStale(Replaying):
    """A replay returns what the captured run computed."""

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Nothing is run again."""
        first = fn()
        return lambda: first


class ReplayMoves(Replaying):
    """A replay returns its result at a new address."""

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """No fixed result."""
        fn()
        return fn


class CaptureRefuses(Replaying):
    """Graphs are claimed, capture refuses."""

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """As a backend without graphs."""
        raise UnsupportedError(Support("unsupported", "no graphs here"))


class CaptureUnclaimed(Wrapped):
    """No operation claims graphs, capture works all the same."""

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """The function itself."""
        return fn


class ReplayLeaks(Replaying):
    """Every replay takes a new workspace and keeps it."""

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """A mebibyte per replay."""
        replay, kept = super().capture(fn), []

        def leaking() -> Any:
            kept.append(torch.ones(1 << 18))
            return replay()

        return leaking


class ReplaysMix(Replaying):
    """All graphs share one pool: a replay of one runs the one that was captured last."""

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """The last."""
        self.__dict__["_last"] = super().capture(fn)
        return lambda: self.__dict__["_last"]()


class ReplayKeepsWeight(Replaying):
    """A refit is seen by plain calls, not by graphs that were captured before."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self._refitted: dict[int, Prepared] = {}
        self._replays = False

    def prepare(self, w: Weight, request: WeightRequest, *, into: Prepared | None = None, **how: Any) -> Prepared:
        """Into another object, which plain calls read."""
        if into is None or not isinstance(request, GemmRequest):
            return super().prepare(w, request, into=into, **how)
        made = super().prepare(w, request, **how)
        self._refitted[into.handle] = made
        return into

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """Of the new one."""
        return self._inner.restore(self._refitted.get(thing.handle, thing) if isinstance(thing, Prepared) else thing)

    def gemm(self, x: Tensor | QTensor, w: Prepared, **how: Any) -> Tensor:
        """With the new one, outside graphs."""
        now = w if self._replays else self._refitted.get(w.handle, w)
        return self._inner.gemm(x, now, **how)

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Replays know that they are."""
        replay = super().capture(fn)

        def replaying() -> Any:
            self._replays = True
            try:
                return replay()
            finally:
                self._replays = False

        return replaying


class ReplayKeepsScales(ReplayKeepsWeight):
    """Products of two quantized operands keep a float32 copy of 16-bit scales, which graphs read after a refit."""

    def prepare(self, w: Weight, request: WeightRequest, **how: Any) -> Prepared:
        """Other weights are refitted rightly."""
        narrow = isinstance(w, QTensor) and isinstance(w.scale, Tensor) and w.scale.dtype != torch.float32
        copied = narrow and isinstance(request, GemmRequest) and not request.x[0].plain
        kept = ReplayKeepsWeight if copied else Replaying
        return kept.prepare(self, w, request, **how)


class _Frozen(AttentionBatch):
    """A batch that ignores every plan but the first."""

    def __init__(self, inner: AttentionBatch, first: AttentionBatch) -> None:
        self.inner, self.first, self._planned = inner, first, False

    def plan(self, query_lens: Tensor, kv_lens: Tensor, page_table: Tensor, **how: Any) -> None:
        """The first plan goes to both."""
        for batch in (self.inner,) if self._planned else (self.inner, self.first):
            batch.plan(query_lens, kv_lens, page_table, **how)
        self._planned = True


class ReplayKeepsPlan(ReplayKeepsWeight):
    """A replay attends with the lengths that were planned first."""

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """Two batches."""
        return _Frozen(super().attention_batch(request, limits), super().attention_batch(request, limits))

    def attention(self, q: Tensor, cache: KVCache, batch: AttentionBatch, **how: Any) -> Tensor:
        """The first plan in a replay."""
        inner = (batch.first if self._replays else batch.inner) if isinstance(batch, _Frozen) else batch
        return self._inner.attention(q, cache, inner, **how)

    def prepare(self, w: Weight, request: WeightRequest, **how: Any) -> Prepared:
        """Weights are refitted rightly."""
        return Replaying.prepare(self, w, request, **how)


GRAPH_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = tuple(
    (name, "core", (kind.__doc__ or "").strip(), kind)
    for name, kind in (
        ("replay-stale", ReplayStale),
        ("replay-keeps-scales", ReplayKeepsScales),
        ("replay-moves", ReplayMoves),
        ("capture-refuses", CaptureRefuses),
        ("capture-unclaimed", CaptureUnclaimed),
        ("replay-leaks", ReplayLeaks),
        ("replays-mix", ReplaysMix),
        ("replay-keeps-weight", ReplayKeepsWeight),
        ("replay-keeps-plan", ReplayKeepsPlan),
    )
)
"""(name, profile, what is wrong, class)"""
