"""CudaOps: what this backend executes, said honestly.

Products of two 8-bit operands, and of 16-bit ones, run on the tensor cores through torch (`products.py`); what the
shared kernels take (`qhal_triton`) is theirs. Everything else is the portable operation on the GPU: exact, and far from
fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch

from qhal.interface import MemoryStats
from qhal.requests import (
    Arithmetic,
    AttentionRequest,
    CommRequest,
    GemmRequest,
    GroupedRequest,
    KVRequest,
    Request,
    Support,
)
from qhal_cuda import products
from qhal_cuda.targets import capability, target
from qhal_portable.current_device import with_own_device
from qhal_portable.prepared import PreparedWeight, Run
from qhal_portable.support import support
from qhal_triton.ops import TritonOps

_WAITS = "reads lengths, counts or headers on the host, so it waits for the device in every call; right, not fast"
_HOST = (AttentionRequest, CommRequest, GroupedRequest, KVRequest)


@with_own_device
class CudaOps(TritonOps):
    """QuantOps for NVIDIA GPUs.

    arch    compute capability: "sm_90"
    device  the torch device, "meta" offline
    """

    name: ClassVar[str] = "cuda"
    interface: ClassVar[tuple[int, int]] = (1, 0)

    def __init__(self, arch: str, device: str) -> None:
        super().__init__(target(arch), torch.device(device))
        self._capability = capability(arch)

    def synchronize(self) -> None:
        """Wait until everything that was asked for is done."""
        torch.cuda.synchronize(self._device)

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Run `fn` once on a stream of its own, record it; the result replays it."""
        stream, graph = torch.cuda.Stream(self._device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            fn()  # what a first call allocates and chooses stays outside of the graph
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                result = fn()
        torch.cuda.current_stream(self._device).wait_stream(stream)

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def memory_stats(self) -> MemoryStats:
        """Bytes in use by this process, their peak, and the total of the device."""
        if self._device.type == "meta":
            return MemoryStats(0, 0, 0)
        used = torch.cuda.memory_allocated(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        return MemoryStats(used, peak, torch.cuda.mem_get_info(self._device)[1])

    def supports(self, request: Request) -> Support:
        """The answer of `products.py`, else of the shared kernels, else the portable one: honest about its waits."""
        if isinstance(request, GemmRequest):
            return self._product(request)
        answer = super().supports(request)
        if not answer or not isinstance(request, _HOST) or self._path(request) is not None:
            return answer
        return replace(answer, level="conditional", reason=_WAITS)

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
