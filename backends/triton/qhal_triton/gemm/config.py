"""Sizes of tiles: a pure function of the shape; candidates for measuring."""

from __future__ import annotations

from dataclasses import dataclass

from qhal.formats import Format
from qhal.requests import GemmRequest
from qhal_triton.gemm.paths import Spec
from qhal_triton.gemm.sides import WIDE_KIND
from qhal_triton.target import Target

PROCESSORS = 132
"""Multiprocessors of a large GPU. Fewer only make waves uneven."""


@dataclass(frozen=True)
class Config:
    """bm tokens by bn features in a program, the steps of K in `parts` that are summed afterwards."""

    bm: int
    bn: int
    parts: int
    warps: int
    stages: int


def config(s: Spec, m: int, n: int, steps: int, target: Target, *, tiles: int | None = None) -> Config:
    """The tile for m rows. tiles: how many tiles of rows there will be, where that isn't m / bm."""
    most, bn, warps, deep = _fitting(s, m, target)
    bm = min(next((b for b in (16, 32, 64, 128) if m <= b), 256), most)
    while bm > 16 and memory(s, bm, bn, 2) > target.shared:
        bm //= 2
    alone = (
        bm >= 64 and target.from_memory
    )  # one program to a multiprocessor; scales that are staged too need some of it
    room = target.shared if alone and s.packed else target.shared * 3 // 4 if alone else target.shared >> 1
    programs = -(-n // bn) * (tiles if tiles is not None else -(-m // bm))
    if s.type == "int8" and s.mode == "late" and programs > PROCESSORS:
        room = target.shared >> 1  # while one of two programs applies its scales, the other multiplies
    stages = max([2, *(deep for deep in range(3, deep + 1) if memory(s, bm, bn, deep) <= room)])
    if s.w.kind == "table":  # what is looked up would be staged too, with four bytes for a code
        stages = 1
    most = _programs(s, bm, target)
    parts = 1
    while 2 * programs * parts <= most and steps // (2 * parts) >= 4:
        parts *= 2
    return Config(bm, bn, parts, warps, stages)


def _programs(s: Spec, bm: int, target: Target) -> int:
    """How many programs the steps of K are split into at most.

    Few rows wait for memory, which more programs than run at a time hide; many rows wait for the matrix instructions,
    and a second wave that is not full costs more than it hides (H200). Codes of more than four bits are in between.
    """
    if bm <= 16 or target.kind != "cuda":
        return 6 * PROCESSORS - 1
    between = s.w.bits > 4 and s.type != "int8" and not s.long
    return 2 * PROCESSORS if bm <= 32 or (bm <= 128 and between) else PROCESSORS


def _fitting(s: Spec, m: int, target: Target) -> tuple[int, int, int, int]:
    """(rows at most, features, warps, stages at most) of a tile for m rows whose steps spill no register (L1).

    A thread has 64 sums of a tile of 128 x 128 and 8 warps, and 64 more where those of a step are scaled before they
    are added. That just fits where weights are decoded into the registers of wgmma; not with zero points or scales of x
    besides, nor with the sums of four or more units of scales, which the compiler forms before it scales the first.
    """
    stages = 3 if s.w.bits <= 4 or (s.x.kind == WIDE_KIND and m > 16) or s.long else 4
    if target.kind == "hip" and target.warp == 32:  # 256 registers, and gfx11 holds every operand in them twice
        twice = target.arch.startswith("gfx11") and (s.mode == "step" or s.x.kind == "uint")
        return 16 if twice or (s.x.group and s.type in ("bf16", "fp16")) else 32, 64, 4, 2
    if target.kind == "hip":  # AMD's compiler spills in larger tiles and in deeper pipelines
        return 32 if s.type == "fp32" else 64, 64, 4, 2
    if s.type == "fp32":  # no matrix instruction: sums of 16 rows are enough for a thread
        return 16, 64, 4, stages
    step, units = s.mode == "step", s.span // s.unit
    many = step and units >= 4 and s.chunk >= 32
    shared = target.from_memory
    if step and units >= 4 and s.x.group:  # a thread reads the scales of its rows for every unit
        narrow = many and not shared and s.type != "int8"
        return 16 if narrow else 32, 64, 8 if shared and m > 16 else 4, 2
    if many and m > 32 and not shared:
        return 64, 32, 4, stages
    if target.shared < 128 << 10:
        # two fp32 planes for every unit; bytes of weights beside the scales of both
        return 32 if "offset" in s.w.made or (s.expanded and s.x.group) else 64, 64, 4, stages
    rows = 64 if many or s.x.group or s.x.zero or s.x.kind == "uint" or (step and not shared) else 128
    if step and s.w.bits > 4 and not s.native and m <= 16 and shared:
        return rows, 128, 4, 3  # decoding takes longer than reading: more features share what is read of x
    both = step and not shared and s.x.group and s.type == "bf16" and s.w.bits <= 4  # decoded in registers, both
    if both or (s.expanded and s.x.group and s.unit < 128):
        rows = 32
    if step and s.native and not s.expanded and s.x.group and target.arch.startswith("sm_90") and m > 32:
        return rows, 128, 4, 3
    if s.mode == "late" and s.x.kind == WIDE_KIND and s.w.bits > 4 and shared and m > 128:
        rows = 256
    if target.arch.startswith("sm_10") and step:  # 512 columns of tensor memory have room for all sums of a step
        rows = min(rows, max(256 // units, 16))
    return rows, *((128, 8) if min(m, rows) > 32 else (64, 4)), stages


def memory(s: Spec, bm: int, bn: int, stages: int) -> int:
    """Fast memory of a tile. A weight that is decoded in registers waits one stage less; fp8 and int8 codes do not."""
    size = {"fp32": 4, "bf16": 2, "fp16": 2}.get(s.type, 1)
    x, w = s.span * bm * size, s.span * bn // (2 if s.parts > 1 else 1)
    return stages * x + (stages if s.native and not s.expanded else stages - 1) * w


def problem(r: GemmRequest, x: Format, m: int) -> str:
    """The name of what is measured, as tables have it: x is the format that is multiplied, m a bucket of row counts."""
    w = r.operand or r.w
    stored = w.storage if isinstance(w, Format) else w
    index = " by index" if r.group_index and r.operand is None else ""
    return f"gemm {x.storage} x {stored}{index} n={r.n} k={r.k} m<={m}"


def candidates(s: Spec, m: int, n: int, steps: int, target: Target) -> tuple[Config, ...]:
    """What a tuner may measure for m rows; the tile that is taken unmeasured comes first."""
    first = config(s, m, n, steps, target)
    widths = (32, 64, 128) if first.bm < 128 else (64, 128, 256)
    parts = [p for p in (1, 2, 4, 8, 16) if p == 1 or steps // p >= 2]
    found = [
        Config(first.bm, bn, p, warps, stages)
        for bn in widths
        for p in parts
        for warps in (4, 8)
        for stages in (2, 3, 4, 5)
    ]
    return tuple(dict.fromkeys([first, *found]))
