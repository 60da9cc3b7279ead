"""Groups: which rows of a grouped product belong to which expert. Made once per layer call, shared by both products.

Derived device forms (int64 copies, counts, orders) are cached on the object, so sorting and casting happen once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qhal.errors import BatchError


@dataclass(eq=False)
class Offsets:
    """Rows sorted by expert: rows offsets[e]:offsets[e+1] are expert e. offsets int32 [E+1] on the device, monotone."""

    offsets: Tensor
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        o = self.offsets
        if not _integers(o) or o.dim() != 1 or o.numel() < 2:
            raise BatchError(f"offsets must be int32 [E+1], got {_found(o)}")


@dataclass(eq=False)
class Masked:
    """x is [E, M, K]; rows past counts[e] may hold anything and must not leak. counts int32 [E].

    expected  a host hint for the schedule, never the truth
    """

    counts: Tensor
    expected: int | None = None
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not _integers(self.counts) or self.counts.dim() != 1:
            raise BatchError(f"counts must be int32 [E], got {_found(self.counts)}")


@dataclass(eq=False)
class Indexed:
    """Each token names its experts. ids int32 [T, top_k]; -1 is elsewhere and contributes zero.

    weights  float32 [T, top_k]: the result [T, N] is the weighted sum; None: [T * top_k, N] in pair order
    pairs    x is already in pair order
    """

    ids: Tensor
    weights: Tensor | None = None
    pairs: bool = False
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not _integers(self.ids) or self.ids.dim() != 2:
            raise BatchError(f"ids must be int32 [T, top_k], got {_found(self.ids)}")
        w = self.weights
        if w is not None and not (isinstance(w, Tensor) and w.is_floating_point() and w.shape == self.ids.shape):
            raise BatchError(f"weights must be float32 {tuple(self.ids.shape)}, got {_found(w)}")


def _integers(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64)


def _found(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


Groups = Offsets | Masked | Indexed
