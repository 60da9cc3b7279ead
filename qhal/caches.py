"""Paged key-value caches: every plane that must move together, with dtype, shape and stride.

Canonical layout: codes [L, S, G, D] (L pages of S slots, G key-value heads), packed two codes to a byte (even one low)
below 8 bits; computed scales [L, S, G] (`row`) or [L, S, G, D/k] (`g<k>`). MLA: latent [L, S, R] and rope [L, S, P],
each with its own planes and no head axis. Static scales (`tensor`, `head`, `col`) are planes that are not paged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from qhal.elements import element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.requests import KVRequest


@dataclass(frozen=True)
class Plane:
    """One tensor of a cache: "k.codes", "k.scale", "v.scale.scale", "latent.codes", "rope.codes", "q.scale".

    shape   paged planes have the pages first, written -1: offload and transfer index axis 0 of each
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    paged: bool

    def shaped(self, pages: int) -> tuple[int, ...]:
        """The shape of this plane in a cache of `pages` pages."""
        return (pages, *self.shape[1:]) if self.paged else self.shape

    def stride(self) -> tuple[int, ...]:
        """Strides in elements of the canonical, contiguous plane."""
        return tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    def nbytes(self, pages: int) -> int:
        """Bytes of this plane in a cache of `pages` pages."""
        return prod(self.shaped(pages)) * self.dtype.itemsize


def canonical_planes(request: KVRequest) -> tuple[Plane, ...]:
    """Every plane of a canonical cache, codes first; FormatError for formats whose dynamic blocks span tokens."""
    parts: tuple[tuple[str, Format, tuple[int, ...]], ...]
    if request.kind == "mla":
        parts = (("latent", request.k, (request.k_dim,)), ("rope", request.v, (request.v_dim,)))
    else:
        parts = (
            ("k", request.k, (request.heads, request.k_dim)),
            ("v", request.v, (request.heads, request.v_dim)),
        )
    return tuple(p for name, fmt, axes in parts for p in _planes(name, fmt, axes, request.page))


def _planes(name: str, fmt: Format, axes: tuple[int, ...], page: int) -> list[Plane]:
    e = element(fmt.element)
    heads, dim = axes[:-1], axes[-1]
    packed = dim if e.bits >= 8 else -(-dim * e.bits // 8)
    if e.bits < 8 and e.bits != 4:
        raise FormatError(f"{name}={fmt}: caches hold 4-, 8- or 16-bit elements, not {e.bits} bits")
    found = [Plane(f"{name}.codes", torch.uint8 if e.bits < 8 else e.storage, (-1, page, *heads, packed), True)]
    for part in ("scale", "zero", "offset"):
        plane = getattr(fmt, part)
        if plane is None:
            continue
        assert fmt.block is not None
        kind = fmt.block.kind
        if kind in ("row", "group"):
            grid = () if kind == "row" else (-(-dim // fmt.block.cols),)
            paged, shape = True, (-1, page, *heads, *grid)
        elif kind in ("tensor", "head", "col"):
            paged, shape = False, {"tensor": (1,), "head": heads or (1,), "col": axes}[kind]
        else:
            raise FormatError(f"{name}={fmt}: {fmt.block} blocks span tokens; use row, g<k>, head, col or tensor")
        if plane.plain:
            found.append(Plane(f"{name}.{part}", element(plane.element).storage, shape, paged))
            continue
        if plane.block is None or plane.block.kind != "tensor" or plane.scale is None or not plane.scale.plain:
            raise FormatError(f"{name}={fmt}: a two-level scale of a cache needs one static outer value (`.tensor`)")
        found.append(Plane(f"{name}.{part}.codes", element(plane.element).storage, shape, paged))
        found.append(Plane(f"{name}.{part}.scale", element(plane.scale.element).storage, (1,), False))
    return found


@dataclass(frozen=True, eq=False)
class KVCache:
    """Everything of a cache that must move together.

    planes  by name; any strides on canonical shapes, other shapes only under a private layout
    host    static per-tensor scales as numbers, by plane name: some kernels take floats, and reading back syncs
    """

    request: KVRequest
    planes: dict[str, Tensor]
    layout: str = "canonical"
    host: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def allocate(
        request: KVRequest,
        pages: int,
        device: torch.device | str,
        *,
        planes: Sequence[Plane] | None = None,
        layout: str = "canonical",
    ) -> KVCache:
        """A cache of `pages` zeroed pages; static scales are 1. Pass what `QuantOps.kv_planes` returned."""
        tensors: dict[str, Tensor] = {}
        host: dict[str, float] = {}
        for p in canonical_planes(request) if planes is None else planes:
            if p.paged:
                tensors[p.name] = torch.zeros(p.shaped(pages), dtype=p.dtype, device=device)
            else:
                value = 0 if p.name.endswith(".zero") else 1
                tensors[p.name] = torch.full(p.shape, value, device=device, dtype=torch.float32).to(p.dtype)
                if p.shape == (1,):
                    host[p.name] = float(value)
        return KVCache(request, tensors, layout, host)

    def set_static(self, name: str, value: Tensor) -> None:
        """Write a static scale (or zero point) and its host copy."""
        plane = self.planes.get(name)
        if plane is None or value.numel() != plane.numel():
            known = ", ".join(f"{n} {tuple(t.shape)}" for n, t in self.planes.items())
            raise FormatError(f"no static plane {name!r} of {value.numel()} values; planes: {known}")
        plane.copy_(value.reshape(plane.shape))
        if plane.numel() == 1:
            self.host[name] = float(plane.float().item())

    @property
    def pages(self) -> int:
        """Number of pages L."""
        name = "latent.codes" if self.request.kind == "mla" else "k.codes"
        return self.planes[name].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(t.numel() * t.element_size() for t in self.planes.values())


@dataclass(frozen=True)
class Limits:
    """What a batch may grow to: sequences (exact when a graph is captured), query tokens, pages of one sequence."""

    batch: int
    tokens: int
    pages: int


class AttentionBatch(ABC):
    """The lengths and pages of one step, planned once and shared by all layers of a kind.

    One per AttentionRequest and, for graphs, per captured batch size. Owns its device buffers and workspace; their
    addresses are fixed.
    """

    @abstractmethod
    def plan(
        self, query_lens: Tensor, kv_lens: Tensor, page_table: Tensor, *, kv_lens_device: Tensor | None = None
    ) -> None:
        """Once per step, on the host, never inside capture.

        query_lens, kv_lens  int32 [B] on the host; with kv_lens_device (int32 [B]) the host values are upper bounds
        page_table           int32 [B, pages] on the device; entries past a length are not read

        No sync. Afterwards every graph captured with this batch replays correctly. kv_len 0 gives zeros and lse -inf.
        Past the limits: BatchError.
        """
