"""Structured codebooks a second time, in numpy, from their definition: what every code of a lattice table stands for.

Independent of `qhal.lattices` on purpose. Sources: A. Tseng et al., QuIP#: Even Better LLM Quantization with Hadamard
Incoherence and Lattice Codebooks (2024), sections 4.2 and 4.3.

E8P: a code of 16 bits is a vector of half-odd numbers whose sum is even, moved by 1/4 along (1, ..., 1) or against it.
Its high byte names the magnitudes, its low byte the signs: seven bits are signs, the eighth coordinate's sign follows
from the evenness of the sum, and the parity of the byte is the direction of the move.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import numpy as np

from qhal_conformance.generator import F32

_ONES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 057 047 056 046 "
    "014 237"
)
"""The 29 longest magnitudes: five coordinates are 3/2, these three 1/2. Which of the 56 triples is QuIP#'s choice."""

_BIT_OF = (0, 4, 1, 5, 2, 6, 3, 7)
"""The sign bit of every coordinate."""


@cache
def table(name: str) -> F32:
    """The codebook of that name, float32 [V, 1, 8]."""
    return {"e8p12": _e8p12, "e81b": _e81b}[name]().astype(np.float32).reshape(-1, 1, 8)


def _magnitudes() -> list[tuple[float, ...]]:
    """256 vectors: those of squared length at most 10 in rising order, then 29 of squared length 12."""
    grid = np.indices((3,) * 8).reshape(8, -1).T + 0.5  # rows in rising order
    short = [tuple(v) for v in grid[(grid**2).sum(axis=1) <= 10].tolist()]
    long = [tuple(0.5 if str(i) in ones else 1.5 for i in range(8)) for ones in _ONES.split()]
    return short + long


def _e8p12() -> np.ndarray:
    sizes, bytes_ = np.array(_magnitudes())[:, None], np.arange(256)[None, :, None]
    negative = (bytes_ >> np.array(_BIT_OF) & 1).astype(bool)  # [1, 256, 8]
    odd = negative.sum(axis=-1, keepdims=True) % 2 == 1
    # coordinate 7 makes sums of an odd magnitude even; coordinate 0 makes the number of signs even
    at = np.arange(8)
    flipped = negative ^ ((sizes.sum(axis=-1, keepdims=True) % 2 == 1) & (at == 7)) ^ (odd & (at == 0))
    return np.asarray(np.where(flipped, -sizes, sizes) + np.where(odd, -0.25, 0.25))


def _e81b() -> np.ndarray:
    """Zero and the 240 shortest vectors of E8, integer ones first, each kind in rising order; 15 axes of length 2."""
    integer: list[tuple[float, ...]] = [(0.0,) * 8]
    for i, j in combinations(range(8), 2):
        for a, b in product((-1.0, 1.0), repeat=2):
            integer.append(tuple(a if c == i else b if c == j else 0.0 for c in range(8)))
    half = [v for v in product((-0.5, 0.5), repeat=8) if v.count(-0.5) % 2 == 0]
    axes = [tuple(sign * 2.0 if c == i else 0.0 for c in range(8)) for sign in (1, -1) for i in range(8)][:15]
    return np.array(sorted(integer) + sorted(half) + axes)
