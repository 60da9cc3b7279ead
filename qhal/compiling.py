"""Inside `torch.compile`: operators `qhal::linear`, `qhal::experts`, `qhal::quant_kv` and `qhal::attention`.

A compiler cannot look into a backend, and need not: it sees one operator per layer, the shape and dtype of its result,
and which planes of a cache are written. Eager calls never pass here. An operator takes a number for what is no tensor:
`handle(thing)`; layers have theirs (`PreparedLinear.handle`), `PagedAttention` is a cache with its readers. The thing
must be kept alive by its owner. For inference: the operators have no gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from qhal.errors import FormatError
from qhal.groups import Indexed

if TYPE_CHECKING:
    from qhal.caches import AttentionBatch, KVCache
    from qhal.interface import QuantOps
    from qhal.requests import AttentionRequest

_numbers = itertools.count(1)
_things: WeakValueDictionary[int, Any] = WeakValueDictionary()


def new_handle() -> int:
    """A number that nothing else in this process has."""
    return next(_numbers)


def handle(thing: Any) -> int:
    """A new handle of `thing`; operators find it for as long as somebody keeps it."""
    number = new_handle()
    _things[number] = thing
    return number


def _of(number: int) -> Any:
    try:
        return _things[number]
    except KeyError:
        raise FormatError(f"handle {number} names nothing alive: keep what a compiled function uses") from None


class PagedAttention:
    """One layer's cache and how it is read, callable in compiled functions and outside: the bits are those of `ops`.

    Made once, outside. The batch is planned with `AttentionBatch.plan` before each step, outside too.
    """

    def __init__(self, ops: QuantOps, cache: KVCache, batch: AttentionBatch, request: AttentionRequest) -> None:
        self.ops, self.cache, self.batch, self.request = ops, cache, batch, request
        self.planes = list(cache.planes.values())
        self.handle = handle(self)

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """`QuantOps.quant_kv`."""
        torch.ops.qhal.quant_kv(k, v, self.planes, slots, self.handle)

    def __call__(self, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        """`QuantOps.attention`: q [T, H, D] -> [T, H, Dv] (latent rows: [T, H, R])."""
        y: Tensor = torch.ops.qhal.attention(q, self.planes, sinks, self.handle)
        return y

    def over(self, planes: Sequence[Tensor]) -> KVCache:
        """The cache with those planes: a compiler may pass copies of its own."""
        return replace(self.cache, planes=dict(zip(self.cache.planes, planes, strict=True)))


_library = torch.library.Library("qhal", "DEF")
_library.define("linear(Tensor x, int layer, bool decode) -> Tensor")
_library.define("experts(Tensor x, int layer, Tensor ids, Tensor? weights) -> Tensor")
_library.define("quant_kv(Tensor k, Tensor v, Tensor(a!)[] planes, Tensor slots, int attention) -> ()")
_library.define("attention(Tensor q, Tensor[] planes, Tensor? sinks, int attention) -> Tensor")


def _linear(x: Tensor, layer: int, decode: bool) -> Tensor:
    y: Tensor = _of(layer)(x, decode=decode)
    return y


def _experts(x: Tensor, layer: int, ids: Tensor, weights: Tensor | None) -> Tensor:
    y: Tensor = _of(layer)(x, Indexed(ids, weights))
    return y


def _quant_kv(k: Tensor, v: Tensor, planes: list[Tensor], slots: Tensor, attention: int) -> None:
    found: PagedAttention = _of(attention)
    found.ops.quant_kv(k, v, found.over(planes), slots)


def _attention(q: Tensor, planes: list[Tensor], sinks: Tensor | None, attention: int) -> Tensor:
    found: PagedAttention = _of(attention)
    return found.ops.attention(q, found.over(planes), found.batch, sinks=sinks)


def _linear_shape(x: Tensor, layer: int, decode: bool) -> Tensor:
    prepared = _of(layer)
    return x.new_empty((*x.shape[:-1], prepared.format.n), dtype=prepared.weight.request.out or x.dtype)


def _experts_shape(x: Tensor, layer: int, ids: Tensor, weights: Tensor | None) -> Tensor:
    prepared = _of(layer)
    rows = x.shape[0] if weights is not None else ids.numel()
    return x.new_empty((rows, prepared.format.down.n), dtype=prepared.down.request.gemm.out or x.dtype)


def _quant_kv_shape(k: Tensor, v: Tensor, planes: list[Tensor], slots: Tensor, attention: int) -> None:
    """Nothing is returned; the planes are written."""


def _attention_shape(q: Tensor, planes: list[Tensor], sinks: Tensor | None, attention: int) -> Tensor:
    request: AttentionRequest = _of(attention).request
    width = request.kv.k_dim if request.kv.kind == "mla" else request.kv.v_dim
    return q.new_empty((*q.shape[:2], width), dtype=request.out)


for _name, _run, _shape in (
    ("linear", _linear, _linear_shape),
    ("experts", _experts, _experts_shape),
    ("quant_kv", _quant_kv, _quant_kv_shape),
    ("attention", _attention, _attention_shape),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qhal::{_name}", _shape, lib=_library)
