"""CudaOps: what this backend executes today, said honestly.

Products of 8 bits and of 16 run on the tensor cores through torch (`products.py`). Everything else is the portable
operation on the GPU: exact, and far from fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.codecs import Codec, Collective
from qhal.errors import UnsupportedError
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
from qhal_portable.ops import PortableOps
from qhal_portable.prepared import PreparedWeight, Run

_WAITS = "reads lengths, counts or headers on the host, so it waits for the device in every call; right, not fast"
_HUNG = Support(
    "not_implemented",
    "collectives whose scales are e8m0 hung over NCCL on two H100s, and it is not understood yet; use another codec",
)
_HOST = (AttentionRequest, CommRequest, GroupedRequest, KVRequest)


class CudaOps(PortableOps):
    """QuantOps for NVIDIA GPUs.

    arch    compute capability: "sm_90"
    device  the torch device, "meta" offline
    """

    name: ClassVar[str] = "cuda"
    interface: ClassVar[tuple[int, int]] = (1, 0)
    _copies: ClassVar[tuple[torch.dtype, ...]] = ()  # a decoded copy would undo what the checkpoint saved

    def __init__(self, arch: str, device: str) -> None:
        self._capability = _capability(arch)
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        """The torch device of the results."""
        return self._device

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
        """The portable answer, made better where `products.py` has a path, and honest about what waits for the host."""
        if isinstance(request, GemmRequest):
            return self._product(request)
        answer = super().supports(request)
        if not answer or not isinstance(request, _HOST):
            return answer
        hung = isinstance(request, CommRequest) and _hangs(request.codec)
        return _HUNG if hung else replace(answer, level="conditional", reason=_WAITS)

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
        """The portable collective over the group of these GPUs; refused before anything travels, on every rank."""
        if _hangs(codec):
            raise UnsupportedError(_HUNG)
        return super().comm_quant(x, collective, codec, group, splits=splits, decode=decode, out=out, async_op=async_op)

    def _product(self, request: GemmRequest) -> Support:
        portable = super().supports(replace(request, graph=False))
        path = products.choose(request, self._capability) if portable else None
        if path is None:
            return super().supports(request)
        arithmetic = Arithmetic.of(request)
        assert arithmetic is not None
        return replace(
            portable,
            arithmetic=replace(arithmetic, accumulate=path.accumulate),
            executes=path.executes,
            numerics=path.numerics,
            graph=True,
            batch_invariant=False,
        )

    def _bind(self, w: PreparedWeight) -> Run:
        assert isinstance(w.request, GemmRequest)
        path = products.choose(w.request, self._capability)
        return super()._bind(w) if path is None else products.bind(w, path)


def _hangs(codec: Codec) -> bool:
    return any(f.element == "e8m0" for f in codec.format.levels())


def _capability(arch: str) -> tuple[int, int]:
    """(9, 0) of "sm_90", (12, 0) of "sm_120"; UnsupportedError for another word."""
    digits = arch.removeprefix("sm_")
    if not digits.isdigit() or len(digits) < 2:
        raise UnsupportedError(Support("unsupported", f"{arch!r} is no compute capability such as sm_90"))
    return int(digits[:-1]), int(digits[-1])
