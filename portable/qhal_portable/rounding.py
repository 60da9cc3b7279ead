"""Rounding a float64 result once to the type that was asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 or float32 -> `dtype`, half to even, overflow to Inf (float8: as torch casts float32).

    PyTorch casts float64 to a narrow float through float32 and so rounds twice. Rounding to odd in between keeps every
    tie and every side of a tie (Boldo and Melquiond, "When double rounding is odd", 2005): float32 has more than two
    bits more than any narrower type.
    """
    if value.dtype == torch.float32:
        return value.to(dtype)
    near = value.float()
    if dtype in (torch.float32, torch.float64):
        return value if dtype == torch.float64 else near
    inexact = (near.double() != value) & ~torch.isnan(value)
    even = (near.view(torch.int32) & 1) == 0
    towards = torch.where(value > near, torch.inf, -torch.inf).float()
    odd = torch.where(inexact & even, torch.nextafter(near, towards), near)
    return odd.to(dtype)
