"""quant_kv: rows of keys and values into a paged cache; and how such a cache is read back.

Rows [T, G, D] are quantized by `qhal.encoding`: `row` and `g<k>` scales are computed per (token, head); `tensor`,
`head` and `col` scales are the cache's static planes. `col` sees the row of one token as [1, G * D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qhal.caches import KVCache, canonical_planes
from qhal.elements import WIDE, decode, element
from qhal.encoding import encode
from qhal.errors import BatchError, FormatError
from qhal.formats import Format
from qhal.tensors import QTensor

STATIC = ("tensor", "head", "col")
RowOf = tuple[str, Format, tuple[int, ...]]


def _write(plane: Tensor, where: Tensor, values: Tensor) -> None:
    page = plane.shape[1]
    plane[where // page, where % page] = values


def quant_kv(
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    slots: Tensor,
    *,
    write: Callable[[Tensor, Tensor, Tensor], None] = _write,
) -> None:
    """Everything is checked and quantized before the first slot is written.

    write  puts values [t, ...] at slots int64 [t] of a plane [pages, page, ...]; one-byte types come as bytes
    """
    first, second = check_rows(k, v, cache, slots)
    check_slots(cache, slots)
    keep = slots >= 0
    where = slots[keep].long()
    planes = {**_encode(cache, *first, k[keep]), **_encode(cache, *second, v[keep])}
    for name, values in planes.items():
        plane = _bytes(cache.planes[name])
        write(plane, where, _bytes(values).reshape(where.numel(), *plane.shape[2:]))


def check_rows(k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> tuple[RowOf, RowOf]:
    """The two rows of the cache; FormatError unless k, v and slots have their shapes and types. Reads no value."""
    first, second = rows_of(cache)
    check_planes(cache)
    check_tokens(k, v, slots, first, second)
    return first, second


def check_tokens(k: Tensor, v: Tensor, slots: Tensor, first: RowOf, second: RowOf) -> None:
    """FormatError unless k, v and slots have the shapes and types of the rows. Reads no value."""
    tokens = slots.numel() if isinstance(slots, Tensor) else -1
    for name, x, axes in ((first[0], k, first[2]), (second[0], v, second[2])):
        if x.dtype not in WIDE.values() or tuple(x.shape) != (tokens, *axes):
            found = f"{x.dtype} {tuple(x.shape)}"
            raise FormatError(f"quant_kv: {name} is {found}, must be bf16, fp16 or fp32 {(tokens, *axes)}")
    if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64):
        raise FormatError(f"quant_kv: slots are {slots.dtype} {tuple(slots.shape)}, must be int32 or int64 [T]")


def check_slots(cache: KVCache, slots: Tensor) -> None:
    """BatchError for slots that the cache does not have. Reads the values."""
    limit = cache.pages * cache.request.page
    if slots.numel() and (int(slots.min()) < -1 or int(slots.max()) >= limit):
        raise BatchError(f"quant_kv: slots reach from {slots.min()} to {slots.max()}; the cache has 0 to {limit - 1}")


def rows_of(cache: KVCache) -> tuple[RowOf, RowOf]:
    """(plane prefix, format, axes of one token) of the two rows; FormatError for a private layout."""
    if cache.layout != "canonical":
        raise FormatError(f"the cache has layout {cache.layout!r}; this backend reads and writes canonical caches")
    r = cache.request
    if r.kind == "mla":
        return ("latent", r.k, (r.k_dim,)), ("rope", r.v, (r.v_dim,))
    return ("k", r.k, (r.heads, r.k_dim)), ("v", r.v, (r.heads, r.v_dim))


def read(cache: KVCache, which: int, pages: Tensor, length: int) -> Tensor:
    """float32 [length, G, D] of the first `length` slots of these pages (MLA: G = 1); nothing else is looked at."""
    name, fmt, axes = rows_of(cache)[which]
    heads, dim = (1, *axes)[-2:]
    grid = _grid(fmt, heads, dim)

    def take(plane_name: str) -> Tensor:
        plane = cache.planes[plane_name]
        return _bytes(plane)[pages].flatten(0, 1)[:length].view(plane.dtype)

    codes = take(f"{name}.codes")
    codes = codes.reshape(length, heads, codes.shape[-1])
    if element(fmt.element).bits == 4:
        codes = _unpack(codes, fmt, dim)

    def plane_of(part: str, inner: Format | None) -> Tensor | QTensor | None:
        if inner is None:
            return None
        path = f"{name}.{part}" if inner.plain else f"{name}.{part}.codes"
        static = fmt.block is not None and fmt.block.kind in STATIC
        values = cache.planes[path].reshape(1, *grid) if static else take(path).reshape(length, *grid)
        return values if inner.plain else QTensor(inner, values, cache.planes[f"{name}.{part}.scale"].reshape(1, 1, 1))

    viewed = codes.reshape(length, *_view(fmt, heads, dim))
    scale, zero, offset = (plane_of(p, getattr(fmt, p)) for p in ("scale", "zero", "offset"))
    return QTensor(fmt, viewed, scale, zero, offset).dequantize().reshape(length, heads, dim)


def _encode(cache: KVCache, name: str, fmt: Format, axes: tuple[int, ...], x: Tensor) -> dict[str, Tensor]:
    """The paged planes of these tokens, by name, one row per token."""
    heads, dim = (1, *axes)[-2:]
    rows = x.reshape(x.shape[0], *_view(fmt, heads, dim))
    static = fmt.block is not None and fmt.block.kind in STATIC
    scale = _numbers(cache, f"{name}.scale", fmt.scale) if static and fmt.scale is not None else None
    zero = _numbers(cache, f"{name}.zero", fmt.zero) if static and fmt.zero is not None else None
    if fmt.scale is not None and not fmt.scale.plain:  # a two-level scale: the outer value is static
        scale = _numbers(cache, f"{name}.scale.scale", fmt.scale.scale)
    if not static:
        rows = rows.flatten(0, 1)  # one matrix of (token, head) rows
    q = encode(rows, fmt, scale=scale, zero=zero)
    codes = q.codes.reshape(x.shape[0], heads, dim)
    found = {f"{name}.codes": _pack(codes) if element(fmt.element).bits == 4 else codes}
    if static:
        return found
    for part in ("scale", "zero", "offset"):
        plane = getattr(q, part)
        if isinstance(plane, QTensor):
            found[f"{name}.{part}.codes"] = plane.codes
        elif plane is not None:
            found[f"{name}.{part}"] = plane.to(cache.planes[f"{name}.{part}"].dtype)
    return found


def _numbers(cache: KVCache, name: str, fmt: Format | None) -> Tensor:
    """The numbers of a static plane: `encode` takes numbers, not codes."""
    assert fmt is not None
    return decode(fmt.element, cache.planes[name])


def check_planes(cache: KVCache) -> None:
    """FormatError unless the cache has the canonical planes of its request, of any strides."""
    for p in canonical_planes(cache.request):
        plane, shape = cache.planes.get(p.name), p.shaped(cache.pages)
        if plane is None or plane.dtype != p.dtype or tuple(plane.shape) != shape:
            found = "no such plane" if plane is None else f"{plane.dtype} {tuple(plane.shape)}"
            raise FormatError(f"the cache's {p.name} must be {p.dtype} {shape}, found {found}")


def _view(fmt: Format, heads: int, dim: int) -> tuple[int, int]:
    """The [N, K] that one token's row is to its format."""
    return (1, heads * dim) if fmt.block is not None and fmt.block.kind == "col" else (heads, dim)


def _grid(fmt: Format, heads: int, dim: int) -> tuple[int, int]:
    return (1, 1) if fmt.block is None else fmt.block.grid(*_view(fmt, heads, dim))


def _bytes(plane: Tensor) -> Tensor:
    """One-byte types as bytes: float8 has no indexed copies."""
    return plane.view(torch.uint8) if plane.element_size() == 1 else plane


def _pack(codes: Tensor) -> Tensor:
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    low, high = codes[..., 0::2].to(torch.uint8) & 15, codes[..., 1::2].to(torch.uint8) & 15
    return low | (high << 4)


def _unpack(packed: Tensor, fmt: Format, dim: int) -> Tensor:
    four = packed.new_full((), 4)  # some devices shift right by tensors only
    codes = torch.stack([packed & 15, packed >> four], -1).flatten(-2)[..., :dim]
    return (codes ^ 8).to(torch.int8) - 8 if element(fmt.element).kind == "int" else codes
