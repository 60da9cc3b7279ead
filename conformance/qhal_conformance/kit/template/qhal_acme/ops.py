"""AcmeOps: the interface, one short method each. The class body is checked against it when Python reads this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.codebooks import CodebookTensor
from qhal.errors import FormatError, UnsupportedError
from qhal.formats import Format
from qhal.interface import MemoryStats, QuantOps
from qhal.prepared import Prepared
from qhal.requests import GemmRequest, GroupedRequest, HadamardRequest, QuantizeRequest, Request, Support, VQRequest
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_acme import INTERFACE, gemm, quantize, weights
from qhal_acme.support import support

HOST = ("cpu", "meta")
"""No accelerator: the processor, and what answers `supports` where no device is."""


class AcmeOps(QuantOps):
    """Every operation of the interface that is missing here refuses by itself, with the reason."""

    name: ClassVar[str] = "acme"
    interface: ClassVar[tuple[int, int]] = INTERFACE

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs = _captures(device)

    # ---- the device: with these the suite needs no vendor's name

    @property
    def device(self) -> torch.device:
        """Where results live and where inputs must live."""
        return self._device

    def synchronize(self) -> None:
        """Wait until everything that was asked for is done."""
        if self._device.type not in HOST:
            torch.accelerator.synchronize(self._device)

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Run `fn` once, record it; the result replays it."""
        if not self._graphs:
            return super().capture(fn)
        stream, graph = torch.Stream(self._device), torch.accelerator.Graph()
        with stream:
            fn()  # what a first call allocates and chooses stays outside of the graph
        with stream, graph:
            result = fn()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def memory_stats(self) -> MemoryStats:
        """Bytes in use, the peak, and the total of the device; the processor keeps no such account."""
        if self._device.type in HOST:
            return MemoryStats(0, 0, 0)
        used, peak = (
            f(self._device) for f in (torch.accelerator.memory_allocated, torch.accelerator.max_memory_allocated)
        )
        return MemoryStats(used, peak, torch.accelerator.get_memory_info(self._device)[1])

    # ---- what is claimed

    def supports(self, request: Request) -> Support:
        """See `support.py`."""
        return support(request, graph=self._graphs)

    def _require(self, request: Request) -> Support:
        """The claim, or the refusal as an error. Every method asks first: nothing falls back."""
        answer = self.supports(request)
        if not answer:
            raise UnsupportedError(answer, request)
        return answer

    # ---- operations

    def quantize(
        self, x: Tensor, to: Operand | Format, *, for_: Prepared | None = None, out: QTensor | None = None
    ) -> QTensor:
        """See `quantize.py`. Every weight here reads canonical scales, so `for_` changes nothing."""
        operand = to if isinstance(to, Operand) else Operand(to)
        self._require(QuantizeRequest(x=x.dtype, format=operand.format, static=operand.static))
        return quantize.quantize(x, operand, out)

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
        """See `weights.py`."""
        answer = self._require(request)
        if operand is not None or not isinstance(request, GemmRequest):
            raise FormatError(f"operand is {operand and operand.format}, the request says {request}")
        made = weights.build(w, request, answer, self._device, inputs, bias)
        return made if into is None else weights.refit(into, made)

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """The canonical form, bit for bit; what `quantize` gives is canonical already."""
        return thing if isinstance(thing, QTensor) else weights.as_weight(thing).canonical()

    def gemm(self, x: Tensor | QTensor, w: Prepared, *, input: int = 0, out: Tensor | None = None) -> Tensor:
        """See `gemm.py`."""
        return gemm.gemm(x, weights.as_weight(w), input, out)


def _captures(device: torch.device) -> bool:
    """Whether torch has graphs for this device."""
    if device.type in HOST or not hasattr(torch.accelerator, "Graph"):
        return False
    try:
        torch.accelerator.Graph()
    except RuntimeError:  # this kind of device has no implementation
        return False
    return True
