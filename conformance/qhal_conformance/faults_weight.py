"""Planted faults in how a weight is read: scales, zero points, code order, code values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.codebooks import CodebookTensor
from qhal.prepared import Prepared
from qhal.tensors import QTensor
from qhal_conformance.wrapping import Weight, WeightRequest, Wrapped

Spoil = Callable[[QTensor], QTensor]


class _Spoiled(Wrapped):
    """Computes with a spoiled weight; restore still gives the right one, so only numbers can show it."""

    _spoil: Spoil

    def prepare(self, w: Weight, request: WeightRequest, **how: Any) -> Prepared:
        """Spoil, then hand over."""
        if not isinstance(w, QTensor) or w.format.plain:
            return self._inner.prepare(w, request, **how)
        spoiled = type(self)._spoil(w)
        made = self._inner.prepare(spoiled, request, **how)
        self._kept[made.handle] = w
        return made

    def restore(self, thing: Prepared | KVCache | QTensor) -> QTensor | CodebookTensor | Tensor | KVCache:
        """The weight as it was given."""
        if isinstance(thing, Prepared) and thing.handle in self._kept:
            return self._kept[thing.handle]
        return self._inner.restore(thing)

    @property
    def _kept(self) -> dict[int, QTensor]:
        kept: dict[int, QTensor] = self.__dict__.setdefault("_weights", {})
        return kept


def spoiled(spoil: Spoil) -> type[Wrapped]:
    """A backend class that reads weights through `spoil`."""
    return type("Spoiled", (_Spoiled,), {"_spoil": staticmethod(spoil)})


def _scale(change: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(w: QTensor) -> QTensor:
        return replace(w, scale=change(w.scale.clone()).contiguous()) if isinstance(w.scale, Tensor) else w

    return spoil


def _inner_scale(change: Callable[[QTensor], QTensor]) -> Spoil:
    def spoil(w: QTensor) -> QTensor:
        return replace(w, scale=change(w.scale)) if isinstance(w.scale, QTensor) else w

    return spoil


def _codes(change: Callable[[Tensor], Tensor], *, only: str = "") -> Spoil:
    """Change codes as bytes."""

    def spoil(w: QTensor) -> QTensor:
        if only and not w.format.element.startswith(only):
            return w
        raw = change(w.codes.view(torch.uint8).clone())
        return replace(w, codes=raw.contiguous().view(w.codes.dtype))

    return spoil


def _zero(change: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(w: QTensor) -> QTensor:
        if not isinstance(w.zero, Tensor):
            return w
        return replace(w, zero=change(w.zero.int()).clamp(0, 15).to(w.zero.dtype))

    return spoil


def _last_block(s: Tensor) -> Tensor:
    if s.shape[-1] > 1:
        s[..., -1] = s[..., -2]
    return s


def _last_row(s: Tensor) -> Tensor:
    if s.shape[-2] > 1:
        s[..., -1, :] = s[..., -2, :]
    return s


def _transposed(s: Tensor) -> Tensor:
    return s.mT.reshape(s.shape) if s.shape[-1] > 1 else s


def _wide_groups(s: Tensor) -> Tensor:
    index = torch.arange(s.shape[-1]) // 2
    return s[..., index]


def _swap_pairs(c: Tensor) -> Tensor:
    return c.reshape(*c.shape[:-1], -1, 2).flip(-1).reshape(c.shape)


def _swap_last_pair(c: Tensor) -> Tensor:
    c[..., -2:] = c[..., -2:].flip(-1)
    return c


def _table_off_by_one(c: Tensor) -> Tensor:
    return torch.where((c & 7) == 5, c + 1, c)  # 3 is read as 4


def _flush_subnormals(c: Tensor) -> Tensor:
    return torch.where((c & 0x78) == 0, c & 0x80, c)


def _clip_240(c: Tensor) -> Tensor:
    return torch.where((c & 0x7F) > 0x77, (c & 0x80) | 0x77, c)


def _rows_swapped(c: Tensor) -> Tensor:
    if c.shape[-2] > 8:
        c[..., [-1, -9], :] = c[..., [-9, -1], :]
    return c


def _one_code(c: Tensor) -> Tensor:
    c[..., -1, -1] = c[..., -1, -1] ^ 2
    return c


def _index_ignored(w: QTensor) -> QTensor:
    if w.group_index is None or w.format.block is None:
        return w
    plain = torch.arange(w.codes.shape[-1], dtype=torch.int32) // w.format.block.cols
    return replace(w, group_index=plain)


def _global_dropped(s: QTensor) -> QTensor:
    return replace(s, scale=torch.ones_like(s.scale)) if isinstance(s.scale, Tensor) else s


def _global_squared(s: QTensor) -> QTensor:
    return replace(s, scale=s.scale * s.scale) if isinstance(s.scale, Tensor) else s


def _block_scale_shifted(s: QTensor) -> QTensor:
    return replace(s, codes=s.codes.view(torch.uint8).roll(1, -1).contiguous().view(s.codes.dtype))


WEIGHT_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
    ("scale-last-block", "weight-int4", "the last group of a row uses the scale before it",
     spoiled(_scale(_last_block))),
    ("scale-row-plus-one", "core-int8", "row n uses the scale of row n + 1", spoiled(_scale(lambda s: s.roll(-1, -2)))),
    ("scale-row-minus-one", "core-int8", "row n uses the scale of row n - 1", spoiled(_scale(lambda s: s.roll(1, -2)))),
    ("scale-last-row", "core-fp8", "the last row uses the scale of the row before", spoiled(_scale(_last_row))),
    ("scale-transposed", "core-fp8", "the grid of block scales is read column by column", spoiled(_scale(_transposed))),
    ("scale-group-size", "weight-int4", "groups are taken twice as wide", spoiled(_scale(_wide_groups))),
    ("scale-bf16", "core-fp8", "fp32 scales are rounded to bf16",
     spoiled(_scale(lambda s: s.bfloat16().to(s.dtype) if s.dtype == torch.float32 else s))),
    ("scale-twice", "core-int8", "the scale is applied twice", spoiled(_scale(lambda s: s * s))),
    ("scale-dropped", "weight-int4", "the scale is not applied", spoiled(_scale(torch.ones_like))),
    ("scale-shifted", "weight-int4", "every group uses the next group's scale",
     spoiled(_scale(lambda s: s.roll(-1, -1)))),
    ("e8m0-up", "mx", "power-of-two scales with a bias of 126",
     spoiled(_scale(lambda s: s + 1 if s.dtype == torch.uint8 else s))),
    ("e8m0-row", "mx", "power-of-two scales of the row before", spoiled(_scale(lambda s: s.roll(1, -2)))),
    ("global-dropped", "nvfp4", "the second-level scale is not applied", spoiled(_inner_scale(_global_dropped))),
    ("global-squared", "nvfp4", "the second-level scale is applied twice", spoiled(_inner_scale(_global_squared))),
    ("block-scale-shifted", "nvfp4", "block scales of the block before", spoiled(_inner_scale(_block_scale_shifted))),
    ("nibble-swap", "weight-int4", "high and low nibble are exchanged", spoiled(_codes(_swap_pairs))),
    ("nibble-swap-last", "weight-int4", "the last pair of a row is exchanged", spoiled(_codes(_swap_last_pair))),
    ("zero-plus-one", "weight-int4", "zero points one too large", spoiled(_zero(lambda z: z + 1))),
    ("zero-minus-one", "weight-int4", "zero points one too small", spoiled(_zero(lambda z: z - 1))),
    ("zero-ignored", "weight-int4", "zero points are taken as 8", spoiled(_zero(lambda z: z * 0 + 8))),
    ("group-index-ignored", "weight-int4", "act-order groups are taken in order", spoiled(_index_ignored)),
    ("sign-lost", "core-int8", "negative codes are read as positive",
     spoiled(_codes(lambda c: c.view(torch.int8).abs().view(torch.uint8), only="int8"))),
    ("lowest-clamped", "core-int8", "-128 is read as -127",
     spoiled(_codes(lambda c: torch.where(c == 128, c + 1, c), only="int8"))),
    ("subnormals-flushed", "core-fp8", "subnormal codes are read as zero",
     spoiled(_codes(_flush_subnormals, only="e4m3"))),
    ("clip-240", "core-fp8", "codes above 240 are read as 240", spoiled(_codes(_clip_240, only="e4m3"))),
    ("fnuz", "core-fp8", "e4m3fn is read as e4m3fnuz", spoiled(_scale(lambda s: s * 0.5))),
    ("table-off", "mx", "one entry of the e2m1 table is its neighbour",
     spoiled(_codes(_table_off_by_one, only="e2m1"))),
    ("rows-swapped", "core-int8", "the last row and the one eight before are exchanged",
     spoiled(_codes(_rows_swapped))),
    ("one-code", "weight-int4", "one code of the whole weight is wrong", spoiled(_codes(_one_code))),
)  # fmt: skip
"""(name, profile, what is wrong, class)"""
