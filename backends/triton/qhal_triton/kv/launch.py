"""quant_kv: arguments checked, and the kernel started."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.errors import FormatError
from qhal_portable.kv import check_rows, check_slots
from qhal_triton.kv.kernels.write import write
from qhal_triton.kv.paths import encoding
from qhal_triton.kv.planes import RowPlanes
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


def size(count: int, k_dim: int, v_dim: int) -> Size:
    """For `count` rows (token, head)."""
    k, v = (max(1 << (dim - 1).bit_length(), 2) for dim in (k_dim, v_dim))
    share = _SHARE if count * max(k, v) >= _SHARE * _BUSY else _SHARE // 8
    rows = max(share // max(k, v), 1)
    return Size(rows, k, v, min(max(rows * max(k, v) // 512, 1), 8))


def run(k: Tensor, v: Tensor, cache: KVCache, slots: Tensor, device: torch.device, target: Target) -> None:
    """Rows quantized and written.

    Slots on the device are not read before the kernel does: one past the cache is skipped there, as -1 is. It is an
    error where the slots are on the host.
    """
    (first, kf, _), (second, vf, _) = check_rows(k, v, cache, slots)
    if slots.is_cpu:
        check_slots(cache, slots)
        slots = slots.to(device)
    request = cache.request
    for name, t in ((first, k), (second, v), ("the slots", slots), ("the cache", cache.planes[f"{first}.codes"])):
        if t.device != device:
            raise FormatError(f"quant_kv: {name} are on {t.device}, must be on {device}")
    if not slots.numel():
        return
    k, v = (_rows(t.detach()) for t in (k, v))
    ke, ve = encoding(kf, request.k_dim, k.dtype, target), encoding(vf, request.v_dim, v.dtype, target)
    assert ke is not None and ve is not None
    count = slots.numel() * request.heads
    s = size(count, request.k_dim, request.v_dim)
    write[(-(-count // s.rows), 2)](
        k, *k.stride()[:2], v, *v.stride()[:2], slots, slots.stride(0), count, cache.pages * request.page,
        request.heads, request.page,
        *RowPlanes.of(cache, first, ke.row).flat(), *RowPlanes.of(cache, second, ve.row).flat(),
        K=ke.row, KF=ke.recipe, V=ve.row, VF=ve.recipe,
        DK=request.k_dim, DV=request.v_dim, ROWS=s.rows, BK=s.k, BV=s.v, num_warps=s.warps, enable_fp_fusion=False,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """[T, G, D] with contiguous features."""
    x = x if x.dim() == 3 else x.unsqueeze(1)
    return x if x.stride(-1) == 1 else x.contiguous()
