"""Codec: what travels between the ranks of a quantized collective, how it is summed, and what has no meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

from qhal.elements import WIDE, element
from qhal.encodable import dense, encodable
from qhal.formats import Format

if TYPE_CHECKING:
    from qhal.requests import CommRequest

Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]
CODEC_VERSION = 1
_GROUP = 32  # order=parity makes two groups of this many out of a run of twice as many columns


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


def refusals(r: CommRequest) -> Iterator[str]:
    """Why this collective has no meaning; nothing if it has. The reference executes everything else."""
    c = r.codec
    if not isinstance(c, Codec):
        yield f"codec={c} is no Codec; write Codec(format)"
        return
    f, e = c.format, element(c.format.element)
    if r.x not in WIDE.values():
        yield f"x={r.x}: choose bf16, fp16 or fp32"
    if r.collective not in get_args(Collective):
        yield f"collective={r.collective!r}: choose one of {', '.join(get_args(Collective))}"
    if r.world < 1 or r.numel < 0:
        yield f"world={r.world} must be at least 1 and numel={r.numel} at least 0"
    if c.version != CODEC_VERSION:
        yield f"codec version {c.version} is not known here, {CODEC_VERSION} is"
    if c.order not in ("sequential", "parity"):
        yield f"order={c.order!r}: choose sequential or parity"
    if c.order == "parity" and (f.block is None or str(f.block) != f"g{_GROUP}"):
        yield f"order=parity makes two groups of {_GROUP} out of {2 * _GROUP} columns: the format must have g{_GROUP}"
    if c.spikes:
        yield f"spikes={c.spikes}: which extremes, in which 16 bits and where they travel is not laid down yet; use 0"
    if c.planes and (min(c.planes) < 1 or sum(c.planes) != e.bits or e.bits > 8):
        yield f"planes={c.planes} must be positive and add up to the {e.bits} bits of {e.name}, at most 8"
    if c.accumulate not in ("fp32", "fp16", "bf16"):
        yield f"accumulate={c.accumulate!r}: choose fp32, fp16 or bf16"
    if r.collective == "all_gather" and not c.quantize_own:
        yield "all_gather with quantize_own=False would leave every rank with other numbers; use quantize_own=True"
    if any(level.rule.special == "error" for level in f.levels()):
        yield f"{f}: special=error would stop one rank alone; use nan or saturate"
    if not r.decode:
        if r.collective not in ("all_gather", "all_to_all"):
            yield f"decode=False leaves all_gather and all_to_all as a QTensor; the sum of {r.collective} is no QTensor"
        if not c.quantize_own:
            yield "decode=False needs quantize_own=True: a part that is not quantized does not fit into the QTensor"
        if not row_wise(f):
            yield f"decode=False needs scales that travel with their rows (row, g<k>); {f} has blocks across rows"
    yield from dense(f)
    yield from encodable(f)


def row_wise(f: Format) -> bool:
    """Whether no block reaches beyond its row: a row's bits then depend on that row alone."""
    return all(level.block is None or level.block.kind in ("row", "group") for level in f.levels())
