"""Operand: how one side of a product is quantized; static scales follow experts and tensor-parallel cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qhal.errors import FormatError, ShardError
from qhal.formats import Format
from qhal.requests import GemmRequest, GroupedRequest
from qhal.sharding import bounds, grid_range


@dataclass(frozen=True, eq=False)
class Operand:
    """How one operand of a product is quantized. A given `scale` fixes the outermost level; finer levels are computed.

    scale       static scale, one value [1] or per feature; kept on the host too, so no kernel argument costs a sync
    zero        static zero point of the same shape
    clip        (low, high): the fractions of the range that are kept, see Rule.clip
    per_expert  scale and zero have one row per expert: [E, 1], or [E, K] per feature. Every expert's rows of a grouped
                product are quantized by themselves with `expert(e)`
    """

    format: Format
    scale: Tensor | None = None
    zero: Tensor | None = None
    clip: tuple[float, float] = (1.0, 1.0)
    per_expert: bool = False

    def __post_init__(self) -> None:
        if not self.per_expert:
            return
        if self.scale is None or self.scale.dim() != 2:
            found = "no scale" if self.scale is None else f"a scale {tuple(self.scale.shape)}"
            raise FormatError(f"{self.format}: per_expert needs static scales [E, 1] or [E, K], not {found}")
        if self.zero is not None and (self.zero.dim() != 2 or self.zero.shape[0] != self.scale.shape[0]):
            raise FormatError(
                f"{self.format}: per_expert zero points are {tuple(self.zero.shape)}, scales {tuple(self.scale.shape)}"
            )

    @property
    def static(self) -> bool:
        """Whether the scale is given rather than computed from the data."""
        return self.scale is not None

    @property
    def clipped(self) -> bool:
        """Whether a part of the range is cut off."""
        return self.clip != (1.0, 1.0)

    def equal(self, other: Operand | None) -> bool:
        """Same format, scale, zero, clip and meaning of the scale's rows."""
        mine = (self.format, self.clip, self.per_expert)
        if other is None or mine != (other.format, other.clip, other.per_expert):
            return False
        return all(
            (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
            for a, b in ((self.scale, other.scale), (self.zero, other.zero))
        )

    def expert(self, e: int) -> Operand:
        """What expert `e` uses."""
        if not self.per_expert or self.scale is None:
            return self
        return replace(self, scale=self.scale[e], zero=None if self.zero is None else self.zero[e], per_expert=False)

    def experts(self, first: int, count: int) -> Operand:
        """What experts first:first+count use."""
        if not self.per_expert or self.scale is None:
            return self
        rows = slice(first, first + count)
        return replace(self, scale=self.scale[rows], zero=None if self.zero is None else self.zero[rows])

    @staticmethod
    def stack(parts: Sequence[Operand], name: str) -> Operand:
        """The operand of experts that share a product: dynamic ones must be equal, static ones get a row each.

        Static scales are stacked even if they are equal, so that new values of one expert always fit the old tensors.
        """
        first = parts[0]
        if any((p.format, p.clip, p.static) != (first.format, first.clip, first.static) for p in parts):
            found = sorted({f"{p.format}{' static' if p.static else ''} clip={p.clip}" for p in parts})
            raise ShardError(f"{name}: experts that share a product quantize alike, not as {'; '.join(found)}")
        if first.scale is None:
            return first
        scale = _stacked([p.scale for p in parts], f"{name}: static scales of {first.format}")
        zero = _stacked([p.zero for p in parts], f"{name}: static zero points of {first.format}")
        return replace(first, scale=scale, zero=zero, per_expert=True)


def check_inputs(request: GemmRequest | GroupedRequest, inputs: Sequence[Operand]) -> None:
    """FormatError if the inputs given to `prepare` are not what the request says: formats, static scales, clips.

    No inputs fit every request: x will arrive quantized. A request with `clip` takes inputs without one too.
    """
    gemm = request if isinstance(request, GemmRequest) else request.gemm
    if not inputs:
        return
    formats = tuple(o.format for o in inputs)
    if formats != gemm.x:
        raise FormatError(f"inputs are {[str(f) for f in formats]}, the request says {[str(f) for f in gemm.x]}")
    static, asked = tuple(o.static for o in inputs), gemm.static or (False,) * len(inputs)
    if static != asked:
        raise FormatError(f"inputs have static scales {static}, the request says static={asked}")
    if any(o.clipped for o in inputs) and not gemm.clip:
        raise FormatError(f"inputs have clips {[o.clip for o in inputs]}, the request says clip=False")
    experts = request.experts if isinstance(request, GroupedRequest) else 0
    for o in inputs:
        check_experts(o, experts)


def check_experts(o: Operand, experts: int) -> None:
    """FormatError if an operand with a scale for each expert does not have so many; 0 experts: a plain product."""
    if o.per_expert and o.scale is not None and o.scale.shape[0] != experts:
        asked = f"the request has {experts}" if experts else "the product has no experts"
        raise FormatError(f"{o.format}: static scales of {o.scale.shape[0]} experts, {asked}")


def _stacked(values: Sequence[Tensor | None], what: str) -> Tensor | None:
    """[E, 1] or [E, K] of one flat tensor per expert; None if no expert has one."""
    given = [v.reshape(-1) for v in values if v is not None]
    if not given:
        return None
    if len(given) != len(values) or len({(v.shape, v.dtype) for v in given}) > 1:
        found = sorted({"none" if v is None else f"{v.dtype} {tuple(v.shape)}" for v in values})
        raise ShardError(f"{what} cannot be stacked: {', '.join(found)}")
    return torch.stack(given)


def same_operand(a: Operand | None, b: Operand | None) -> bool:
    """Whether both are absent, or equal."""
    return a is b or (a is not None and a.equal(b))


def cut_operand(o: Operand | None, size: int, start: int, stop: int) -> Operand | None:
    """Static per-feature scales of a row-parallel input follow their features."""
    if o is None or o.scale is None or o.scale.shape[-1:] != (size,) or size == 1:
        return o
    zero = o.zero if o.zero is None or o.zero.shape[-1:] != (size,) else o.zero[..., start:stop]
    return replace(o, scale=o.scale[..., start:stop], zero=zero)


def cut_heads(o: Operand, rank: int, world: int, name: str) -> Operand:
    """Static values of a cache or of Q, [heads] or [heads * dim] in the order of heads: those of this rank's heads."""

    def cut(value: Tensor | None) -> Tensor | None:
        if value is None or value.numel() == 1 or o.format.block is None or o.format.block.kind not in ("head", "col"):
            return value
        start, stop = bounds(value.numel(), rank, world, f"{name}: static values of {o.format}")
        return value.flatten()[start:stop]

    return replace(o, scale=cut(o.scale), zero=cut(o.zero))


def cut_weight_operand(
    o: Operand | None, shape: tuple[int, int], dim: int, start: int, stop: int, name: str
) -> Operand | None:
    """Static scales of what the weight is rounded to follow its rows or columns, block by block."""
    if o is None or o.scale is None or o.scale.numel() == 1 or o.format.block is None:
        return o
    if o.per_expert and o.scale.shape[1] == 1:
        return o  # one value per expert
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
