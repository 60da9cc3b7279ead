"""NpuOps: what an Ascend NPU executes, said honestly.

Products and quantizers run on torch_npu's operators where the table has a line for them (`table.py`, `products.py`,
`quantizing.py`). The rule for everything else is in `docs/npu.md`: no float64 on the device, nothing by another rule
than it says, a refusal names the demand that is broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
    Arithmetic,
    AttentionRequest,
    CommRequest,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    KVRequest,
    NumericsClass,
    QuantizeRequest,
    Request,
    Support,
    VQRequest,
)
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_npu import caches, calls, grouped, products, quantizing, rotations, running, weights
from qhal_npu.soc import GENERATIONS
from qhal_npu.weights import NpuWeight
from qhal_portable import kv
from qhal_portable import quantize as portable_quantize
from qhal_portable.attention import PagedBatch
from qhal_portable.ops import PortableOps

_NO_GRAPH = "graph capture is not connected to NPUGraph yet; ask without graph"
_TORCH = "on the NPU's own torch operators; waits for the device where lengths or counts are read on the host"
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
        if isinstance(request, HadamardRequest):
            return self._rotation(request, answer)
        if isinstance(request, KVRequest):
            return self._cache(request, answer)
        if isinstance(request, AttentionRequest):
            return self._attention(request, answer)
        if isinstance(request, VQRequest):
            return self._here(answer, "table entries gathered and summed in fp32 by the NPU's torch operators")
        if isinstance(request, CommRequest):
            return self._collective(request, answer)
        assert isinstance(request, GroupedRequest)
        return self._grouped(request, answer)

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
        grouped_ = isinstance(request, GroupedRequest)
        path = grouped.choose(request, self._arch) if grouped_ else products.choose(request, self._arch)  # type: ignore[arg-type]
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
        assert isinstance(made, NpuWeight)
        return grouped.grouped_gemm(x, made, groups, out, self._arch)

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """The canonical form, in tensors of its own; layouts of operators are inverted."""
        return weights.restored(thing) if isinstance(thing, NpuWeight) else super().restore(thing)

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
        """See `caches.py`."""
        if not isinstance(batch, PagedBatch):
            raise FormatError(f"the batch is a {type(batch).__name__}; make it with attention_batch of these ops")
        return caches.attend(q, cache, batch, sinks, out, lse, self._arch)

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
        fault = self._unmade(codec.format)
        if fault:
            raise UnsupportedError(Support("unsupported", fault))
        return super().comm_quant(x, collective, codec, group, splits=splits, decode=decode, out=out, async_op=async_op)

    def _rotate(self, x: Tensor, chain: Sequence[Rotation]) -> Tensor:
        return rotations.rotate(x, chain)

    def _here(self, answer: Support, executes: str, **more: Any) -> Support:
        """The answer for what the NPU's own torch operators execute in fp32 and whole numbers."""
        return replace(answer, level="conditional", reason=_TORCH, executes=executes, deterministic=False, **more)

    def _rotation(self, request: HadamardRequest, answer: Support) -> Support:
        fault = "" if request.quantize is None else self._unmade(request.quantize)
        if fault:
            return Support("unsupported", fault, nearest=replace(request, quantize=None))
        words = "fp32 products with Sylvester matrices up to order 16, tables and factors; one rounding"
        return self._here(answer, words, batch_invariant=False)

    def _cache(self, request: KVRequest, answer: Support) -> Support:
        for f in (request.k, request.v):
            fault = self._unmade(f, static=f.block is not None and f.block.kind in kv.STATIC)
            if fault:
                return Support("unsupported", fault)
        return self._here(answer, f"{answer.executes}, written by npu_scatter_nd_update_")

    def _attention(self, request: AttentionRequest, answer: Support) -> Support:
        refused = self._cache(request.kv, answer)
        if not refused:
            return refused
        for f in (request.q, request.p, *([] if request.q_rope is None else [request.q_rope])):
            fault = self._unmade(f, static=True)
            if fault:
                return Support("unsupported", fault)
        why = caches.fused(request, self._arch)
        words = f"pages gathered and decoded, fp32 products and softmax, P rounded to {request.p}, one rounding"
        arithmetic = None if answer.arithmetic is None else replace(answer.arithmetic, accumulate="fp32")
        if not why:
            words = f"npu_fused_infer_attention_score for contiguous planes and sequences with keys; else {words}"
        numerics = NumericsClass.FP32_ACC if why else NumericsClass.REDUCED_ACC
        found = self._here(answer, words, numerics=numerics, arithmetic=arithmetic, batch_invariant=False)
        return replace(found, reason=f"{found.reason}; not fused: {why}") if why else found

    def _collective(self, request: CommRequest, answer: Support) -> Support:
        fault = self._unmade(request.codec.format)
        return Support("unsupported", fault) if fault else self._here(answer, answer.executes)

    def _unmade(self, f: Format, *, static: bool = False) -> str:
        """Why codes of a format cannot be made or read here; "" if they can."""
        if f.plain and not f.element.startswith("e"):
            return ""
        found = quantizing.choose(f, None, static, self._arch)
        if isinstance(found, str):
            return found
        return f"{f} is made in float64, which the NPU does not compute" if found.op == "host" else ""

    def _grouped(self, request: GroupedRequest, answer: Support) -> Support:
        one = self._product(replace(request.gemm, batch_invariant=False))
        found = grouped.choose(request, self._arch)
        if isinstance(found, products.Refusal):
            if not one:
                nearest = one.nearest
                gemm = replace(request, gemm=nearest) if isinstance(nearest, GemmRequest) else None
                return replace(one, nearest=gemm if gemm is not None and self.supports(gemm) else None)
            return Support("unsupported", str(found))
        if request.gemm.batch_invariant:
            return Support("unsupported", "experts: the order of a sum depends on the number of rows")
        fault = "" if request.quantize is None else self._unmade(request.quantize)
        if fault:
            return Support("unsupported", fault)
        words = f"{found.kind} by npu_grouped_matmul over sorted rows; {found.executes}"
        reason = "; ".join(t for t in (found.note, _UNPROVEN) if t)
        arithmetic = None if answer.arithmetic is None else replace(answer.arithmetic, accumulate=found.accumulate)
        return replace(
            answer, level="conditional", reason=reason, rule=one.rule, executes=words, numerics=found.numerics,
            arithmetic=arithmetic, layouts=(found.layout,), deterministic=False, batch_invariant=False,
        )  # fmt: skip

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
                if isinstance(maker, str) or maker.op == "host":
                    return Support("unsupported", maker if isinstance(maker, str) else f"{f} is made on the host")
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
        executes = answer.executes if found.op in ("torch", "host") else found.op
        executes += " on the host" if found.op == "host" else ""
        return replace(
            answer,
            level="conditional",
            reason=_UNPROVEN,
            rule=found.rule,
            executes=executes,
            numerics=NumericsClass.EXACT,
        )
