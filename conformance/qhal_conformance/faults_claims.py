"""Planted faults in answers and prepared weights: claims, refusals, refits, what is restored, foreign objects."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits, Plane
from qhal.codebooks import CodebookTensor
from qhal.errors import BatchError, QhalError
from qhal.formats import Format
from qhal.groups import Groups
from qhal.prepared import Prepared
from qhal.requests import (
    AttentionRequest,
    GroupedRequest,
    HadamardRequest,
    KVRequest,
    Request,
    Support,
    VQRequest,
)
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance.wrapping import Weight, WeightRequest, Wrapped


class WeightsShareBuffer(Wrapped):
    """A second weight of the same request is laid over the first one."""

    def prepare(self, w: Weight, request: WeightRequest, *, into: Prepared | None = None, **how: Any) -> Prepared:
        """Into the last one."""
        made = self.__dict__.setdefault("_made", {})
        if not isinstance(request, HadamardRequest):
            into = into or made.get(request)
        made[request] = self._inner.prepare(w, request, into=into, **how)
        return made[request]  # type: ignore[no-any-return]


class RestoreRollsRows(Wrapped):
    """restore returns the rows of a weight one too late."""

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """Another first row."""
        back = self._inner.restore(thing)
        if isinstance(back, QTensor) and isinstance(thing, Prepared):
            return replace(back, codes=back.codes.view(torch.uint8).roll(1, -2).view(back.codes.dtype))
        return back


class RestoreRemembers(Wrapped):
    """restore returns what was prepared first, not what a refit put there."""

    def prepare(self, w: Weight, request: WeightRequest, **how: Any) -> Prepared:
        """Remember the first."""
        made = self._inner.prepare(w, request, **how)
        if not isinstance(request, HadamardRequest):
            self.__dict__.setdefault("_first", {}).setdefault(made.handle, w)
        return made

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """The first."""
        first: dict[int, Any] = self.__dict__.get("_first", {})
        known = isinstance(thing, Prepared) and thing.handle in first
        return first[thing.handle] if known else self._inner.restore(thing)  # type: ignore[union-attr]


class InputIndexIgnored(Wrapped):
    """x is always quantized as the first input."""

    def gemm(self, x: Tensor | QTensor, w: Prepared, *, input: int = 0, **how: Any) -> Tensor:
        """input=0."""
        return self._inner.gemm(x, w, input=0, **how)


class FirstExpertOff(Wrapped):
    """Expert 0 takes another path, which rounds otherwise."""

    def grouped_gemm(self, x: Tensor | QTensor, w: Prepared, groups: Groups, **how: Any) -> Tensor | QTensor:
        """One unit in the last place."""
        y = self._inner.grouped_gemm(x, w, groups, **how)
        ids = getattr(groups, "ids", None)
        if isinstance(y, Tensor) and ids is not None and y.shape[0] == ids.numel():
            y.view(torch.int16)[ids.reshape(-1) == 0] ^= 1
        return y


class AnswersForget(Wrapped):
    """supports counts how often it was asked."""

    def supports(self, request: Request) -> Support:
        """Another answer each time."""
        calls = self.__dict__.setdefault("_asked", itertools.count())
        return replace(self._inner.supports(request), workspace=next(calls))


class AnswersByDevice(Wrapped):
    """supports refuses everything while the default device is meta."""

    def supports(self, request: Request) -> Support:
        """By the default device."""
        if torch.get_default_device().type == "meta":
            return Support("unsupported", "no kernel for this device")
        return self._inner.supports(request)


def _falls_back(to: Callable[[Any], Any]) -> type[Wrapped]:
    """Requests that are refused are prepared, planned or laid out as something near them."""

    class FallsBack(Wrapped):
        """See `to`."""

        def prepare(self, w: Weight, request: WeightRequest, **how: Any) -> Prepared:
            """The near one."""
            near = request if self._inner.supports(request) else to(request)
            return self._inner.prepare(w, near, **how)

        def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
            """The near one."""
            near = request if self._inner.supports(request) else to(request)
            return self._inner.attention_batch(near, limits)

        def kv_planes(self, request: KVRequest, **how: Any) -> tuple[str, tuple[Plane, ...]]:
            """The near one."""
            near = request if self._inner.supports(request) else to(request)
            return self._inner.kv_planes(near, **how)

    return FallsBack


class QuantizeFallsBack(Wrapped):
    """A format that cannot be quantized to becomes int8 by rows."""

    def quantize(self, x: Tensor, to: Operand | Format, *, out: QTensor | None = None, **how: Any) -> QTensor:
        """Another format."""
        try:
            return self._inner.quantize(x, to, out=out, **how)
        except QhalError:
            return self._inner.quantize(x, Format.parse("int8.row*fp32"), **how)


class ForeignAccepted(Wrapped):
    """Objects of another backend are computed with, somehow."""

    _verb = "gemm"

    def _ours(self, verb: str, thing: Any) -> bool:
        return verb != self._verb or not isinstance(thing, Prepared) or thing.backend != "another backend"

    def gemm(self, x: Tensor | QTensor, w: Prepared, **how: Any) -> Tensor:
        """Zeros."""
        if self._ours("gemm", w):
            return self._inner.gemm(x, w, **how)
        return torch.zeros(x.shape[0], 1)

    def grouped_gemm(self, x: Tensor | QTensor, w: Prepared, groups: Groups, **how: Any) -> Tensor | QTensor:
        """Zeros."""
        if self._ours("grouped_gemm", w):
            return self._inner.grouped_gemm(x, w, groups, **how)
        return torch.zeros(x.shape[0], 1)

    def hadamard(self, x: Tensor, rotation: Prepared | Sequence[Rotation], **how: Any) -> Tensor | QTensor:
        """x."""
        if self._ours("hadamard", rotation):
            return self._inner.hadamard(x, rotation, **how)
        return x

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """A weight of zeros."""
        return self._inner.restore(thing) if self._ours("restore", thing) else torch.zeros(1, 1)

    def attention(self, q: Tensor, cache: KVCache, batch: AttentionBatch, **how: Any) -> Tensor:
        """Zeros for a batch that was never planned here."""
        if self._verb == "attention" and type(batch).__name__ == "_ForeignBatch":
            return torch.zeros_like(q)
        return self._inner.attention(q, cache, batch, **how)


def _foreign(verb: str) -> type[Wrapped]:
    return type("ForeignFault", (ForeignAccepted,), {"_verb": verb})


class _Lenient(AttentionBatch):
    """Plans what fits and drops the rest."""

    def __init__(self, inner: AttentionBatch) -> None:
        self.inner = inner

    def plan(self, query_lens: Tensor, kv_lens: Tensor, page_table: Tensor, **how: Any) -> None:
        """No error."""
        try:
            self.inner.plan(query_lens, kv_lens, page_table, **how)
        except BatchError:
            self.inner.plan(query_lens[:1], kv_lens[:1].clamp(max=1), page_table[:1])


class LimitsIgnored(Wrapped):
    """A step past the limits of its batch is cut to them."""

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """A lenient one."""
        return _Lenient(self._inner.attention_batch(request, limits))

    def attention(self, q: Tensor, cache: KVCache, batch: AttentionBatch, **how: Any) -> Tensor:
        """With the batch inside."""
        inner = batch.inner if isinstance(batch, _Lenient) else batch
        return self._inner.attention(q, cache, inner, **how)


def _indexed(request: Any) -> Any:
    return replace(request, groups="indexed") if isinstance(request, GroupedRequest) else request


def _plain_cache(request: Any) -> Any:
    bf16 = Format.parse("bf16")
    return replace(request, k=bf16, v=bf16) if isinstance(request, KVRequest) else request


def _unquantized(request: Any) -> Any:
    return replace(request, quantize=None) if isinstance(request, HadamardRequest) else request


def _in_bf16(request: Any) -> Any:
    return replace(request, out=torch.bfloat16) if isinstance(request, VQRequest) else request


def _without_window(request: Any) -> Any:
    return replace(request, window=None) if isinstance(request, AttentionRequest) else request


_PROFILES = {"input-index-ignored": "core-int8", "first-expert-off": "moe", "limits-ignored": "kv"}
CLAIM_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = tuple(
    (name, _PROFILES.get(name, "core"), (kind.__doc__ or "").strip() if fault is None else fault, kind)
    for name, fault, kind in (
        ("weights-share-buffer", None, WeightsShareBuffer),
        ("restore-rolls-rows", None, RestoreRollsRows),
        ("restore-remembers", None, RestoreRemembers),
        ("input-index-ignored", None, InputIndexIgnored),
        ("first-expert-off", None, FirstExpertOff),
        ("answers-forget", None, AnswersForget),
        ("answers-by-device", None, AnswersByDevice),
        ("falls-back-groups", "an unknown form of groups is taken for indexed", _falls_back(_indexed)),
        ("falls-back-cache", "a cache format that is refused is laid out as bf16", _falls_back(_plain_cache)),
        ("falls-back-rotation", "a rotation is not quantized where that is refused", _falls_back(_unquantized)),
        ("falls-back-codebooks", "codebooks are decoded to another dtype than asked", _falls_back(_in_bf16)),
        ("falls-back-attention", "a window that is refused is dropped", _falls_back(_without_window)),
        ("falls-back-quantize", None, QuantizeFallsBack),
        ("foreign-weight", "a weight of another backend gives zeros", _foreign("gemm")),
        ("foreign-experts", "experts of another backend give zeros", _foreign("grouped_gemm")),
        ("foreign-rotation", "a rotation of another backend gives x", _foreign("hadamard")),
        ("foreign-restore", "a weight of another backend is restored", _foreign("restore")),
        ("foreign-batch", "a batch of another backend gives zeros", _foreign("attention")),
        ("limits-ignored", None, LimitsIgnored),
    )
)
"""(name, profile, what is wrong, class)"""
