"""Buffers that show what a kernel did beside its result: canaries around, poison inside, a copy of every input.

A result buffer starts as NaN, so a tile that is never written is seen. An input's neighbours are NaN too: reading past
a row ends in a NaN, and writing there changes the canary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from qhal.tensors import QTensor, same_bits

Storage = Literal["contiguous", "offset", "strided"]
STORAGES: tuple[Storage, ...] = ("contiguous", "offset", "strided")
"""contiguous | offset by one element (so 16-byte alignment is lost) | rows three elements further apart than needed."""

_MARGIN = 256
_POISON = 0x7F  # a byte that is NaN in every small float when repeated, and no small number in an integer


@dataclass(frozen=True)
class Guarded:
    """A tensor inside a larger buffer. `view` is what the backend sees."""

    view: Tensor
    canvas: Tensor
    before: Tensor

    def changed(self) -> bool:
        """Whether any bit of the buffer, the tensor included, differs from its first state."""
        return not torch.equal(_bytes(self.canvas), self.before)

    def touched_outside(self) -> bool:
        """Whether any bit beside the tensor differs."""
        after = self.canvas.clone()
        first = self.before.clone().view(self.canvas.dtype)
        inner = after.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset())
        inner.copy_(first.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()))
        return not torch.equal(_bytes(after), self.before)


def place(t: Tensor, storage: str, device: torch.device) -> Guarded:
    """A copy of a tensor in a guarded buffer on the device, laid out as `storage` says."""
    guarded = poisoned(tuple(t.shape), t.dtype, storage, device)
    guarded.view.copy_(t)
    return Guarded(guarded.view, guarded.canvas, _bytes(guarded.canvas).clone())


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, storage: str, device: torch.device) -> Guarded:
    """A result buffer, NaN inside and around."""
    row = prod(shape[1:])
    pitch = row + 3 if storage == "strided" else row
    margin = _MARGIN // dtype.itemsize
    start = margin + (1 if storage == "offset" else 0)
    total = start + shape[0] * pitch + margin
    if dtype.itemsize > 1 and dtype.is_floating_point:
        canvas = torch.full((total,), float("nan"), dtype=dtype, device=device)
    else:
        canvas = torch.full((total * dtype.itemsize,), _POISON, dtype=torch.uint8, device=device).view(dtype)
    strides = [pitch] + [prod(shape[i + 1 :]) for i in range(1, len(shape))]
    view = canvas.as_strided(shape, strides, start)
    return Guarded(view, canvas, _bytes(canvas).clone())


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, to be compared by `differing` after the call."""
    return {name: t.clone() for name, t in tensors.items()}


def differing(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors whose bits changed."""
    return [name for name, t in before.items() if not same_bits(t, after[name])]


def planes(q: QTensor | Tensor | None, name: str) -> dict[str, Tensor]:
    """Every plane of an operand by dotted name; nothing for None."""
    if q is None:
        return {}
    if isinstance(q, QTensor):
        return {f"{name}.{part}": t for part, t in q.planes().items()}
    return {name: q}


def poisoned_like(q: QTensor) -> QTensor:
    """The same planes with other contents: an `out` that must be written whole."""

    def poison(t: Tensor) -> Tensor:
        t = t.contiguous()
        spoiled = torch.full_like(t.view(torch.uint8), 0x55) if t.element_size() == 1 else torch.zeros_like(t) + 7
        return spoiled.view(t.dtype)

    scale = poisoned_like(q.scale) if isinstance(q.scale, QTensor) else None if q.scale is None else poison(q.scale)
    zero = poison(q.zero) if isinstance(q.zero, Tensor) else q.zero
    return replace(q, codes=poison(q.codes), scale=scale, zero=zero)
