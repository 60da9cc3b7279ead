"""Paged key-value caches: every plane that must move together, with dtype, shape and stride.

Canonical layout: codes [L, S, G, D] (L pages of S slots, G key-value heads), packed two codes to a byte (even one low)
below 8 bits; computed scales [L, S, G] (`row`) or [L, S, G, D/k] (`g<k>`). MLA: latent [L, S, R] and rope [L, S, P],
each with its own planes and no head axis. Static scales (`tensor`, `head`, `col`), those of Q and P too, are planes
that are not paged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from qhal.elements import Element, decode, element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.requests import AttentionRequest, KVRequest
from qhal.rounding import to_plane


@dataclass(frozen=True)
class Plane:
    """One tensor of a cache: "k.codes", "k.scale", "v.scale.scale", "latent.codes", "rope.codes", "q.scale", "p.scale".

    shape    paged planes have the pages first, written -1: offload and transfer index axis 0 of each
    initial  what a static plane starts with; None: 1 for scales, 0 for zero points and offsets
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    paged: bool
    initial: float | None = None

    def shaped(self, pages: int) -> tuple[int, ...]:
        """The shape of this plane in a cache of `pages` pages."""
        return (pages, *self.shape[1:]) if self.paged else self.shape

    def stride(self) -> tuple[int, ...]:
        """Strides in elements of the canonical, contiguous plane."""
        return tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    def nbytes(self, pages: int) -> int:
        """Bytes of this plane in a cache of `pages` pages."""
        return prod(self.shaped(pages)) * self.dtype.itemsize


def canonical_planes(request: KVRequest, attention: Sequence[AttentionRequest] = ()) -> tuple[Plane, ...]:
    """Every plane of a canonical cache, codes first, then the static planes that these attentions read.

    FormatError for formats whose dynamic blocks span tokens, and for attentions that need different planes of one name.
    """
    parts: tuple[tuple[str, Format, tuple[int, ...]], ...]
    if request.kind == "mla":
        parts = (("latent", request.k, (request.k_dim,)), ("rope", request.v, (request.v_dim,)))
    else:
        parts = (
            ("k", request.k, (request.heads, request.k_dim)),
            ("v", request.v, (request.heads, request.v_dim)),
        )
    planes = [p for name, fmt, axes in parts for p in _planes(name, fmt, axes, request.page)]
    for reader in attention:
        for plane in (*_q_planes(reader), *_p_planes(reader.p)):
            if plane not in planes and any(p.name == plane.name for p in planes):
                raise FormatError(f"{plane.name}: these attentions hold {plane.name[0]} in formats of different planes")
            planes += [] if plane in planes else [plane]
    return tuple(planes)


def _q_planes(request: AttentionRequest) -> list[Plane]:
    """The static planes of Q: scale and zero point of `tensor` or `head` blocks, the outer level of a nested scale."""
    fmt, heads = request.q, request.heads
    if fmt.block is None or fmt.scale is None:
        return []
    if fmt.block.kind in ("row", "group"):
        if fmt.scale.plain:
            return []
        outer = fmt.scale.scale
        if fmt.scale.block is None or fmt.scale.block.kind != "tensor" or outer is None or not _wide(outer):
            raise FormatError(f"q={fmt}: a two-level scale of Q needs one static outer float (`.tensor*fp32`)")
        return [Plane("q.scale.scale", element(outer.element).storage, (1,), False)]
    if fmt.block.kind not in ("tensor", "head"):
        raise FormatError(f"q={fmt}: {fmt.block} blocks span tokens; use row, g<k>, head or tensor")
    if not _wide(fmt.scale) or fmt.offset is not None or (fmt.zero is not None and not fmt.zero.plain):
        raise FormatError(f"q={fmt}: a static scale of Q is fp32, fp16 or bf16, its zero point plain, without offset")
    shape = (1,) if fmt.block.kind == "tensor" else (heads,)
    return [
        Plane(f"q.{part}", element(plane.element).storage, shape, False)
        for part, plane in (("scale", fmt.scale), ("zero", fmt.zero))
        if plane is not None
    ]


def _p_planes(fmt: Format) -> list[Plane]:
    """The static scale of P; it starts at 1 / largest code, so that P = 1 is the largest code."""
    if fmt.plain:
        return []
    one = fmt.block is not None and fmt.block.kind == "tensor" and fmt.scale is not None and _wide(fmt.scale)
    if not one or fmt.zero is not None or fmt.offset is not None or fmt.scale is None or fmt.qmax <= 0:
        raise FormatError(f"p={fmt}: P is a plain float, or has one static float scale (int8.tensor*fp32)")
    start = 1 / fmt.qmax if fmt.op == "*" else fmt.qmax
    return [Plane("p.scale", element(fmt.scale.element).storage, (1,), False, start)]


def _wide(fmt: Format) -> bool:
    return fmt.plain and element(fmt.element).wide


