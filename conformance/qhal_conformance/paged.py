"""A paged cache with known contents: which tokens lie where, what their codes must be, what they are worth.

Pages of a sequence are scattered. Slots past a length and pages that no sequence owns are poisoned, so that a kernel
that reads them answers NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qhal.caches import KVCache
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import AttentionRequest, KVRequest
from qhal.tensors import QTensor
from qhal_conformance import elements, encode
from qhal_conformance.decode import decode, to_numpy
from qhal_conformance.generator import F32, I64, Stream

STATIC_SCALE = 0.0390625
"""5 / 128: what static caches of the suite are scaled with; no power of two, so dropping it shows."""
_SHARE = {"v": 1.25, "rope": 0.75}
"""The second of the two rows has another scale than the first, so exchanging them shows."""


def static_scale(name: str) -> float:
    """The static scale of the rows "k", "v", "latent" or "rope"."""
    return STATIC_SCALE * _SHARE.get(name, 1.0)


def names(request: KVRequest) -> tuple[str, str]:
    """What the two rows of a cache are called in its planes."""
    return ("latent", "rope") if request.kind == "mla" else ("k", "v")


@dataclass(frozen=True)
class Rows:
    """One of the two rows of some tokens, [T, G, D], as numbers, and what a cache must hold of them. MLA: G = 1."""

    x: F32
    q: QTensor
    value: F32


def rows(case_id: str, name: str, f: Format, shape: tuple[int, int, int], kind: str, data: str = "normal") -> Rows:
    """Random rows that `kind` holds exactly, quantized by the suite's own rule."""
    g = Stream(case_id, name)
    x = g.normal(shape)
    if data == "positive":
        x = np.abs(x) + np.float32(0.25)
    if data == "limits":
        reach = 8 if kind == "fp16" or (f.scale is not None and f.scale.element == "fp16") else 60
        x = np.ldexp(x, g.integers(-reach, reach + 1, (shape[0], shape[1], 1)).astype(np.int32))
        x[::5] = 0
    x = elements.round_wide(kind, x)
    flat = x.reshape(-1, shape[-1])
    static = np.array([static_scale(name)], np.float32) if is_static(f) else None
    q = encode.quantize(flat, f, scale=static)
    return Rows(x, q, decode(q).value.reshape(shape))


def given(r: Rows, request: KVRequest, dtype: torch.dtype) -> torch.Tensor:
    """The rows as `quant_kv` takes them: [T, G, D], and without the axis of heads for MLA."""
    x = torch.from_numpy(r.x).to(dtype)
    return x[:, 0] if request.kind == "mla" else x


def is_static(f: Format) -> bool:
    """Whether the cache keeps one scale for all tokens."""
    return f.block is not None and f.block.kind == "tensor"


@dataclass(frozen=True)
class Pages:
    """Where sequences live: page_table [B, pages] and the slots of every token, sequence after sequence.

    spare  pages that nobody owns; the table's unused entries point there
    """

    lens: tuple[int, ...]
    page: int
    count: int
    table: npt.NDArray[np.int32]
    slots: I64
    spare: I64


def scatter(case_id: str, lens: tuple[int, ...], page: int, *, width: int = 0) -> Pages:
    """Pages for sequences of these lengths, in random order, with three spare pages."""
    need = [-(-n // page) for n in lens]
    count = sum(need) + 3
    order = Stream(case_id, "pages").permutation(count)
    owned, spare = order[: sum(need)], order[sum(need) :]
    table = np.full((len(lens), max(*need, width, 1)), spare[0], dtype=np.int32)
    slots = []
    at = 0
    for b, n in enumerate(lens):
        mine = owned[at : at + need[b]]
        at += need[b]
        table[b, : need[b]] = mine
        token = np.arange(n)
        slots.append(mine[token // page] * page + token % page if n else np.zeros(0, np.int64))
    return Pages(lens, page, count, table, np.concatenate(slots).astype(np.int64), spare)


def allocate(ops: QuantOps, request: KVRequest, pages: int, attention: tuple[AttentionRequest, ...] = ()) -> KVCache:
    """A cache in the backend's own layout, static scales set."""
    layout, planes = ops.kv_planes(request, attention=attention)
    cache = KVCache.allocate(request, pages, ops.device, planes=planes, layout=layout)
    for name, f in zip(names(request), (request.k, request.v), strict=True):
        if is_static(f):
            cache.set_static(f"{name}.scale", torch.tensor([static_scale(name)], device=ops.device))
    return cache


def poison(cache: KVCache, pages: I64) -> None:
    """NaN (or extreme codes) in every paged plane of these pages."""
    bad = {p.name: p for p in _paged(cache)}
    for name in bad:
        plane = cache.planes[name]
        for page in pages.tolist():
            if plane.element_size() == 1:
                plane[page].view(torch.uint8).fill_(0x7F)
            elif plane.is_floating_point():
                plane[page].fill_(float("nan"))


@dataclass(frozen=True)
class _Named:
    name: str


def _paged(cache: KVCache) -> list[_Named]:
    return [_Named(n) for n, t in cache.planes.items() if t.dim() > 1 and t.shape[0] == cache.pages]


def expected_planes(name: str, f: Format, r: Rows) -> dict[str, npt.NDArray[np.generic]]:
    """What the canonical paged planes must hold for these rows, one entry per token."""
    tokens, heads, dim = r.x.shape
    codes = to_numpy(r.q.codes).astype(np.uint8 if r.q.codes.element_size() == 1 else to_numpy(r.q.codes).dtype)
    codes = codes.reshape(tokens, heads, dim)
    if f.element in ("int4", "uint4", "e2m1"):
        low, high = codes[..., 0::2] & 15, codes[..., 1::2] & 15
        codes = np.asarray(low | (high << 4), dtype=np.uint8)
    found: dict[str, npt.NDArray[np.generic]] = {f"{name}.codes": codes}
    if r.q.scale is not None and not is_static(f):
        assert isinstance(r.q.scale, torch.Tensor)
        scale = to_numpy(r.q.scale).reshape(tokens, heads, r.q.scale.shape[-1])
        found[f"{name}.scale"] = scale[..., 0] if f.block is not None and f.block.kind == "row" else scale
    return found
