"""Planted faults in quantization, in claims and refusals, in refits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.codebooks import CodebookTensor
from qhal.formats import Format
from qhal.prepared import Prepared
from qhal.requests import GemmRequest, Request, Support
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance.wrapping import Weight, WeightRequest, Wrapped

Change = Callable[[Format], Format]


class _OtherRule(Wrapped):
    """Quantizes by another rule, and labels the result with the one that was asked for."""

    _change: Change

    def quantize(self, x: Tensor, to: Operand | Format, *, out: QTensor | None = None, **how: Any) -> QTensor:
        """Change the rule, quantize, restore the label."""
        operand = to if isinstance(to, Operand) else Operand(to)
        changed = type(self)._change(operand.format)
        if operand.format.scale is None:
            return self._inner.quantize(x, to, out=out, **how)
        target = None if out is None else replace(out, format=changed)
        q = self._inner.quantize(x, replace(operand, format=changed), out=target, **how)
        return replace(q, format=operand.format)


def other_rule(only: str = "", /, **fields: Any) -> type[Wrapped]:
    """A backend class whose quantization rule has these fields; `only` for one kind of blocks."""

    def change(f: Format) -> Format:
        if only and (f.block is None or f.block.kind != only):
            return f
        if f.rule.domain == "minmax" and "qmax" in fields:
            return f
        return replace(f, rule=replace(f.rule, **fields))

    return type("OtherRule", (_OtherRule,), {"_change": staticmethod(change)})


class _QuantizedAfter(Wrapped):
    """Spoils the codes or scales of an otherwise right result."""

    def _after(self, q: QTensor, x: Tensor) -> None:
        raise NotImplementedError

    def quantize(self, x: Tensor, to: Operand | Format, **how: Any) -> QTensor:
        """Quantize, then spoil in place."""
        q = self._inner.quantize(x, to, **how)
        if x.numel():
            self._after(q, x)
        return q


class LastRowOfScalesStale(_QuantizedAfter):
    """The scale of the last row is that of the row before."""

    def _after(self, q: QTensor, x: Tensor) -> None:
        if isinstance(q.scale, Tensor) and q.scale.shape[-2] > 1:
            q.scale[-1] = q.scale[-2]


class LowestKept(_QuantizedAfter):
    """The largest negative value becomes -128."""

    def _after(self, q: QTensor, x: Tensor) -> None:
        if q.codes.dtype == torch.int8 and q.format.element == "int8":
            q.codes[q.codes == -127] = -128


class ScaleOfWholeTensor(Wrapped):
    """Row scales are computed over all rows."""

    def quantize(self, x: Tensor, to: Operand | Format, **how: Any) -> QTensor:
        """The same scale for every row."""
        fmt = to.format if isinstance(to, Operand) else to
        q = self._inner.quantize(x, to, **how)
        if fmt.block is not None and fmt.block.kind == "row" and isinstance(q.scale, Tensor) and q.scale.numel():
            q.scale.fill_(float(q.scale.float().max()))
        return q


class RestoreLosesCode(Wrapped):
    """restore returns one code of the weight changed."""

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """Spoil the last code."""
        back = self._inner.restore(thing)
        if isinstance(back, QTensor) and isinstance(thing, Prepared) and not back.format.plain:
            codes = back.codes.clone()
            codes.view(torch.uint8)[..., -1, -1] ^= 1
            return replace(back, codes=codes)
        return back


class ClaimsEverything(Wrapped):
    """supports says yes to everything."""

    def supports(self, request: Request) -> Support:
        """Full."""
        answer = self._inner.supports(request)
        return answer if answer else Support("full", deterministic=True)


class RefusesWithoutReason(Wrapped):
    """A refusal has no reason."""

    def supports(self, request: Request) -> Support:
        """No reason."""
        answer = self._inner.supports(request)
        return answer if answer else Support(answer.level)


class FallsBack(Wrapped):
    """What is refused is executed in another way, silently."""

    def prepare(self, w: Weight, request: WeightRequest, **how: Any) -> Prepared:
        """Without the graph that was asked for."""
        if isinstance(request, GemmRequest) and request.graph:
            request = replace(request, graph=False)
        return self._inner.prepare(w, request, **how)


class RefitIgnored(Wrapped):
    """prepare(into=) returns the old weight."""

    def prepare(self, w: Weight, request: WeightRequest, *, into: Prepared | None = None, **how: Any) -> Prepared:
        """Keep what there is."""
        return into if into is not None else self._inner.prepare(w, request, **how)


class RefitMoves(Wrapped):
    """prepare(into=) makes a new weight and returns that."""

    def prepare(self, w: Weight, request: WeightRequest, *, into: Prepared | None = None, **how: Any) -> Prepared:
        """At new addresses."""
        return self._inner.prepare(w, request, **how)


class GlobalState(Wrapped):
    """gemm switches torch to deterministic algorithms and leaves it so."""

    def gemm(self, x: Tensor | QTensor, w: Prepared, **how: Any) -> Tensor:
        """With a side effect, on a setting that changes no number here."""
        other = {"high": "highest", "highest": "high"}.get(torch.get_float32_matmul_precision(), "highest")
        torch.set_float32_matmul_precision(other)
        return self._inner.gemm(x, w, **how)


QUANTIZE_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
    ("half-away-int8", "core-int8", "ties go away from zero", other_rule(round="away")),
    ("half-away-fp8", "core-fp8", "ties go away from zero", other_rule(round="away")),
    ("reciprocal-multiply", "core-fp8", "x * (1 / s) for x / s", other_rule(apply="rcp")),
    ("reciprocal-by-row", "core-fp8", "x * (1 / s) for x / s where rows have a scale", other_rule("row", apply="rcp")),
    ("reciprocal-scale", "core-int8", "amax * (1 / qmax) for amax / qmax", other_rule(scale="rcp")),
    ("scale-in-bf16", "core-int8", "scale and quotient are rounded to bf16", other_rule(arith="bf16")),
    ("empty-zero", "core-int8", "an all-zero block gets scale 0", other_rule(empty="zero")),
    ("empty-eps", "core-fp8", "an all-zero block gets a tiny scale", other_rule(empty="eps")),
    ("qmax-128", "core-int8", "amax / 128 for amax / 127", other_rule(qmax=128.0)),
    ("qmax-240", "core-fp8", "amax / 240 for amax / 448", other_rule(qmax=240.0)),
    ("e8m0-ceil", "mx", "exponents are rounded up", other_rule(e8m0="ceil")),
    ("e8m0-even", "mx", "exponents follow the rounded amax", other_rule(e8m0="even")),
    ("specials-saturate", "core-fp8", "NaN and Inf become numbers", other_rule(special="saturate")),
    ("quantize-last-scale", "core-int8", LastRowOfScalesStale.__doc__ or "", LastRowOfScalesStale),
    ("quantize-lowest", "core-int8", LowestKept.__doc__ or "", LowestKept),
    ("quantize-scale-shared", "core-int8", ScaleOfWholeTensor.__doc__ or "", ScaleOfWholeTensor),
    ("restore-loses-code", "weight-int4", RestoreLosesCode.__doc__ or "", RestoreLosesCode),
    ("claims-everything", "core", ClaimsEverything.__doc__ or "", ClaimsEverything),
    ("refuses-without-reason", "core", RefusesWithoutReason.__doc__ or "", RefusesWithoutReason),
    ("falls-back", "core", FallsBack.__doc__ or "", FallsBack),
    ("refit-ignored", "core", RefitIgnored.__doc__ or "", RefitIgnored),
    ("refit-moves", "core", RefitMoves.__doc__ or "", RefitMoves),
    ("global-state", "core", GlobalState.__doc__ or "", GlobalState),
)
"""(name, profile, what is wrong, class)"""
