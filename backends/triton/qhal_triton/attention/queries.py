"""Queries as the request holds them: plain floats as they are, or codes and scales of every (token, head)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.elements import element
from qhal.encoding import encode
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.tensors import QTensor
from qhal_triton.kv.rows import Row


class Held(NamedTuple):
    """Rows [T, H, D] and their scales [T, H, groups], or static ones; absent planes are the codes."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    outer: Tensor
    groups: int = 1

    def planes(self) -> tuple[Tensor, ...]:
        """In the order of the kernel's arguments."""
        return self.codes, self.scale, self.zero, self.outer

    def numbers(self) -> tuple[int, int, int]:
        """Strides of token and head, scales of a row."""
        return (*self.codes.stride()[:2], self.groups)  # type: ignore[return-value]

    def after(self, columns: int, row: Row) -> Held:
        """The same rows from a column on."""
        scale = self.scale[..., columns // row.group :] if row.kind == "group" else self.scale
        return self._replace(codes=self.codes[..., columns:], scale=scale)


def hold(q: Tensor, f: Format, row: Row, cache: KVCache) -> Held:
    """q [T, H, D] in format `f`. The bits are those of `qhal.encoding.encode`."""
    if not row.kind:
        kind = element(f.element).storage
        codes = q if q.dtype == kind else q.to(kind)
        codes = codes if codes.stride(-1) == 1 else codes.contiguous()
        return Held(codes, codes, codes, codes)
    if row.static:
        zero = _static(cache, "q.zero", f) if row.zero else None
        quantized = encode(
            q, f, scale=_static(cache, "q.scale", f).float(), zero=None if zero is None else zero.float()
        )
        codes = _bytes(quantized.codes)
        scale = _bytes(cache.planes["q.scale"])
        return Held(codes, scale, codes if zero is None else _bytes(zero), codes)
    outer = _static(cache, "q.scale.scale", f) if row.outer else None
    quantized = encode(q.flatten(0, 1), f, scale=None if outer is None else outer.float())
    codes = _bytes(quantized.codes).reshape(q.shape)
    plane = quantized.scale.codes if isinstance(quantized.scale, QTensor) else quantized.scale
    assert plane is not None
    scale = _bytes(plane).reshape(*q.shape[:2], -1)
    found = quantized.zero
    zeros = _bytes(found).reshape(*q.shape[:2], -1) if isinstance(found, Tensor) else codes
    return Held(codes, scale, zeros, codes if outer is None else outer, scale.shape[-1])


def _static(cache: KVCache, name: str, f: Format) -> Tensor:
    plane = cache.planes.get(name)
    if plane is None:
        raise FormatError(f"the cache has no plane {name} for q={f}; make it from kv_planes(request, attention=[...])")
    return plane


def _bytes(plane: Tensor) -> Tensor:
    return plane.view(torch.uint8) if plane.element_size() == 1 else plane
