"""Planted faults in products grouped by expert: what a token names, activations, sizes, how weights are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.formats import Format
from qhal.groups import Groups, Indexed, Masked, Offsets
from qhal.prepared import Prepared
from qhal.requests import GroupedRequest, NumericsClass, Request, Support, minimum_class
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance.faults_weight import spoiled
from qhal_conformance.wrapping import Weight, WeightRequest, Wrapped


class _Grouped(Wrapped):
    """Groups changed before, the result changed in place after."""

    def _before(self, groups: Groups) -> Groups:
        return groups

    def _after(self, y: Tensor | QTensor, x: Tensor | QTensor, w: Prepared, groups: Groups) -> None:
        return None

    def grouped_gemm(self, x: Tensor | QTensor, w: Prepared, groups: Groups, **how: Any) -> Tensor | QTensor:
        """Change, multiply, change."""
        y = self._inner.grouped_gemm(x, w, self._before(groups), **how)
        self._after(y, x, w, groups)
        return y


def _groups(change: Callable[[Groups], Groups]) -> type[Wrapped]:
    return type("GroupsFault", (_Grouped,), {"_before": lambda self, groups: change(groups)})


def _result(when: Callable[[Tensor | QTensor, Tensor | QTensor, Any, Groups], Any]) -> type[Wrapped]:
    """Zeros where `when` says so: nothing, True for all, or an index."""

    def after(self: _Grouped, y: Tensor | QTensor, x: Tensor | QTensor, w: Prepared, groups: Groups) -> None:
        chosen = when(y, x, w.request, groups)
        if chosen is not None and chosen is not False:
            raw = y.codes.view(torch.uint8) if isinstance(y, QTensor) else y
            raw[... if chosen is True else chosen] = 0

    return type("ResultFault", (_Grouped,), {"_after": after})


def _activation(name: str) -> type[Wrapped]:
    return _result(lambda y, x, r, g: r.activation is not None and r.activation.name == name)


def _tile_of_expert(y: Tensor | QTensor, x: Tensor | QTensor, r: Any, groups: Groups) -> Tensor | None:
    if not isinstance(groups, Offsets):
        return None
    ends = groups.offsets.tolist()
    late = [row for a, b in itertools.pairwise(ends) for row in range(a + 64, b)]
    return torch.tensor(late, dtype=torch.long)


def _same_twice(y: Tensor | QTensor, x: Tensor | QTensor, r: Any, groups: Groups) -> Tensor | None:
    if not isinstance(groups, Indexed) or groups.ids.shape[1] < 3 or groups.weights is not None:
        return None
    again = torch.zeros_like(groups.ids, dtype=torch.bool)
    again[:, 2] = groups.ids[:, 2] == groups.ids[:, 0]
    return again.reshape(-1)


def _normalized(groups: Groups) -> Groups:
    if not isinstance(groups, Indexed) or groups.weights is None:
        return groups
    return replace(groups, weights=groups.weights / groups.weights.sum(-1, keepdim=True), cache={})


def _narrow_weights(groups: Groups) -> Groups:
    if not isinstance(groups, Indexed) or groups.weights is None:
        return groups
    return replace(groups, weights=groups.weights.bfloat16().float(), cache={})


class FirstExpertsScale(Wrapped):
    """Static input scales of the first expert serve all."""

    def prepare(self, w: Weight, request: WeightRequest, *, inputs: Sequence[Operand] = (), **how: Any) -> Prepared:
        """With one scale."""
        shared = tuple(
            replace(o, scale=o.scale[:1].expand_as(o.scale).contiguous()) if o.per_expert and o.scale is not None else o
            for o in inputs
        )
        return self._inner.prepare(w, request, inputs=shared, **how)


def _least_scale(w: QTensor) -> QTensor:
    wide = isinstance(w.scale, Tensor) and w.scale.is_floating_point()
    return replace(w, scale=w.scale.clamp(min=1e-5)) if wide and isinstance(w.scale, Tensor) else w


class CutWeights(Wrapped):
    """Weights are cut to bf16, which the class allows to round."""

    def supports(self, request: Request) -> Support:
        """In the class of rounded weights, where the request allows it."""
        answer = self._inner.supports(request)
        if not isinstance(request, GroupedRequest) or not answer or not request.gemm.x[0].plain:
            return answer
        allowed = minimum_class(request.gemm) >= NumericsClass.DEQUANT_16
        return replace(answer, numerics=NumericsClass.DEQUANT_16) if allowed else answer

    def prepare(self, w: Weight, request: WeightRequest, **how: Any) -> Prepared:
        """As a weight of bf16 numbers."""
        if not isinstance(w, QTensor) or not isinstance(request, GroupedRequest) or not request.gemm.x[0].plain:
            return self._inner.prepare(w, request, **how)
        cut = ((w.dequantize().view(torch.int32) >> 16) << 16).view(torch.float32).bfloat16()
        plain = replace(request, gemm=replace(request.gemm, w=Format("bf16")))
        made = self._inner.prepare(QTensor(Format("bf16"), cut), plain, **how)
        self.__dict__.setdefault("_kept", {})[made.handle] = w
        return made

    def restore(self, thing: Any) -> Any:
        """The weight as it was given."""
        return self.__dict__.get("_kept", {}).get(getattr(thing, "handle", None)) or self._inner.restore(thing)


class SixteenBitSums(Wrapped):
    """Eight integer products at a time are added up in 16 bits, which saturate."""

    def prepare(self, w: Weight, request: WeightRequest, *, inputs: Sequence[Operand] = (), **how: Any) -> Prepared:
        """Keep the codes."""
        made = self._inner.prepare(w, request, inputs=inputs, **how)
        if isinstance(w, QTensor) and w.format.element == "int8" and inputs and how.get("bias") is None:
            self.__dict__.setdefault("_kept", {})[made.handle] = (w, inputs[0])
        return made

    def grouped_gemm(self, x: Tensor | QTensor, w: Prepared, groups: Groups, **how: Any) -> Tensor | QTensor:
        """Rows in the order of experts, plain results; what else there is as it was."""
        y = self._inner.grouped_gemm(x, w, groups, **how)
        request, (own, given) = w.request, self.__dict__.get("_kept", {}).get(w.handle, (None, None))
        plain = isinstance(request, GroupedRequest) and request.activation is None
        if own is None or not plain or not isinstance(groups, Offsets):
            return y
        if isinstance(x, QTensor) or isinstance(y, QTensor):
            return y
        for e, (a, b) in enumerate(itertools.pairwise(groups.offsets.tolist())):
            q: Any = self._inner.quantize(x[a:b], given.expert(e) if given.per_expert else given)
            left, right = q.codes.float().unflatten(1, (-1, 8)), own.codes[e].float().unflatten(1, (-1, 8))
            total = torch.einsum("tgi,ngi->tgn", left, right).clamp(-(2**15), 2**15 - 1).sum(1)
            y[a:b] = (total * q.scale.reshape(-1, 1) * own.scale[e].reshape(1, -1)).to(y.dtype)
        return y


EXPERT_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
    ("expert-rows-past-64", "moe", "rows of an expert past 64 are not computed", _result(_tile_of_expert)),
    ("one-row-in-all", "moe", "a single row is not computed", _result(lambda y, x, r, g: y.shape[0] == 1)),
    ("expert-twice", "moe", "an expert that a token names twice is computed once", _result(_same_twice)),
    ("top-4", "moe", "more than two experts per token are not computed",
     _result(lambda y, x, r, g: isinstance(g, Indexed) and g.ids.shape[1] > 2)),
    ("weights-normalized", "moe", "weights of a sum are divided by their sum", _groups(_normalized)),
    ("weights-in-bf16", "moe", "weights of a sum are rounded to bf16", _groups(_narrow_weights)),
    ("full-expert", "moe", "an expert without padding is not computed",
     _result(lambda y, x, r, g: isinstance(g, Masked) and bool((g.counts == x.shape[1]).any()))),
    ("gelu-missing", "moe", "gelu gives zeros", _activation("gelu")),
    ("gelu-tanh-missing", "moe", "gelu_tanh gives zeros", _activation("gelu_tanh")),
    ("relu2-missing", "moe", "relu squared gives zeros", _activation("relu2")),
    ("swiglu-missing", "moe", "swiglu gives zeros", _activation("swiglu")),
    ("second-quantization", "moe", "codes of a quantized result are zero",
     _result(lambda y, x, r, g: r.quantize is not None)),
    ("quantized-rows", "moe", "x that is quantized already gives zeros",
     _result(lambda y, x, r, g: isinstance(x, QTensor))),
    ("static-scale-of-first", "moe", FirstExpertsScale.__doc__ or "", FirstExpertsScale),
    ("expert-scale-clamped", "moe", "scales of a weight below 1e-5 are taken as 1e-5", spoiled(_least_scale)),
    ("expert-weights-cut", "moe", CutWeights.__doc__ or "", CutWeights),
    ("expert-sums-16-bits", "moe", SixteenBitSums.__doc__ or "", SixteenBitSums),
)  # fmt: skip
"""(name, profile, what is wrong, class)"""
