"""Operand: how one side of a product is quantized, and how its static scales follow a tensor-parallel cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qhal.errors import ShardError
from qhal.formats import Format
from qhal.sharding import grid_range


@dataclass(frozen=True, eq=False)
class Operand:
    """How one operand of a product is quantized. A given `scale` fixes the outermost level; finer levels are computed.

    scale  static scale, one value [1] or per feature; kept on the host too, so no kernel argument costs a sync
    zero   static zero point of the same shape
    clip   (low, high): the fractions of the range that are kept, see Rule.clip
    """

    format: Format
    scale: Tensor | None = None
    zero: Tensor | None = None
    clip: tuple[float, float] = (1.0, 1.0)

    @property
    def static(self) -> bool:
        """Whether the scale is given rather than computed from the data."""
        return self.scale is not None

    def equal(self, other: Operand | None) -> bool:
        """Same format, scale, zero and clip."""
        if other is None or (self.format, self.clip) != (other.format, other.clip):
            return False
        return all(
            (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
            for a, b in ((self.scale, other.scale), (self.zero, other.zero))
        )


def same_operand(a: Operand | None, b: Operand | None) -> bool:
    """Whether both are absent, or equal."""
    return a is b or (a is not None and a.equal(b))


def cut_operand(o: Operand | None, size: int, start: int, stop: int) -> Operand | None:
    """Static per-feature scales of a row-parallel input follow their features."""
    if o is None or o.scale is None or o.scale.numel() != size or size == 1:
        return o
    zero = o.zero if o.zero is None or o.zero.numel() == 1 else o.zero[..., start:stop]
    return replace(o, scale=o.scale[..., start:stop], zero=zero)


def cut_weight_operand(
    o: Operand | None, shape: tuple[int, int], dim: int, start: int, stop: int, name: str
) -> Operand | None:
    """Static scales of what the weight is rounded to follow its rows or columns, block by block."""
    if o is None or o.scale is None or o.scale.numel() == 1 or o.format.block is None:
        return o
    grid = o.format.block.grid(*shape)
    if o.scale.numel() != grid[0] * grid[1] or (o.format.scale is not None and not o.format.scale.plain):
        raise ShardError(f"{name}: {o.scale.numel()} static scales of the operand {o.format} have no rows to cut along")
    first, last, axis = grid_range(o.format.block, shape, dim, start, stop, f"{name}: operand {o.format}")
    if last < 0:
        return o

    def cut(plane: Tensor) -> Tensor:
        return plane.reshape(grid).narrow(axis, first, last - first)

    zero = o.zero if o.zero is None or o.zero.numel() == 1 else cut(o.zero)
    return replace(o, scale=cut(o.scale), zero=zero)
