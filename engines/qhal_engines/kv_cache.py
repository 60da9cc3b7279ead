"""A transformers cache whose keys and values live in qhal's paged, quantized planes.

`update` stages the new keys and values; the attention function "qhal" (`kv_attention.py`), which knows the padding,
writes them with `ops.quant_kv` and attends with `ops.attention`. Nothing is ever kept in the model's dtype, and a model
that reaches for the keys in between is refused instead of getting other numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from qhal.caches import KVCache, Plane
from qhal.interface import QuantOps
from qhal.requests import AttentionRequest, KVRequest
from qhal.specs import KVSpec
from qhal_engines import EngineError
from qhal_engines.kv_pages import Batches, Sequences, Step


@dataclass(frozen=True, eq=False)
class LayerKV:
    """The cache of one attention module: what is stored, with which static scales, and what was planned over it."""

    name: str
    layer: int
    ops: QuantOps
    request: KVRequest
    spec: KVSpec
    planned: frozenset[AttentionRequest]


class Staged:
    """What `update` returns in place of keys and values: they are on their way into the cache of `layer`."""

    def __init__(self, layer: QhalLayer, k: Tensor, v: Tensor) -> None:
        self.layer, self.k, self.v = layer, k, v

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse(f".{name}")

    def __getitem__(self, index: object) -> NoReturn:
        self._refuse("[...]")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        cls._refuse(f"torch.{getattr(func, '__name__', func)}")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise EngineError(
            f"unsupported: the model uses {what} of keys or values behind its cache, where a quantized cache has none "
            "in a float type.\n  do: load the model without a cache format"
        )


class QhalLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one layer: a `KVCache` that grows by pages."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, kv: LayerKV, sequences: Sequences | None = None, batches: Batches | None = None) -> None:
        """Layers of one cache share the last two; a layer alone has its own."""
        super().__init__()
        self.kv = kv
        self.sequences = sequences or Sequences(kv.request.page, kv.ops.device)
        self.batches = batches or Batches(kv.ops)
        self.columns = 0
        self.cache: KVCache | None = None
        self._planes: tuple[str, tuple[Plane, ...]] | None = None
        self.staged = False  # between update and the attention function

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Staged, Staged]:
        """Stages k [B, G, T, D] and v [B, G, T, Dv]; `write` puts them into the cache."""
        r = self.kv.request
        found = [(t.shape[1], t.shape[3]) for t in (key_states, value_states)]
        if found != [(r.heads, r.k_dim), (r.heads, r.v_dim)]:
            raise EngineError(
                f"{self.kv.name}: keys and values of {found} (heads, features); the plan has {r.heads} heads of "
                f"{r.k_dim} and {r.v_dim}"
            )
        if self.staged:
            raise EngineError(
                f"unsupported: {self.kv.name}: the keys of the last step never reached the attention function 'qhal'; "
                "this model computes attention in its own way.\n  do: load it without a cache format"
            )
        self.staged = True
        staged = Staged(self, key_states, value_states)
        return staged, staged

    def write(self, staged: Staged, real: Tensor | None) -> tuple[Step, KVCache]:
        """quant_kv of what was staged. real: bool [B, columns], which columns of the whole mask are no padding."""
        k, v = staged.k, staged.v
        batch, heads, columns, _ = k.shape
        step = self.sequences.step(self.columns, batch, columns, real)
        cache = self._room(self.sequences.count)
        rows = [t.detach().transpose(1, 2).reshape(batch * columns, heads, t.shape[3]) for t in (k, v)]
        self.kv.ops.quant_kv(rows[0], rows[1], cache, step.slots)
        self.columns, self.is_initialized = self.columns + columns, True
        return step, cache

    def _room(self, pages: int) -> KVCache:
        """The cache with at least so many pages: it doubles, and pages move with every plane."""
        if self.cache is None or self.cache.pages < pages:
            ops, request = self.kv.ops, self.kv.request
            if self._planes is None:
                self._planes = ops.kv_planes(request, attention=tuple(self.kv.planned))
            layout, planes = self._planes
            size = max(pages, 2 * self.cache.pages if self.cache else 1)
            grown = KVCache.allocate(request, size, ops.device, planes=planes, layout=layout)
            fill_static(grown, self.kv.spec)
            if self.cache is not None:
                self._copy(self.cache, grown, torch.arange(self.cache.pages, device=ops.device))
            self.cache = grown
        return self.cache

    def select(self, pages: Tensor) -> None:
        """New page i becomes a copy of old page pages[i]."""
        if self.cache is not None and self._planes is not None:
            layout, planes = self._planes
            size = max(1, pages.numel())
            moved = KVCache.allocate(self.kv.request, size, self.kv.ops.device, planes=planes, layout=layout)
            fill_static(moved, self.kv.spec)
            self._copy(self.cache, moved, pages)
            self.cache = moved

    def _copy(self, source: KVCache, target: KVCache, pages: Tensor) -> None:
        assert self._planes is not None
        for plane in (p for p in self._planes[1] if p.paged):
            old, new = source.planes[plane.name], target.planes[plane.name]
            if plane.dtype.itemsize == 1:  # float8 has no indexed copies
                old, new = old.view(torch.uint8), new.view(torch.uint8)
            new[: pages.numel()] = old[pages]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Pages come with the first write."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns that the mask covers, first of them)."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns so far, padding included: what positions are counted in."""
        return self.columns

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def __repr__(self) -> str:
        r = self.kv.request
        return f"QhalLayer(k={r.k}, v={r.v}, {self.columns} columns)"


