"""GpuOps: TritonOps on a device of torch.cuda, which is how torch calls NVIDIA's GPUs and AMD's.

A device of type "meta" stands for a GPU that is not here, and only answers; one of type "cpu" is Triton's interpreter,
which has no graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch

from qhal.errors import UnsupportedError
from qhal.interface import MemoryStats
from qhal.requests import (
    AttentionRequest,
    CommRequest,
    GemmRequest,
    GroupedRequest,
    KVRequest,
    Request,
    Support,
)
from qhal_portable.current_device import with_own_device
from qhal_triton.ops import TritonOps

WAITS = "reads lengths, counts or headers on the host, so it waits for the device in every call; right, not fast"
_HOST = (AttentionRequest, CommRequest, GroupedRequest, KVRequest)
_NO_GRAPHS = Support("unsupported", "the interpreter runs on the processor, where there are no graphs; ask without")


class GpuOps(TritonOps):
    """What NVIDIA's and AMD's operations share: graphs, memory, waiting, and the word for what reads the host."""

    interface: ClassVar[tuple[int, int]] = (1, 0)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        with_own_device(cls)

    def synchronize(self) -> None:
        """Wait until everything that was asked for is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Run `fn` once on a stream of its own, record it; the result replays it."""
        if self._device.type == "cpu":
            raise UnsupportedError(_NO_GRAPHS, "capture")
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
        """Bytes in use by this process, their peak, and the total of the device; zeros where there is none."""
        if self._device.type != "cuda":
            return MemoryStats(0, 0, 0)
        used = torch.cuda.memory_allocated(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        return MemoryStats(used, peak, torch.cuda.mem_get_info(self._device)[1])

    def supports(self, request: Request) -> Support:
        """The answer of the kernel or of the portable operation, which on a GPU is honest about its waits."""
        answer = super().supports(request)
        if answer and isinstance(request, _HOST) and self._path(request) is None:
            answer = replace(answer, level="conditional", reason=WAITS)
        return self._interpreted(request, answer) if self._device.type == "cpu" else answer

    def _interpreted(self, request: Request, answer: Support) -> Support:
        gemm = request.gemm if isinstance(request, GroupedRequest) else request
        if answer and isinstance(gemm, GemmRequest | AttentionRequest) and gemm.graph:
            return _NO_GRAPHS
        return replace(answer, graph=False) if answer.graph else answer
