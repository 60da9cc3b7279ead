"""Groups: which rows of a grouped product belong to which expert. Made once per layer call, shared by both products.

Derived device forms (int64 copies, counts, orders) are cached on the object, so sorting and casting happen once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qhal.errors import BatchError


@dataclass(eq=False)
class Offsets:
    """Rows sorted by expert: rows offsets[e]:offsets[e+1] are expert e. offsets int32 [E+1] on the device, monotone."""

    offsets: Tensor
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.offsets.dim() != 1 or self.offsets.numel() < 2 or self.offsets.is_floating_point():
            raise BatchError(f"offsets must be int32 [E+1], got {self.offsets.dtype} {tuple(self.offsets.shape)}")


@dataclass(eq=False)
class Masked:
    """x is [E, M, K]; rows past counts[e] may hold anything and must not leak. counts int32 [E].

    expected  a host hint for the schedule, never the truth
    """

    counts: Tensor
    expected: int | None = None
    cache: dict[str, Any] = field(default_factory=dict, repr=False)


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


Groups = Offsets | Masked | Indexed
