"""Codec: what travels between the ranks of a quantized collective, and how it is summed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from qhal.formats import Format

Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]


@dataclass(frozen=True)
class Codec:
    """What travels between ranks, and how it is summed.

    format        e.g. "int8.g128*fp16", "e4m3fn.g128*fp32", "e2m1.g32*e8m0"; scales are computed, never static
    order         sequential | parity: the even and the odd columns of 64 form two groups (needs g32: column k of a row
                  belongs to group 2 * (k // 64) + k % 2). The codes stay in column order
    spikes        extremes per group kept in 16 bits
    planes        bit splitting: (4, 2) sends 6-bit codes as two planes, the low 4 bits first; values do not change
    accumulate    fp32 | fp16 | bf16, the sum's type: every contribution and every partial sum is rounded to it; ranks
                  are summed in rank order, starting from rank 0's
    quantize_own  a rank's own part is quantized too, so that all ranks see the same numbers; all_gather needs it
    requantize    the reduced result of all_reduce is quantized again before it travels; else it travels in x.dtype
    version       exchanged first; ranks that differ all raise the same CommError
    """

    format: Format
    order: str = "sequential"
    spikes: int = 0
    planes: tuple[int, ...] = ()
    accumulate: str = "fp32"
    quantize_own: bool = True
    requantize: bool = True
    version: int = 1

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return " ".join((str(self.format), *changed))
