"""Wrapped: a backend that hands everything to another one. Planted faults and honest variants override one thing.

An override names the arguments that it looks at and hands over the others by their names, `**how`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits, Plane
from qhal.codebooks import CodebookTensor
from qhal.formats import Format
from qhal.groups import Groups
from qhal.interface import Codec, Collective, MemoryStats, QuantOps
from qhal.prepared import Prepared
from qhal.requests import (
    AttentionRequest,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    KVRequest,
    Request,
    Support,
    VQRequest,
    minimum_class,
)
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor

Weight = QTensor | CodebookTensor | Tensor | Sequence[Rotation]
WeightRequest = GemmRequest | GroupedRequest | HadamardRequest | VQRequest


class Wrapped(QuantOps):
    """Every call goes to `_inner`, unchanged."""

    name: ClassVar[str] = "wrapped"
    interface: ClassVar[tuple[int, int]] = (1, 0)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A method that hands over `**how` takes whatever the interface's takes, and says so."""
        for name, member in vars(cls).items():
            verb = inspect.isfunction(member) and hasattr(QuantOps, name) and not name.startswith("_")
            if verb and any(p.kind is p.VAR_KEYWORD for p in inspect.signature(member).parameters.values()):
                member.__signature__ = inspect.signature(getattr(QuantOps, name))
        super().__init_subclass__(**kwargs)

    def __init__(self, inner: QuantOps) -> None:
        self._inner = inner

    @property
    def device(self) -> torch.device:
        """The inner backend's."""
        return self._inner.device

    def synchronize(self) -> None:
        """Hand over."""
        self._inner.synchronize()

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Hand over."""
        return self._inner.capture(fn)

    def memory_stats(self) -> MemoryStats:
        """Hand over."""
        return self._inner.memory_stats()

    def supports(self, request: Request) -> Support:
        """Hand over."""
        return self._inner.supports(request)

    def quantize(
        self, x: Tensor, to: Operand | Format, *, for_: Prepared | None = None, out: QTensor | None = None
    ) -> QTensor:
        """Hand over."""
        return self._inner.quantize(x, to, for_=for_, out=out)

    def prepare(
        self,
        w: Weight,
        request: WeightRequest,
        *,
        inputs: Sequence[Operand] = (),
        operand: Operand | None = None,
        bias: Tensor | None = None,
        into: Prepared | None = None,
    ) -> Prepared:
        """Hand over."""
        return self._inner.prepare(w, request, inputs=inputs, operand=operand, bias=bias, into=into)

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """Hand over."""
        return self._inner.restore(thing)

    def gemm(self, x: Tensor | QTensor, w: Prepared, *, input: int = 0, out: Tensor | None = None) -> Tensor:
        """Hand over."""
        return self._inner.gemm(x, w, input=input, out=out)

    def grouped_gemm(
        self, x: Tensor | QTensor, w: Prepared, groups: Groups, *, out: Tensor | QTensor | None = None
    ) -> Tensor | QTensor:
        """Hand over."""
        return self._inner.grouped_gemm(x, w, groups, out=out)

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Hand over."""
        self._inner.quant_kv(k, v, cache, slots)

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
        """Hand over."""
        return self._inner.attention(q, cache, batch, sinks=sinks, out=out, lse=lse)

    def hadamard(
        self,
        x: Tensor,
        rotation: Prepared | Sequence[Rotation],
        *,
        quantize: Operand | None = None,
        for_: Prepared | None = None,
        out: Tensor | QTensor | None = None,
    ) -> Tensor | QTensor:
        """Hand over."""
        return self._inner.hadamard(x, rotation, quantize=quantize, for_=for_, out=out)

    def vq_decode(self, w: Prepared, *, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """Hand over."""
        return self._inner.vq_decode(w, rows=rows, out=out)

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
        """Hand over."""
        return self._inner.comm_quant(
            x, collective, codec, group, splits=splits, decode=decode, out=out, async_op=async_op
        )

    def kv_planes(
        self, request: KVRequest, *, attention: Sequence[AttentionRequest] = ()
    ) -> tuple[str, tuple[Plane, ...]]:
        """Hand over."""
        return self._inner.kv_planes(request, attention=attention)

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """Hand over."""
        return self._inner.attention_batch(request, limits)


def rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 numbers rounded to `dtype` once, half to even. torch goes through float32, which rounds twice."""
    if dtype not in (torch.bfloat16, torch.float16):
        return y.to(dtype)
    bits, lowest = (8, -126) if dtype == torch.bfloat16 else (11, -14)
    exponent = (torch.frexp(y)[1] - 1).clamp(min=lowest)
    unit = torch.ldexp(torch.ones_like(y), exponent - bits + 1)
    near = torch.round(y / unit) * unit
    return torch.where(torch.isfinite(near), near, y).to(dtype)


@dataclass(frozen=True)
class Bound:
    """What a weight was prepared with."""

    w: QTensor
    request: GemmRequest
    inputs: tuple[Operand, ...]
    bias: Tensor | None


class Recomputed(Wrapped):
    """gemm by `_product`, on the numbers of the operands; everything else as the inner backend does it.

    `_numerics` is the class that is declared for it; None leaves the inner backend's.
    """

    _numerics: Any = None

    def __init__(self, inner: QuantOps) -> None:
        super().__init__(inner)
        self._bound: dict[int, Bound] = {}
        self._now: Bound

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """float32 x [T, K] and w [N, K], float64 bias [N] -> [T, N] of `dtype`. The honest one is exact."""
        y = x.double() @ w.double().T
        return rounded(y if bias is None else y + bias, dtype)

    def _input(self, x: Tensor | QTensor, bound: Bound, index: int) -> Tensor:
        """The value of Q(x)."""
        if isinstance(x, QTensor):
            return x.dequantize()
        return self._inner.quantize(x, bound.inputs[index]).dequantize() if bound.inputs else x.float()

    def supports(self, request: Request) -> Support:
        """The inner answer, with this class."""
        answer = self._inner.supports(request)
        if not answer or self._numerics is None or not isinstance(request, GemmRequest):
            return answer
        if minimum_class(request) < self._numerics:
            return Support("unsupported", f"sums are {self._numerics.label} here")
        return replace(answer, numerics=self._numerics, batch_invariant=False)

    def prepare(
        self,
        w: Weight,
        request: WeightRequest,
        *,
        inputs: Sequence[Operand] = (),
        bias: Tensor | None = None,
        **how: Any,
    ) -> Prepared:
        """Remember the numbers of a weight beside what the inner backend makes of it."""
        made = self._inner.prepare(w, request, inputs=inputs, bias=bias, **how)
        if isinstance(w, QTensor) and isinstance(request, GemmRequest):
            self._bound[made.handle] = Bound(w, request, tuple(inputs), bias)
        return made

    def gemm(self, x: Tensor | QTensor, w: Prepared, *, input: int = 0, out: Tensor | None = None) -> Tensor:
        """`_product` of the operands' numbers; what the inner backend refuses is refused."""
        bound = self._bound.get(w.handle)
        plain = isinstance(x, Tensor) and (not x.is_floating_point() or x.shape[-1] != w.request.k)  # type: ignore[union-attr]
        if bound is None or plain or (out is not None and out.shape[0] != x.shape[0]):
            return self._inner.gemm(x, w, input=input, out=out)
        dtype = bound.request.out if isinstance(x, QTensor) or bound.request.out is not None else x.dtype
        assert dtype is not None
        bias = None if bound.bias is None else bound.bias.double()
        self._now = bound
        y = self._product(self._input(x, bound, input), bound.w.dequantize(), bias, dtype)
        return y if out is None else out.copy_(y)