def _planes(name: str, fmt: Format, axes: tuple[int, ...], page: int) -> list[Plane]:
    e = element(fmt.element)
    heads, dim = axes[:-1], axes[-1]
    packed = dim if e.bits >= 8 else -(-dim * e.bits // 8)
    if e.bits < 8 and e.bits != 4:
        raise FormatError(f"{name}={fmt}: caches hold 4-, 8- or 16-bit elements, not {e.bits} bits")
    if any(level.element in ("lut4", "lut8") for level in fmt.levels()):
        raise FormatError(f"{name}={fmt}: a cache has no plane for the table of a lut element")
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


def _part(request: KVRequest, name: str) -> tuple[Format, str] | None:
    """(format of the plane's numbers, kind of its blocks) of "k.scale", "v.scale.codes", ..."""
    prefixes = ("latent", "rope") if request.kind == "mla" else ("k", "v")
    row, _, rest = name.partition(".")
    part, _, level = rest.partition(".")
    if row not in prefixes or part not in ("scale", "zero", "offset"):
        return None
    fmt = request.k if row == prefixes[0] else request.v
    plane: Format | None = getattr(fmt, part)
    if plane is None or fmt.block is None or level not in ("", "codes", "scale"):
        return None
    if level == "scale":
        return None if plane.scale is None else (plane.scale, "tensor")
    return plane, fmt.block.kind


def _static_element(request: KVRequest, name: str, dtype: torch.dtype) -> Element | None:
    """The element type of a canonical plane of numbers; None for floats of Q and P, and for a private layout's."""
    found = _part(request, name)
    if found is None and name == "q.zero" and dtype in _INTEGERS:
        return element(_INTEGERS[dtype])
    return None if found is None else element(found[0].element)


def _is_paged(request: KVRequest, name: str) -> bool:
    found = _part(request, name)
    return name.endswith(".codes") if found is None else found[1] in ("row", "group")


_INTEGERS = {torch.int8: "int8", torch.uint8: "uint8"}


def _shift(name: str) -> bool:
    """Whether the plane is added or subtracted: it may be 0, and starts there."""
    return name.endswith((".zero", ".offset"))


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
        """A cache of `pages` zeroed pages; static scales are 1 (p.scale: 1 / largest code), zero points and offsets 0.

        planes  what `QuantOps.kv_planes` returned. FormatError for less than one page
        """
        if type(pages) is not int or pages < 1:
            raise FormatError(f"a cache has at least 1 page, not {pages!r}")
        tensors: dict[str, Tensor] = {}
        host: dict[str, float] = {}
        for p in canonical_planes(request) if planes is None else planes:
            if p.paged:
                tensors[p.name] = torch.zeros(p.shaped(pages), dtype=p.dtype, device=device)
            else:
                value = p.initial if p.initial is not None else 0.0 if _shift(p.name) else 1.0
                e = _static_element(request, p.name, p.dtype)
                number = torch.full(p.shape, value, device=device, dtype=torch.float32)
                tensors[p.name] = (number if e is None else to_plane(number, e)).to(p.dtype)
                if p.shape == (1,):  # the number that the plane holds: 1/448 has none in bf16
                    host[p.name] = float(torch.tensor(value, dtype=torch.float32).to(p.dtype)) if e is None else value
        return KVCache(request, tensors, layout, host)

    def set_static(self, name: str, value: Tensor) -> None:
        """Write a static scale (or zero point, or offset), numbers in the plane's order, and its host copy.

        FormatError for a paged plane, and for values that the plane cannot hold: scales are finite and not 0.
        """
        plane = self.planes.get(name)
        paged = plane is not None and name not in self.static
        if plane is None or paged or value.numel() != plane.numel():
            known = ", ".join(f"{n} {tuple(t.shape)}" for n, t in self.planes.items())
            why = "; its pages are written by quant_kv" if paged else ""
            raise FormatError(f"no static plane {name!r} of {value.numel()} values{why}; planes: {known}")
        number = value.detach().reshape(plane.shape).float()
        e = _static_element(self.request, name, plane.dtype)
        codes = (number if e is None else to_plane(number, e)).to(plane.dtype)
        held = codes.float() if e is None else decode(e.name, codes)
        if not bool((torch.isfinite(number) & torch.isfinite(held) & ((held != 0) | _shift(name))).all()):
            needed = "finite" if _shift(name) else "finite and not 0"
            raise FormatError(f"{name} = {number.flatten()[:4].tolist()} must be {needed} as {plane.dtype}")
        plane.copy_(codes)
        if plane.numel() == 1:
            self.host[name] = float(held.item())

    @property
    def static(self) -> frozenset[str]:
        """Names of the planes that are not paged: what `set_static` writes."""
        return frozenset(name for name in self.planes if name in self.host or not _is_paged(self.request, name))

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
        self,
        query_lens: Tensor,
        kv_lens: Tensor,
        page_table: Tensor,
        *,
        kv_lens_device: Tensor | None = None,
        tree: Tensor | None = None,
    ) -> None:
        """Once per step, on the host, never inside capture.

        query_lens, kv_lens  int32 [B] on the host; with kv_lens_device (int32 [B]) the host values are upper bounds
        page_table           int32 [B, pages] on the device; entries past a length are not read
        tree                 bool [sum of query_len^2] on the device, given if and only if request.tree: per sequence
                             [q, q] row-major, one sequence after the other. Entry (i, j): new token i sees new token j.
                             New tokens are the last q keys (bottom right); every earlier key is visible. A token sees
                             itself

        No sync. Afterwards every graph captured with this batch replays correctly. kv_len 0 gives zeros and lse -inf.
        Past the limits, or a tree of another length: BatchError; of a token that does not see itself, where the values
        are on the host.
        """
