"""The planes of a cache as kernels take them: bytes, and strides of page, slot and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.errors import FormatError
from qhal_triton.kv.rows import Row

T = TypeVar("T")


class Plane(NamedTuple):
    """A plane and its strides in elements; 0 along an axis that it does not have."""

    data: Tensor
    page: int = 0
    slot: int = 0
    head: int = 0

    @staticmethod
    def of(cache: KVCache, name: str, kind: str = "") -> Plane:
        """kind: the blocks whose numbers it holds; "" for codes. FormatError where the last axis is not contiguous."""
        plane = cache.planes[name]
        mla = cache.request.kind == "mla"
        if kind == "tensor" or (kind == "head" and mla):
            return Plane(_bytes(plane))
        within = 0 if kind in ("row", "head") else 1  # axes inside of a row
        if within and plane.shape[-1] > 1 and plane.stride(-1) != 1:
            raise FormatError(f"the cache's {name} has stride {plane.stride(-1)} inside of a row; kernels need 1")
        strides = plane.stride()[: plane.dim() - within]
        head = 0 if mla else strides[-1]
        if kind in ("head", "col"):
            return Plane(_bytes(plane), 0, 0, head)
        return Plane(_bytes(plane), strides[0], strides[1], head)


_MOST = 64
"""Readers that a cache remembers; they start anew beyond."""


class _Kept(dict[int, tuple[object, tuple[object, ...], tuple[Tensor, ...], Any]]):
    """By a reader's identity. Copies of a cache start without: what is kept holds addresses."""

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def remembered(cache: KVCache, reader: object, read: Callable[[], T]) -> T:
    """What `read` finds in the planes of a cache, for one reader, which is told by its identity.

    It is asked again when a plane has become another tensor.
    """
    kept = vars(cache).get("_remembered")
    if kept is None:
        kept = vars(cache)["_remembered"] = _Kept()
    planes = cache.planes
    now = (*planes, *map(id, planes.values()))  # numbers that stay taken: readers and tensors are kept
    found = kept.get(id(reader))
    if found is None or found[0] is not reader or found[1] != now:
        if len(kept) >= _MOST:
            kept.clear()
        found = kept[id(reader)] = reader, now, tuple(planes.values()), read()
    result: T = found[3]
    return result


class RowPlanes(NamedTuple):
    """The planes of K or of V (MLA: latent, rope); absent ones are the codes, which then nobody reads."""

    codes: Plane
    scale: Plane
    zero: Plane
    outer: Tensor

    @staticmethod
    def of(cache: KVCache, name: str, row: Row) -> RowPlanes:
        """The planes that `row` says the cache has."""
        codes = Plane.of(cache, f"{name}.codes")
        none = Plane(codes.data)
        scale = (
            Plane.of(cache, f"{name}.scale.codes" if row.outer else f"{name}.scale", row.kind) if row.scale else none
        )
        zero = Plane.of(cache, f"{name}.zero", row.kind) if row.zero else none
        outer = cache.planes[f"{name}.scale.scale"] if row.outer else codes.data
        return RowPlanes(codes, scale, zero, outer)

    def in_words(self) -> RowPlanes:
        """Codes of eight bits as words of two, where every row begins at a multiple of 32 bytes; else as they are."""
        data, *strides = self.codes
        if data.data_ptr() % 16 or any(n % 32 for n in strides):
            return self
        return self._replace(codes=Plane(data.view(torch.int16), *(n // 2 for n in strides)))

    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales, zero points, the numbers above scales."""
        return self.codes.data, self.scale.data, self.zero.data, self.outer

    def strides(self) -> tuple[int, ...]:
        """Of the first three, each of page, slot and head."""
        return tuple(step for plane in (self.codes, self.scale, self.zero) for step in plane[1:])


def _bytes(plane: Tensor) -> Tensor:
    """One-byte types as bytes: kernels decode them themselves."""
    return plane.view(torch.uint8) if plane.element_size() == 1 else plane
