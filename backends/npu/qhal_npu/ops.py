"""NpuOps: what an Ascend NPU executes, said honestly.

Products and quantizers run on torch_npu's operators where the table has a line for them (`table.py`, `products.py`,
`quantizing.py`). The rule for everything else is in `docs/npu.md`: no float64 on the device, nothing by another rule
than it says, a refusal names the demand that is broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache
from qhal.codebooks import CodebookTensor
from qhal.codecs import Codec, Collective
from qhal.errors import FormatError, UnsupportedError
from qhal.formats import Format
from qhal.groups import Groups
from qhal.interface import MemoryStats
from qhal.prepared import Prepared
from qhal.requests import (
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    QuantizeRequest,
    Request,
    Support,
    VQRequest,
)
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_npu import caches, calls, fused, grouped, products, quantizing, rotations, running, weights
from qhal_npu.soc import GENERATIONS
from qhal_npu.support import support, unmade
from qhal_npu.weights import NpuWeight
from qhal_portable import gemm, kv
from qhal_portable import quantize as portable_quantize
from qhal_portable.attention import PagedBatch
from qhal_portable.ops import PortableOps


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
        """See `support.py`."""
        return support(request, self._arch)

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
        if not isinstance(request, GemmRequest | GroupedRequest):
            return super().prepare(w, request, inputs=inputs, operand=operand, bias=bias, into=into)
        if not isinstance(w, QTensor | CodebookTensor | Tensor):
            raise FormatError(f"a {type(w).__name__} does not fit the request {request}")
        if operand is not None:
            raise FormatError(f"the operand is {operand.format}, the request says no operand")
        if isinstance(request, GroupedRequest):
            path = grouped.choose(request, self._arch)
        else:
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
        if isinstance(request, GemmRequest):
            made.run = running.bind(made, self._arch)
        return made

    def grouped_gemm(
        self, x: Tensor | QTensor, w: Prepared, groups: Groups, *, out: Tensor | QTensor | None = None
    ) -> Tensor | QTensor:
        """See `grouped.py`."""
        made = self._weight(w)
        if not isinstance(made, NpuWeight):
            raise FormatError(f"the weight was prepared for {made.request}; grouped_gemm needs a GroupedRequest")
        return grouped.grouped_gemm(x, made, groups, out, self._arch)

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """The canonical form, in tensors of its own; layouts of operators are inverted."""
        return weights.restored(thing) if isinstance(thing, NpuWeight) else super().restore(thing)

    def vq_decode(self, w: Prepared, *, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """See `portable.gemm.vq_decode`; the codes of a weight that is multiplied decoded lie in the host's memory."""
        return gemm.write(gemm.vq_decode(self._weight(w), rows, None).to(self.device), out)

    def quant_kv(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        """The portable rows, scattered by `caches.write`."""
        self._require(cache.request)
        kv.quant_kv(k, v, cache, slots, write=caches.write)

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
        """See `fused.py`."""
        if not isinstance(batch, PagedBatch):
            raise FormatError(f"the batch is a {type(batch).__name__}; make it with attention_batch of these ops")
        return fused.attention(q, cache, batch, sinks, out, lse, self._arch)

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
        """The portable collective over the group's own transport (hccl); refused before anything travels."""
        fault = unmade(codec.format, self._arch)
        if fault:
            raise UnsupportedError(Support("unsupported", fault))
        return super().comm_quant(x, collective, codec, group, splits=splits, decode=decode, out=out, async_op=async_op)

    def _rotate(self, x: Tensor, chain: Sequence[Rotation]) -> Tensor:
        return rotations.rotate(x, chain)
