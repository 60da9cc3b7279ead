"""CudaOps: what this backend executes, said honestly.

Products of two 8-bit operands, and of 16-bit ones, run on the tensor cores through torch (`products.py`); what the
shared kernels take (`qhal_triton`) is theirs. Everything else is the portable operation on the GPU: exact, and far from
fast.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from qhal.requests import Arithmetic, GemmRequest, Request, Support
from qhal_cuda import products
from qhal_cuda.targets import capability, target
from qhal_portable.prepared import PreparedWeight, Run
from qhal_portable.support import support
from qhal_triton.gpu import GpuOps


class CudaOps(GpuOps):
    """QuantOps for NVIDIA GPUs.

    arch    compute capability: "sm_90"
    device  the torch device, "meta" offline
    """

    name: ClassVar[str] = "cuda"
    interface: ClassVar[tuple[int, int]] = (1, 0)

    def __init__(self, arch: str, device: str) -> None:
        super().__init__(target(arch), torch.device(device))
        self._capability = capability(arch)

    def supports(self, request: Request) -> Support:
        """The answer of `products.py`, else of the shared kernels, else the portable one: honest about its waits."""
        return self._product(request) if isinstance(request, GemmRequest) else super().supports(request)

    def _product(self, request: GemmRequest) -> Support:
        path = self._library(request)
        if path is None:
            return super().supports(request)
        arithmetic = Arithmetic.of(request)
        assert arithmetic is not None
        return replace(
            support(request, self._copies, graphs=True),
            arithmetic=replace(arithmetic, accumulate=path.accumulate),
            executes=path.executes,
            numerics=path.numerics,
            graph=True,
            batch_invariant=False,
        )

    def _bind(self, w: PreparedWeight) -> Run:
        assert isinstance(w.request, GemmRequest)
        path = self._library(w.request)
        return super()._bind(w) if path is None else products.bind(w, path)

    def _library(self, request: GemmRequest) -> products.Path | None:
        """torch's product for this request; None where a shared kernel reads the quantized weight, or none fits."""
        if not support(request, self._copies, graphs=True):
            return None
        path = products.choose(request, self._capability)
        return None if path is not None and path.kind == "16 bits" and self._path(request) is not None else path
