"""Planted faults in how a layer's inputs are quantized: the part of their range that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from qhal.formats import Format
from qhal.prepared import Prepared
from qhal.requests import GemmRequest
from qhal.specs import Operand
from qhal_conformance.wrapping import Weight, WeightRequest, Wrapped

Clip = tuple[float, float]


class _Clips(Wrapped):
    """Prepares for inputs with another clip than the given one."""

    def _clip(self, clip: Clip) -> Clip:
        return clip

    def prepare(self, w: Weight, request: WeightRequest, *, inputs: Sequence[Operand] = (), **how: Any) -> Prepared:
        """Other inputs, the rest as it is."""
        changed = tuple(replace(o, clip=self._clip(o.clip)) for o in inputs)
        return self._inner.prepare(w, request, inputs=changed, **how)


def _clips(change: Callable[[Clip], Clip]) -> type[Wrapped]:
    return type("ClipFault", (_Clips,), {"_clip": lambda self, clip: change(clip)})


class NotCutFirst(Wrapped):
    """A range that x is cut to only gives the scale."""

    def prepare(self, w: Weight, request: WeightRequest, *, inputs: Sequence[Operand] = (), **how: Any) -> Prepared:
        """Another rule, the same scale."""
        if isinstance(request, GemmRequest):
            request = replace(request, x=tuple(_scaled(f) for f in request.x))
            inputs = [replace(o, format=_scaled(o.format)) for o in inputs]
        return self._inner.prepare(w, request, inputs=inputs, **how)


def _scaled(f: Format) -> Format:
    return replace(f, rule=replace(f.rule, clip="scale"))


INPUT_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
    ("clip-ignored", "core-int8", "inputs keep their whole range", _clips(lambda clip: (1.0, 1.0))),
    ("clip-ignored-fp8", "core-fp8", "inputs keep their whole range", _clips(lambda clip: (1.0, 1.0))),
    ("clip-swapped", "core-int8", "both ends of the range take the other's share", _clips(lambda clip: clip[::-1])),
    ("clip-one-share", "core-int8", "both ends take the share of the lower one", _clips(lambda clip: (clip[0],) * 2)),
    ("clip-not-first", "core-int8", NotCutFirst.__doc__ or "", NotCutFirst),
)
"""(name, profile, what is wrong, class)"""
