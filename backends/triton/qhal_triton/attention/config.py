"""Sizes of blocks and how many parts the keys of a sequence are cut into: functions of request, limits and chip."""

from __future__ import annotations

from typing import NamedTuple

from qhal.caches import Limits
from qhal.elements import WIDE
from qhal.requests import AttentionRequest, KVRequest
from qhal_triton.attention.paths import Arithmetic
from qhal_triton.kv.kernels.packed import ELEMENTS
from qhal_triton.kv.rows import Row
from qhal_triton.target import Target

_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "gfx950": 256}
_LEAST = 256  # keys of a part: fewer would cost more to merge than they save


_PACKED = {"int4", "uint4", "e2m1"}
"""Elements of which a byte holds two."""


class Config(NamedTuple):
    """m query rows (token, head) and n keys of a tile; together: query heads of a block; splits: parts of the keys.

    edges: as `attend` has it.
    """

    m: int
    n: int
    together: int
    splits: int
    warps: int
    stages: int
    edges: bool = False


def config(request: AttentionRequest, arithmetic: Arithmetic, limits: Limits, target: Target) -> Config:
    """The first candidate; its splits depend on limits only, so that one captured graph serves every length."""
    return candidates(request, arithmetic, limits, target)[0]


def candidates(request: AttentionRequest, a: Arithmetic, limits: Limits, target: Target) -> list[Config]:
    """What an autotuner may measure, the one that is taken unmeasured first."""
    kv = request.kv
    share = request.heads // kv.heads
    per_sequence = 1 if request.phase == "decode" else -(-limits.tokens // max(limits.batch, 1))
    rows = min(share, 64) * min(per_sequence, 128)
    rows = 16 if rows <= 16 else 64 if rows <= 64 else 128  # few sizes: each is a kernel to compile
    small = target.kind == "hip" or target.shared < 128 << 10  # AMD's compiler spills in large tiles
    two = max(a.k_parts, a.v_parts, a.p_parts, a.q_parts) > 1
    widest = max(kv.k_dim, kv.v_dim)
    found: list[Config] = []
    measured = _hopper(request, a, rows, target) if target.arch == "sm_90" else None
    if measured is not None:
        shapes = [measured]
        shapes += [
            (measured[0], n, warps, stages) for n in (32, 64) for warps in (1, 2, 4, 8) for stages in (1, 2, 3, 5)
        ]
    elif widest > 256:  # values fill the registers: few rows, and fewer where operands have two parts
        m = min(rows, 16 if small or a.k_parts == 2 else 32 if two else 64)
        shapes = [(m, 16 if small or two else 64, 8, 1 if small or two else 2)]
        shapes += [(m, n, warps, stages) for n in (16, 32, 64) for warps in (4, 8) for stages in (1, 2)]
    elif widest > 128:
        shapes = [(min(rows, 32 if small else 64), 32, 4, 1 if small or two else 2)]
    else:
        decoded = target.arch.startswith("sm_10") and not {kv.k.element, kv.v.element} <= WIDE.keys()
        m = min(rows, 64 if small or two or decoded else 128)
        if target.kind == "hip" and target.warp == 32:  # a thread holds twice as much of a matrix
            wide = {kv.k.element, kv.v.element} <= WIDE.keys()
            shapes = [(m, 32, 8 if m > 16 else 4, 1) if wide else (min(m, 32), 16, 4, 1)]
        elif m > 16 and target.kind == "cuda" and not target.from_memory:
            shapes = [_registers(kv, m, small)]
        else:
            shapes = [(m, 32 if two else 64, 8 if m > 64 else 4, 2 if small else 3)]
        shapes += [(m, n, warps, stages) for n in (32, 64, 128) for warps in (4, 8) for stages in (2, 3, 4)]
    for m, n, warps, stages in dict.fromkeys(shapes):
        together = min(share, m)
        splits = _splits(request, a, limits, target, m, together, warps)
        found.append(Config(m, n, together, splits, warps, stages, _edges(kv, m, target)))
    return found


def _hopper(request: AttentionRequest, a: Arithmetic, rows: int, target: Target) -> tuple[int, int, int, int] | None:
    """Tiles that were the fastest of those measured on an H200; None where none was.

    With few rows, programs of one or two warps wait for each other least; eight warps share a multiprocessor.
    Over latent rows two groups of four warps take half of the scores and half of the values each.
    """
    kv = request.kv
    if kv.k_dim > 256:
        one = max(a.q_parts, a.rope_parts, a.k_parts, a.v_parts) == 1 and not (a.k.packed or a.v.packed)
        fits = rows >= 64 and kv.k_dim <= 512 and kv.v_dim <= 64
        return (64, 64, 8, 2 if a.p_parts == 1 else 1) if one and fits else None
    if rows > 16 or max(kv.k_dim, kv.v_dim) > 128:
        return None
    held = {kv.k.element, kv.v.element}
    both = words(request, a, rows, target) == (True, True)
    if both and "int8" not in held:
        return 16, 32, 1, 5 if a.p_parts == 1 else 3
    if both or (held <= WIDE.keys() and a.p_parts == 1):  # one warp would spill
        return 16, 64, 2, 3
    return (16, 32, 2, 3) if held == {"e2m1"} else None


def words(request: AttentionRequest, a: Arithmetic, m: int, target: Target) -> tuple[bool, bool]:
    """Whether the codes of K and of V are read as words of two: for few query rows, whose operands are registers."""
    if target.kind != "cuda" or m > 16:
        return False, False
    kv, mla = request.kv, request.kv.kind == "mla"

    def fit(row: Row, dim: int, parts: int, *types: str) -> bool:
        known = row.element in ELEMENTS and (row.element == "int8" or row.element in target.fp8)
        outside = not row.inside and not row.zero and parts == 1
        return known and outside and dim % 32 == 0 and set(types) == {"bf16"}

    of_k = fit(a.k, kv.k_dim, a.k_parts, a.type, *((a.pv,) if mla else ()))
    return of_k, fit(a.v, kv.v_dim, a.v_parts, a.rope_type if mla else a.pv)


def _edges(kv: KVRequest, m: int, target: Target) -> bool:
    """Where the branch was seen to pay (H200), and where it costs no registers (L1)."""
    if target.arch == "sm_90":
        return kv.kind != "mla" or m >= 64
    return target.kind == "cuda" and kv.kind != "mla" and m <= 16


def _registers(kv: KVRequest, m: int, small: bool) -> tuple[int, int, int, int]:
    """The tile for many rows where instructions take both operands from registers, beside what is decoded."""
    held = {kv.k.element, kv.v.element}
    if held & _PACKED:  # even and odd features are products of their own
        return 32, 32, 4, 2
    return (m, 64, 8, 3) if held <= WIDE.keys() and not small else (min(m, 64), 64, 8, 2)


def blocks(limits: Limits, c: Config) -> int:
    """Blocks of query rows that a step within the limits can have."""
    tokens = c.m // c.together
    return min(limits.tokens, limits.tokens // tokens + limits.batch)


def merged_columns(splits: int, width: int) -> int:
    """Columns that a program merges: as many as make 4096 numbers with those of all parts, 64 at least."""
    return min(max(4096 // power(splits), 64), power(width))


def _splits(
    request: AttentionRequest, a: Arithmetic, limits: Limits, target: Target, m: int, together: int, warps: int
) -> int:
    if a.p_static:
        return 1  # its maximum is that of all keys
    most = max(limits.pages * request.kv.page // _LEAST, 1)
    if request.batch_invariant:
        return min(most, 16)
    share = request.heads // request.kv.heads
    tokens = m // together
    programs = min(limits.tokens, limits.tokens // tokens + limits.batch) * request.kv.heads * -(-share // together)
    slots = _PROCESSORS.get(target.arch, 96) * (1 if request.kv.k_dim > 256 else max(8 // warps, 2))
    if m > 16 and programs >= slots:
        return 1  # parts of many rows would take much memory to merge
    return _fill(programs, min(most, 64), slots)


def _fill(programs: int, most: int, slots: int) -> int:
    """The least number of parts that keeps nine of ten slots of every round busy, else the one that keeps the most."""

    def busy(parts: int) -> float:
        count = programs * parts
        return count / (slots * -(-count // slots))

    if programs < 1:
        return 1
    return next((n for n in range(1, most + 1) if busy(n) >= 0.9), max(range(1, most + 1), key=busy))


def power(n: int) -> int:
    """The power of two at or above n."""
    return 1 << (n - 1).bit_length()
