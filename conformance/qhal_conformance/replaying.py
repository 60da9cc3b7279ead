"""Replaying: graph capture for a backend that has none, by calling the captured function again.

An honest variant: results come back at the addresses of the first run, computed from what lies at the old addresses
now. With it the rules of `contract_graphs.py` can be tried, and their faults planted, without a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from qhal.caches import AttentionBatch, Limits, Plane
from qhal.prepared import Prepared
from qhal.requests import (
    AttentionRequest,
    GemmRequest,
    GroupedRequest,
    KVRequest,
    Request,
    Support,
)
from qhal.tensors import QTensor
from qhal_conformance.wrapping import Weight, WeightRequest, Wrapped

R = TypeVar("R")


def without_graph(request: R) -> R:
    """The request as a backend without graphs knows it."""
    if isinstance(request, GroupedRequest):
        return replace(request, gemm=without_graph(request.gemm))
    if isinstance(request, GemmRequest | AttentionRequest):
        return replace(request, graph=False)
    return request


class Replaying(Wrapped):
    """Everything that the inner backend executes may stand in a graph."""

    def supports(self, request: Request) -> Support:
        """The inner answer, with graph."""
        answer = self._inner.supports(without_graph(request))
        return replace(answer, graph=True) if answer else answer

    def prepare(self, w: Weight, request: WeightRequest, **how: Any) -> Prepared:
        """For the request without graph."""
        return self._inner.prepare(w, without_graph(request), **how)

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """For the request without graph."""
        return self._inner.attention_batch(without_graph(request), limits)

    def kv_planes(
        self, request: KVRequest, *, attention: Sequence[AttentionRequest] = ()
    ) -> tuple[str, tuple[Plane, ...]]:
        """For the requests without graph."""
        return self._inner.kv_planes(request, attention=[without_graph(reader) for reader in attention])

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Run once; a replay runs again and copies its numbers to where the first ones lie."""
        first = fn()
        return lambda: _copied(fn(), first)


def _copied(new: Any, old: Any) -> Any:
    if isinstance(old, Tensor):
        old.copy_(new)
    elif isinstance(old, QTensor):
        for name, plane in old.planes().items():
            plane.copy_(new.planes()[name])
    elif old is not None:
        raise TypeError(f"a captured function returned {type(old).__name__}")
    return old
