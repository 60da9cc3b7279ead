"""Watched: a backend as the suite asks it. Every verb's result has the type of the contract, and its time is counted.

A backend that returns None is one clear line here, instead of an error somewhere in the comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits, Plane
from qhal.codebooks import CodebookTensor
from qhal.formats import Format
from qhal.groups import Groups
from qhal.interface import Codec, Collective, QuantOps
from qhal.prepared import Prepared
from qhal.requests import AttentionRequest, GemmRequest, GroupedRequest, HadamardRequest, KVRequest, VQRequest
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance.outcome import FailKind
from qhal_conformance.problem import Fault
from qhal_conformance.wrapping import Weight, Wrapped

T = TypeVar("T")


class Watched(Wrapped):
    """Every call goes to the backend; what comes back must be of the contract's type.

    seconds  spent inside the backend's verbs so far (where they only enqueue, in `synchronize`)
    """

    def __init__(self, inner: QuantOps) -> None:
        super().__init__(inner)
        self._seconds = 0.0

    @property
    def device(self) -> torch.device:
        """The backend's, if it is one."""
        return _typed("device", self._inner.device, torch.device)

    def synchronize(self) -> None:
        """Hand over."""
        self._timed(self._inner.synchronize)

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """A function that can be called."""
        replay = self._timed(lambda: self._inner.capture(fn))
        if not callable(replay):
            raise Fault(FailKind.RETURN, f"capture returned {type(replay).__name__}, must be a function")
        return lambda: self._timed(replay)

    def quantize(
        self, x: Tensor, to: Operand | Format, *, for_: Prepared | None = None, out: QTensor | None = None
    ) -> QTensor:
        """A QTensor."""
        return _typed("quantize", self._timed(lambda: self._inner.quantize(x, to, for_=for_, out=out)), QTensor)

    def prepare(
        self,
        w: Weight,
        request: GemmRequest | GroupedRequest | HadamardRequest | VQRequest,
        *,
        inputs: Sequence[Operand] = (),
        operand: Operand | None = None,
        bias: Tensor | None = None,
        into: Prepared | None = None,
    ) -> Prepared:
        """A Prepared."""
        made = self._timed(
            lambda: self._inner.prepare(w, request, inputs=inputs, operand=operand, bias=bias, into=into)
        )
        return _typed("prepare", made, Prepared)

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """A cache for a cache, a weight for a weight."""
        kinds = KVCache if isinstance(thing, KVCache) else (QTensor, CodebookTensor, Tensor)
        return _typed("restore", self._timed(lambda: self._inner.restore(thing)), kinds)

    def gemm(self, x: Tensor | QTensor, w: Prepared, *, input: int = 0, out: Tensor | None = None) -> Tensor:
        """A tensor."""
        return _typed("gemm", self._timed(lambda: self._inner.gemm(x, w, input=input, out=out)), Tensor)

    def grouped_gemm(
        self, x: Tensor | QTensor, w: Prepared, groups: Groups, *, out: Tensor | QTensor | None = None
    ) -> Tensor | QTensor:
        """A tensor, or a QTensor where the request quantizes."""
        y = self._timed(lambda: self._inner.grouped_gemm(x, w, groups, out=out))
        return _typed("grouped_gemm", y, (Tensor, QTensor))

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Nothing."""
        self._timed(lambda: self._inner.quant_kv(k, v, cache, slots))

    def attention(
        self,
        q: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        *,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        """A tensor."""
        y = self._timed(lambda: self._inner.attention(q, cache, batch, sinks=sinks, out=out, lse=lse))
        return _typed("attention", y, Tensor)

    def hadamard(
        self,
        x: Tensor,
        rotation: Prepared | Sequence[Rotation],
        *,
        quantize: Operand | None = None,
        for_: Prepared | None = None,
        out: Tensor | QTensor | None = None,
    ) -> Tensor | QTensor:
        """A tensor, or a QTensor where it quantizes."""
        y = self._timed(lambda: self._inner.hadamard(x, rotation, quantize=quantize, for_=for_, out=out))
        return _typed("hadamard", y, Tensor if quantize is None else QTensor)

    def vq_decode(self, w: Prepared, *, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """A tensor."""
        return _typed("vq_decode", self._timed(lambda: self._inner.vq_decode(w, rows=rows, out=out)), Tensor)

    def comm_quant(
        self,
        x: Tensor,
        collective: Collective,
        codec: Codec,
        group: Any,
        *,
        splits: Sequence[int] | None = None,
        decode: bool = True,
        out: Tensor | None = None,
        async_op: bool = False,
    ) -> Any:
        """A tensor, a QTensor, or a handle: the check of collectives looks."""
        return self._timed(
            lambda: self._inner.comm_quant(
                x, collective, codec, group, splits=splits, decode=decode, out=out, async_op=async_op
            )
        )

    def kv_planes(
        self, request: KVRequest, *, attention: Sequence[AttentionRequest] = ()
    ) -> tuple[str, tuple[Plane, ...]]:
        """A layout's name and planes."""
        found = self._timed(lambda: self._inner.kv_planes(request, attention=attention))
        pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], str)
        if not pair or not all(isinstance(p, Plane) for p in found[1]):
            raise Fault(FailKind.RETURN, f"kv_planes returned {type(found).__name__}, must be (layout, planes)")
        return found

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """An AttentionBatch."""
        made = self._timed(lambda: self._inner.attention_batch(request, limits))
        return _typed("attention_batch", made, AttentionBatch)

    def _timed(self, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        try:
            return call()
        finally:
            self._seconds += time.perf_counter() - start


def seconds(ops: Watched) -> float:
    """Seconds that were spent inside the backend so far."""
    return ops._seconds


def _typed(verb: str, value: T, kinds: Any) -> T:
    if isinstance(value, kinds):
        return value
    wanted = " or ".join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
    raise Fault(FailKind.RETURN, f"{verb} returned {type(value).__name__}, must be a {wanted}")