class QhalCache(Cache):  # type: ignore[misc]
    """The caches of all layers of a model that `kv_attach.attach` prepared, for `model(cache=...)` and `generate`.

    Made by itself when such a model is called with use_cache; `kv_attach.new_cache` makes one to keep between calls.
    """

    def __init__(self, layers: Sequence[LayerKV]) -> None:
        if not layers or [kv.layer for kv in layers] != list(range(len(layers))):
            raise EngineError(f"a cache needs every layer once and in order, not {[kv.layer for kv in layers]}")
        self.sequences = Sequences(layers[0].request.page, layers[0].ops.device)
        batches = Batches(layers[0].ops)
        super().__init__(layers=[QhalLayer(kv, self.sequences, batches) for kv in layers])

    @property
    def nbytes(self) -> int:
        """Bytes of all planes of all layers, unused pages included."""
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache is not None)

    def reset(self) -> None:
        """Forgets every sequence; the next step may bring other ones."""
        self.crop(-self.sequences.columns)
        self.select(torch.zeros(0, dtype=torch.int64))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove columns (transformers passes a negative number)."""
        if not -self.sequences.columns <= tokens_to_remove <= 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of columns, at most all of them")
        self.sequences.crop(-tokens_to_remove)
        for layer in self.layers:
            layer.columns = self.sequences.columns

    def select(self, indices: Tensor) -> None:
        """Sequence i becomes a copy of sequence indices[i]."""
        pages = self.sequences.select(indices)
        for layer in self.layers:
            layer.select(pages)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search goes on with these sequences."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences."""
        self.select(torch.arange(len(self.sequences.pages))[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence so many times."""
        self.select(torch.arange(len(self.sequences.pages)).repeat_interleave(repeats))


def fill_static(cache: KVCache, spec: KVSpec) -> None:
    """Writes the static scales and zero points of `spec` into their planes; what it does not give stays at 1 and 0.

    To be replaced by the function of the same purpose in qhal/layers.py.
    """
    for part, operand in (("k", spec.k), ("v", spec.v)):
        scale = operand.format.scale
        if operand.scale is not None and scale is not None:
            cache.set_static(f"{part}.scale" if scale.plain else f"{part}.scale.scale", operand.scale)
        if operand.zero is not None:
            cache.set_static(f"{part}.zero", operand.zero)
