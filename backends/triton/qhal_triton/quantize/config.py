"""Sizes of the kernels' programs, by shape: pure functions, so that a tuner can try the candidates."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST = 32768
"""Elements of a row (padded to a power of two) that one program keeps in registers."""
CHUNK = 8192
"""Columns that are read at once of what does not fit."""
PARTS = 256
"""Programs that look for the extremes of a tensor."""
SHARES = (1024, 2048, 4096, 8192)
"""Candidates: elements of a program that has several small blocks."""
_PAIRS = 128
"""Elements of the smallest program: of less a thread would have a single one, which Triton 3.6 codes in fp8 wrongly."""
_BUSY = 264
"""Programs below which some of a large chip's multiprocessors have nothing to do."""


@dataclass(frozen=True)
class Config:
    """Blocks of a program, padded elements of one, warps."""

    blocks: int
    elements: int
    warps: int


def config(elements: int, count: int) -> Config:
    """For `count` blocks of so many elements: large shares if there is enough work to spread, small ones if not."""
    padded = max(1 << (elements - 1).bit_length(), 1)
    share = next((s for s in reversed(SHARES) if padded * count >= s * _BUSY), SHARES[0])
    share = min(share, SHARES[2])
    blocks = max(share // padded, 1)
    while blocks * padded > _PAIRS and blocks >= 2 * count:
        blocks //= 2
    return Config(blocks, padded, warps(blocks * padded))


def warps(elements: int) -> int:
    """Warps of a program with so many elements: 32 for a thread, at least 1 and at most 16 warps."""
    return min(max(elements // 1024, 1), 16)
