"""TritonOps: the portable operations, with a kernel wherever a family has one for the request.

A family is a folder with `choose(request, target) -> Path | None`. This file only asks and calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.formats import Format
from qhal.groups import Groups
from qhal.interface import Tuned
from qhal.named_tables import revision
from qhal.prepared import Prepared
from qhal.requests import (
    AttentionRequest,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    KVRequest,
    QuantizeRequest,
    Request,
    Support,
    VQRequest,
)
from qhal.rotations import Rotation, kinds
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_portable.ops import PortableOps
from qhal_portable.prepared import PreparedRotation, PreparedWeight, Run
from qhal_portable.support import support
from qhal_triton import attention, gemm, grouped, hadamard, kv, quantize, vq
from qhal_triton.paths import Path
from qhal_triton.target import Target
from qhal_triton.tuning import Table, save


def _product(request: GemmRequest, target: Target) -> Path | None:
    return gemm.choose(request, target) or vq.choose_gemm(request, target)


_CHOOSE: dict[type, Callable[[Any, Target], Path | None]] = {
    GemmRequest: _product,
    GroupedRequest: grouped.choose,
    QuantizeRequest: quantize.choose,
    HadamardRequest: hadamard.choose,
    VQRequest: vq.choose,
    KVRequest: kv.choose,
    AttentionRequest: attention.choose,
}


_MOST = 4096
"""Requests whose kernels an object remembers; they start anew beyond."""


class TritonOps(PortableOps):
    """QuantOps of a GPU that Triton compiles for; a backend gives its name, the target and what was measured on it."""

    interface: ClassVar[tuple[int, int]] = (1, 0)
    _copies: ClassVar[tuple[torch.dtype, ...]] = ()  # a decoded copy would undo what the checkpoint saved

    def __init__(self, target: Target, device: torch.device, table: Table | None = None) -> None:
        self._target = target
        self._device = device
        self._table = table or Table()
        self._paths: dict[tuple[Any, ...], Path | None] = {}

    @property
    def device(self) -> torch.device:
        """The torch device of the results."""
        return self._device

    def supports(self, request: Request) -> Support:
        """The answer of the kernel that takes the request, else the portable one."""
        path = self._path(request)
        return super().supports(request) if path is None else path.answer(request)

    def quantize(
        self, x: Tensor, to: Operand | Format, *, for_: Prepared | None = None, out: QTensor | None = None
    ) -> QTensor:
        """See `quantize/`."""
        o = to if isinstance(to, Operand) else Operand(to)
        if isinstance(x, Tensor):
            path = self._quantizing(x.dtype, o.format, o.static)
            if path is not None and quantize.fits(path, x, o, self._device):
                if for_ is not None:
                    self._weight(for_)
                return quantize.run(path, x, o, out)
        return super().quantize(x, to, for_=for_, out=out)

    def grouped_gemm(
        self, x: Tensor | QTensor, w: Prepared, groups: Groups, *, out: Tensor | QTensor | None = None
    ) -> Tensor | QTensor:
        """See `grouped/`."""
        weight = self._weight(w)
        request = weight.request
        if not isinstance(request, GroupedRequest) or (not grouped.known(weight) and self._path(request) is None):
            return super().grouped_gemm(x, w, groups, out=out)
        return grouped.run(self, x, weight, groups, out)

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """See `kv/`."""
        path = self._path(cache.request)
        if path is None:
            super().quant_kv(k, v, cache, slots)
        else:
            kv.run(k, v, cache, slots, self._device, self._target)

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
        """See `attention/`."""
        if isinstance(batch, attention.TritonBatch):
            return attention.run(batch, q, cache, sinks, out, lse)
        return super().attention(q, cache, batch, sinks=sinks, out=out, lse=lse)

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """See `attention/`."""
        path = self._path(request)
        if path is None:
            return super().attention_batch(request, limits)
        self._require(request)  # a kernel takes it, and the device may still refuse it
        return attention.batch(request, limits, self._device, self._target)

    def hadamard(
        self,
        x: Tensor,
        rotation: Prepared | Sequence[Rotation],
        *,
        quantize: Operand | None = None,
        for_: Prepared | None = None,
        out: Tensor | QTensor | None = None,
    ) -> Tensor | QTensor:
        """See `hadamard/`."""
        chain = rotation.chain if isinstance(rotation, PreparedRotation) else rotation
        if isinstance(x, Tensor) and x.dim() and not isinstance(chain, Prepared):
            fmt = None if quantize is None else quantize.format
            path = self._path(HadamardRequest(kinds=kinds(chain), n=x.shape[-1], x=x.dtype, quantize=fmt))
            if path is not None and hadamard.fits(path, x, chain, self._device):
                return hadamard.run(path, self, x, chain, quantize, for_, out)
        return super().hadamard(x, rotation, quantize=quantize, for_=for_, out=out)

    def vq_decode(self, w: Prepared, *, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """See `vq/`."""
        weight = self._weight(w)
        path = self._path(weight.request) if isinstance(weight.request, VQRequest) else None
        return (
            super().vq_decode(w, rows=rows, out=out) if path is None else vq.run(path, self._target, weight, rows, out)
        )

    def _layout(self, request: Request) -> str:
        path = self._path(request)
        return super()._layout(request) if path is None else path.layouts[0]

    def _rounded(self, request: Request) -> torch.dtype | None:
        path = self._path(request)
        return None if path is None else path.rounded

    def _made(self, request: Request) -> tuple[str, ...]:
        path = self._path(request)
        return () if path is None else path.made

    def tune(self, request: Request, *, seen: Callable[[str], None] | None = None) -> Sequence[Tuned]:
        """Tiles of products, written to the table of this device (`tuning.py`)."""
        path = self._path(request) if isinstance(request, GemmRequest) else None
        if path is None or self.supports(request).executes != path.executes:  # a backend may prefer a library
            raise self._refusal("kernel of this request whose tiles are chosen by measuring")
        assert isinstance(request, GemmRequest)
        found = gemm.tune(self, request, seen, here)
        save(self._table.facts, found)
        return [entry.words(problem) for problem, entry in found.items()]

    def _encode(self, x: Tensor, to: Format) -> QTensor:
        return self.quantize(x, to)

    def _bind(self, w: PreparedWeight) -> Run:
        path = self._path(w.request)
        if path is not None and path.kernel == vq.KERNEL:
            return vq.bind(w, self._target) or super()._bind(w)
        return super()._bind(w) if path is None else gemm.bind(path, self, w)

    def _path(self, request: Request) -> Path | None:
        """The kernel for a request that is executable at all; None: the portable operation. Every call asks this."""
        key = (request, revision())
        try:
            if key in self._paths:
                return self._paths[key]
        except TypeError:  # no hash: the portable answer says what is wrong with it
            return None
        return self._found(key, request)

    def _quantizing(self, x: torch.dtype, to: Format, static: bool) -> Path | None:
        """The same for the request of a quantization, which is made only once."""
        key = (x, to, static, revision())
        try:
            if key in self._paths:
                return self._paths[key]
        except TypeError:
            return None
        return self._found(key, QuantizeRequest(x=x, format=to, static=static))

    def _found(self, key: tuple[Any, ...], request: Request) -> Path | None:
        if len(self._paths) >= _MOST:
            self._paths.clear()
        found = self._paths[key] = _path(request, self._target, self._copies, revision())
        return found


@lru_cache(maxsize=65536)
def _path(request: Request, target: Target, copies: tuple[torch.dtype, ...], tables: int) -> Path | None:
    """The choice while the named tables are at that revision."""
    choose = _CHOOSE.get(type(request))
    return None if choose is None or not support(request, copies, graphs=True) else choose(request, target)


class Here(TritonOps):
    """The kernels of a target, called on the processor: for compiling them, under `absent.absent`."""

    name: ClassVar[str] = "here"
    interface: ClassVar[tuple[int, int]] = (1, 0)


def here(target: Target) -> Here:
    """Operations that only compile."""
    return Here(target, torch.device("cpu"))
