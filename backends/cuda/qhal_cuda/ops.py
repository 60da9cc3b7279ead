"""CudaOps: what this backend executes, said honestly.

Products of two 8-bit operands, and of 16-bit ones, run on the tensor cores through torch (`products.py`); what the
shared kernels take (`qhal_triton`) is theirs. Where these libraries are installed, weights that meet many rows are
humming's (`humming/`) and prefill over 16-bit caches is FlashInfer's (`flashinfer.py`). Everything else is the portable
operation on the GPU: exact, and far from fast.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.codebooks import CodebookTensor
from qhal.prepared import Prepared
from qhal.requests import (
    AttentionRequest,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    Request,
    Support,
    VQRequest,
)
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_cuda import flashinfer, humming, products
from qhal_cuda.targets import capability, target
from qhal_portable.prepared import PreparedWeight, Run
from qhal_portable.support import support
from qhal_triton.gpu import GpuOps
from qhal_triton.paths import Path
from qhal_triton.tuning import Table

_MANY = 512
"""Rows from which humming comes before the shared kernels: a block sums a whole K there, so few rows leave SMs idle."""


class CudaOps(GpuOps):
    """QuantOps for NVIDIA GPUs.

    arch       compute capability: "sm_90"
    device     the torch device, "meta" offline
    libraries  names of the optional libraries that may be called (`libraries.usable`)
    table      tiles that were measured on this GPU (`qhal tune`)
    """

    name: ClassVar[str] = "cuda"
    interface: ClassVar[tuple[int, int]] = (1, 0)

    def __init__(self, arch: str, device: str, libraries: Collection[str] = (), table: Table | None = None) -> None:
        super().__init__(target(arch), torch.device(device), table)
        self._capability = capability(arch)
        self._libraries = frozenset(libraries)

    def supports(self, request: Request) -> Support:
        """The answer of a library, else of the shared kernels, else the portable one: honest about its waits."""
        if isinstance(request, GemmRequest):
            return self._product(request)
        answer = super().supports(request)
        flash = self._flash(request) if isinstance(request, AttentionRequest) else None
        if flash is None:
            return answer
        rest = f"lengths that only the device knows, and uneven planes: {answer.executes}"
        return replace(flash.answer(request), executes=f"{flash.executes}; {rest}")

    def prepare(
        self,
        w: QTensor | CodebookTensor | Tensor | Sequence[Rotation],
        request: GemmRequest | GroupedRequest | HadamardRequest | VQRequest,
        *,
        inputs: Sequence[Operand] = (),
        operand: Operand | None = None,
        bias: Tensor | None = None,
        into: Prepared | None = None,
    ) -> Prepared:
        """A weight in the layout of the kernel that `supports` named."""
        path = self._humming(request) if isinstance(request, GemmRequest) else None
        if path is not None and isinstance(w, QTensor) and operand is None and bias is None:
            assert isinstance(request, GemmRequest)
            old = None if into is None else self._weight(into)
            if old is None or isinstance(old, humming.HummingWeight):
                return humming.build(w, request, path.answer(request), self, inputs, old)
        return super().prepare(w, request, inputs=inputs, operand=operand, bias=bias, into=into)

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """The canonical form, from any layout of this backend."""
        if isinstance(thing, humming.HummingWeight) and self._weight(thing):
            return humming.restore(thing)
        return super().restore(thing)

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
        """By the kernel that the batch was made for."""
        if isinstance(batch, flashinfer.FlashBatch):
            if batch.takes(cache):
                return batch.run(q, cache, sinks, out, lse)
            batch = batch.other
        return super().attention(q, cache, batch, sinks=sinks, out=out, lse=lse)

    def attention_batch(self, request: AttentionRequest, limits: Limits) -> AttentionBatch:
        """FlashInfer's, or that of the shared kernels or of the portable operation."""
        if self._flash(request) is None:
            return super().attention_batch(request, limits)
        other = partial(super().attention_batch, request, limits)
        return flashinfer.FlashBatch(request, limits, self._device, other)

    def _flash(self, request: AttentionRequest) -> Path | None:
        if "flashinfer" not in self._libraries or not support(request, self._copies, graphs=True):
            return None
        return flashinfer.choose(request, self._capability)

    def _product(self, request: GemmRequest) -> Support:
        path = self._humming(request) or self._library(request)
        return super().supports(request) if path is None else path.answer(request)

    def _rounded(self, request: Request) -> torch.dtype | None:
        path = self._library(request) if isinstance(request, GemmRequest) else None
        return super()._rounded(request) if path is None else path.rounded

    def _bind(self, w: PreparedWeight) -> Run:
        assert isinstance(w.request, GemmRequest)
        path = self._library(w.request)
        if path is None:
            return super()._bind(w)
        many = products.bind(w, path, self.quantize)
        if path.kernel not in products.FEW or self._path(w.request) is None:
            return many
        return products.by_rows(super()._bind(w), many, products.FEW[path.kernel])

    def _humming(self, request: GemmRequest) -> Path | None:
        """humming's path where it is installed and no shared kernel serves these row counts better."""
        if "humming" not in self._libraries or not support(request, self._copies, graphs=True):
            return None
        path = humming.choose(request, self._capability)
        return path if path is not None and (request.m[0] >= _MANY or self._path(request) is None) else None

    def _library(self, request: GemmRequest) -> Path | None:
        """torch's product for this request; None where a shared kernel reads the quantized weight, or none fits."""
        if not support(request, self._copies, graphs=True):
            return None
        path, own = products.choose(request, self._capability), self._path(request)
        if path is None or own is None:
            return path
        if path.kernel == "16 bits":
            return None
        if path.kernel not in products.FEW:
            return path
        words = f"{own.executes}; from {products.FEW[path.kernel]} rows: {path.executes}"
        return replace(path, executes=words, numerics=max(path.numerics, own.numerics), layouts=own.layouts)
