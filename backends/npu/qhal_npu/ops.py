"""NpuOps: what an Ascend NPU executes, said honestly.

Products and quantizers run on torch_npu's operators where the table has a line for them (`table.py`, `products.py`,
`quantizing.py`). The rule for everything else is in `docs/npu.md`: no float64 on the device, nothing by another rule
than it says, a refusal names the demand that is broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.codebooks import CodebookTensor
from qhal.errors import FormatError, UnsupportedError
from qhal.formats import Format
from qhal.interface import MemoryStats
from qhal.prepared import Prepared
from qhal.requests import (
    Arithmetic,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    NumericsClass,
    QuantizeRequest,
    Request,
    Support,
    VQRequest,
)
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_npu import calls, products, quantizing, running, weights
from qhal_npu.soc import GENERATIONS
from qhal_npu.weights import NpuWeight
from qhal_portable import quantize as portable_quantize
from qhal_portable.ops import PortableOps

_NO_GRAPH = "graph capture is not connected to NPUGraph yet; ask without graph"
_UNPROVEN = "by the operator's published formula; a device's own bits are level L3"


class NpuOps(PortableOps):
    """QuantOps for Ascend NPUs.

    arch    generation: "A2", "A3", "A5", "310P"
    device  the torch device, "meta" offline
    """

    name: ClassVar[str] = "npu"
    interface: ClassVar[tuple[int, int]] = (1, 0)

    def __init__(self, arch: str, device: str) -> None:
        if arch not in GENERATIONS:
            raise UnsupportedError(Support("unsupported", f"{arch!r} is none of {', '.join(GENERATIONS)}"))
        self._arch = arch
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        """The torch device of the results."""
        return self._device

    def synchronize(self) -> None:
        """Wait until everything that was asked for is done."""
        if self._device.type == "npu":
            calls.runtime().synchronize(self._device)

    def memory_stats(self) -> MemoryStats:
        """Bytes in use by this process, their peak, and the total of the device."""
        if self._device.type != "npu":
            return MemoryStats(0, 0, 0)
        used, peak = calls.runtime().memory_allocated(self._device), calls.runtime().max_memory_allocated(self._device)
        return MemoryStats(used, peak, calls.runtime().mem_get_info(self._device)[1])

    def supports(self, request: Request) -> Support:
        """What the table says, after what makes a request well-formed at all."""
        if isinstance(request, GemmRequest):
            return self._product(request)
        answer = super().supports(request)
        if not answer:
            return answer
        if isinstance(request, QuantizeRequest):
            return self._quantizer(request, answer)
        return Support("not_implemented", f"{self.name} has no {type(request).__name__} yet")

    def quantize(
        self, x: Tensor, to: Operand | Format, *, for_: Prepared | None = None, out: QTensor | None = None
    ) -> QTensor:
        """See `quantizing.py`."""
        o = to if isinstance(to, Operand) else Operand(to)
        if isinstance(x, Tensor):
            self._require(QuantizeRequest(x=x.dtype, format=o.format, static=o.static))
        if for_ is not None:
            self._weight(for_)
        return portable_quantize.quantize(
            x, o, self.device, out, by=lambda rows, operand: quantizing.quantize(rows, operand, self._arch)
        )

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
        if not isinstance(request, GemmRequest):
            return super().prepare(w, request, inputs=inputs, operand=operand, bias=bias, into=into)
        if not isinstance(w, QTensor | CodebookTensor | Tensor):
            raise FormatError(f"a {type(w).__name__} does not fit the request {request}")
        if operand is not None:
            raise FormatError(f"the operand is {operand.format}, the request says {request.operand}")
        path = products.choose(request, self._arch)
        assert isinstance(path, products.Path)
        for o in inputs:
            self._require(QuantizeRequest(x=torch.bfloat16, format=o.format, static=o.static))
        made = weights.build(w, request, answer, self, path, inputs=inputs, bias=bias)
        if into is not None:
            if not isinstance(into, NpuWeight):
                self._weight(into)
                raise FormatError(f"into= was prepared for {into.request}, not for {request}; prepare a new weight")
            return weights.refit(into, made)
        made.run = running.bind(made, self._arch)
        return made

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """The canonical form, in tensors of its own; layouts of operators are inverted."""
        return weights.restored(thing) if isinstance(thing, NpuWeight) else super().restore(thing)

    def _product(self, request: GemmRequest) -> Support:
        """The table's answer to a product that is well-formed."""
        answer = super().supports(replace(request, graph=False))
        if not answer:
            return answer
        if request.graph:
            return Support("unsupported", _NO_GRAPH, nearest=replace(request, graph=False))
        found = products.choose(request, self._arch)
        if isinstance(found, products.Refusal):
            return self._refused(request, found)
        if request.batch_invariant and not found.exact:
            reason = f"{found.kind}: the order of a sum depends on the number of rows"
            return Support("unsupported", reason, nearest=replace(request, batch_invariant=False))
        rules = []
        for f, fixed in zip(request.x, (*request.static, *(False for _ in request.x)), strict=False):
            if not f.plain:
                maker = quantizing.choose(f, None, fixed, self._arch, clip=request.clip)
                if isinstance(maker, str):
                    return Support("unsupported", maker)
                rules += [maker.rule] if maker.rule is not None else []
        arithmetic = Arithmetic.of(request)
        assert arithmetic is not None
        own = found.kind in ("16 bits", "fp32") and not found.note
        return replace(
            answer,
            level="full" if own else "conditional",
            reason=found.note or ("" if own else _UNPROVEN),
            arithmetic=replace(arithmetic, accumulate=found.accumulate),
            rule=rules[0] if rules else None,
            executes=found.executes,
            numerics=found.numerics,
            layouts=(found.layout,),
            deterministic=found.exact,
            batch_invariant=found.exact,
        )

    def _refused(self, request: GemmRequest, found: products.Refusal) -> Support:
        """A refusal, with the nearest request only if it is one that works."""
        nearest: Request | None = found.nearest
        if nearest is not None and nearest != request:
            answer = self.supports(nearest)
            nearest = nearest if answer else answer.nearest
        return Support("unsupported", str(found), nearest=nearest)

    def _quantizer(self, request: QuantizeRequest, answer: Support) -> Support:
        found = quantizing.choose(request.format, request.x, request.static, self._arch)
        if isinstance(found, str):
            return Support("unsupported", found)
        executes = answer.executes if found.op == "torch" else found.op
        return replace(
            answer,
            level="conditional",
            reason=_UNPROVEN,
            rule=found.rule,
            executes=executes,
            numerics=NumericsClass.EXACT,
        )
