"""quant_kv: arguments checked, and the kernel started."""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.errors import FormatError
from qhal_portable.kv import RowOf, check_planes, check_slots, check_tokens, rows_of
from qhal_triton.kv.kernels.write import write
from qhal_triton.kv.paths import encoding
from qhal_triton.kv.planes import RowPlanes, remembered
from qhal_triton.launching import Launcher
from qhal_triton.target import Target

_BUSY = 264
"""Programs below which some of a large chip's multiprocessors have nothing to do: then each has an eighth."""
_SHARE = 4096
"""Elements of a program, if there are enough of them."""


class Size(NamedTuple):
    """Rows of a program, its columns of K and of V (powers of two), warps."""

    rows: int
    k: int
    v: int
    warps: int


@lru_cache(maxsize=4096)
def size(count: int, k_dim: int, v_dim: int) -> Size:
    """For `count` rows (token, head)."""
    k, v = (max(1 << (dim - 1).bit_length(), 2) for dim in (k_dim, v_dim))
    share = _SHARE if count * max(k, v) >= _SHARE * _BUSY else _SHARE // 8
    rows = max(share // max(k, v), 1)
    return Size(rows, k, v, min(max(rows * max(k, v) // 1024, 1), 8))


def run(k: Tensor, v: Tensor, cache: KVCache, slots: Tensor, device: torch.device, target: Target) -> None:
    """Rows quantized and written.

    Slots on the device are not read before the kernel does: one past the cache is skipped there, as -1 is. It is an
    error where the slots are on the host.
    """
    seen = remembered(cache, target, lambda: _Seen(cache, target))
    first, second = seen.rows
    check_tokens(k, v, slots, first, second)
    if slots.is_cpu:
        check_slots(cache, slots)
        slots = slots.to(device)
    request = cache.request
    held = cache.planes[f"{first[0]}.codes"]
    for name, t in ((first[0], k), (second[0], v), ("the slots", slots), ("the cache", held)):
        if t.device != device:
            raise FormatError(f"quant_kv: {name} are on {t.device}, must be on {device}")
    if not slots.numel():
        return
    k, v = _rows(k), _rows(v)
    to = seen.writing(k.dtype, v.dtype)
    count = slots.numel() * request.heads
    s = size(count, request.k_dim, request.v_dim)
    to.launcher(s)(
        (-(-count // s.rows), 2, 1),
        (k, v, slots, *to.tensors),
        (*k.stride()[:2], *v.stride()[:2], slots.stride(0), count, held.shape[0] * request.page, *to.numbers),
    )


_STRIDES = [f"{p}{part}_{axis}" for p in "kv" for part in "csz" for axis in ("page", "slot", "head")]
_TENSORS = ("k", "v", "slots", "kc", "ks", "kz", "k_outer", "vc", "vs", "vz", "v_outer")
_NUMBERS = ("k_token", "k_in_head", "v_token", "v_in_head", "slot_stride", "count", "limit", "heads", "in_page")


class _Writing:
    """What a cache fixes for rows of some types: its planes as the kernel's arguments, and constants."""

    def __init__(
        self, cache: KVCache, first: RowOf, second: RowOf, k: torch.dtype, v: torch.dtype, target: Target
    ) -> None:
        r = self._request = cache.request
        ke, ve = encoding(first[1], r.k_dim, k, target), encoding(second[1], r.v_dim, v, target)
        assert ke is not None and ve is not None
        self._constants = {"K": ke.row, "KF": ke.recipe, "V": ve.row, "VF": ve.recipe, "DK": r.k_dim, "DV": r.v_dim}
        planes = RowPlanes.of(cache, first[0], ke.row), RowPlanes.of(cache, second[0], ve.row)
        self.tensors = (*planes[0].tensors(), *planes[1].tensors())
        self.numbers = (r.heads, r.page, *planes[0].strides(), *planes[1].strides())
        self._launchers: dict[Size, Launcher] = {}

    def launcher(self, s: Size) -> Launcher:
        """The kernel with programs of that size."""
        found = self._launchers.get(s)
        if found is None:
            fixed = {**self._constants, "ROWS": s.rows, "BK": s.k, "BV": s.v}
            names = (*_NUMBERS, *_STRIDES)
            options = {"num_warps": s.warps, "enable_fp_fusion": False}
            found = self._launchers[s] = Launcher(write, _TENSORS, names, fixed, **options)
        return found


class _Seen:
    """A cache whose planes are those of its request: its two rows, and what it fixes for the types of k and v."""

    def __init__(self, cache: KVCache, target: Target) -> None:
        self.rows = rows_of(cache)
        check_planes(cache)
        self._cache, self._target = weakref.ref(cache), target  # the cache keeps this
        self._writings: dict[tuple[torch.dtype, torch.dtype], _Writing] = {}

    def writing(self, k: torch.dtype, v: torch.dtype) -> _Writing:
        """For rows of these types, which `check_tokens` has let pass."""
        found = self._writings.get((k, v))
        if found is None:
            cache = self._cache()
            assert cache is not None
            found = self._writings[k, v] = _Writing(cache, *self.rows, k, v, self._target)
        return found


def _rows(x: Tensor) -> Tensor:
    """[T, G, D] with contiguous features."""
    x = x if x.dim() == 3 else x.unsqueeze(1)
    return x if x.stride(-1) == 1 else x.contiguous()
