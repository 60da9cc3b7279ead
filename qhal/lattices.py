"""Structured codebooks: tables of the E8 lattice that are constructed, not stored, and checked by hash.

e8p12  65,536 x 8, "E8 padded": 256 vectors of half-odd magnitudes, every sign pattern of even parity, shifted by 1/4
e81b   256 x 8: the E8 vectors of squared length at most 2, and 15 of length 2 on the axes; a residual stage

Source: A. Tseng et al., QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks (2024),
sections 4.2 and 4.3. `e8p12` was compared entry by entry with the table that QuIP# 1d8f873 computes; the hash pins it.
`e81b` follows its description; no output of QuIP# with it was at hand to compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from qhal.errors import FormatError

_LONG = (
    "31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133 33133311 33133131 "
    "33131331 33133113 33131313 33131133 31333311 31333131 31331331 31333113 31331313 13331133 13333311 13333131 "
    "13331331 13333113 13331313 11331333 33113331"
)
"""Twice the magnitudes of the 29 vectors of squared length 12 that fill the 227 shorter ones up to 256, in QuIP#'s
order. Which 29 of the 56 is a choice and follows from nothing: read from the values of its `e8p_packed_abs` table."""

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Coordinate i takes sign bit _ORDER[i] of a code."""


def _e8p12() -> Tensor:
    """Row abs * 256 + s: magnitudes `abs` with the signs s; the parity of s chooses the shift and flips bit 0."""
    short = [v for v in product((1, 3, 5), repeat=8) if sum(c * c for c in v) <= 40]
    twice = torch.tensor(short + [tuple(map(int, v)) for v in _LONG.split()])
    odd = twice.sum(1) // 2 % 2 == 1
    twice[odd, 7] *= -1  # so that an even number of signs more keeps the sum of a vector even
    bits = torch.arange(256)[:, None] >> torch.tensor(_ORDER) & 1
    parity = bits.sum(1) & 1
    bits[:, 0] ^= parity  # sign bit 0 belongs to coordinate 0
    rows = twice[:, None] * (1 - 2 * bits) / 2 + torch.where(parity == 1, -0.25, 0.25)[:, None]
    return rows.reshape(1 << 16, 1, 8)


def _e81b() -> Tensor:
    """Integer vectors of E8, then half-integer ones, both in rising order, then +2 and -2 along the axes."""

    def even(vectors: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:  # twice the coordinates
        return [v for v in vectors if sum(c * c for c in v) <= 8 and sum(v) % 4 == 0]

    # longer coordinates than 1 and 3/2 make a vector longer than the square root of 2
    inside = even(product((-2, 0, 2), repeat=8)) + even(product((-3, -1, 1, 3), repeat=8))
    axes = 4 * torch.eye(8, dtype=torch.long)
    return (torch.cat([torch.tensor(inside), axes, -axes[:7]]) / 2).reshape(256, 1, 8)


_BUILD: dict[str, Callable[[], Tensor]] = {"e8p12": _e8p12, "e81b": _e81b}

TABLE_SHA256: dict[str, str] = {
    "e8p12": "ea3883a85a627590ca74626320a2a691943386a8c89ac72cdb6388bfe7da5cc0",
    "e81b": "704988a9e44c32c25881652594cfdc4f13ac4793de396248db8d2acc014b3209",
}
"""Hash of a table's entries times four as int8, row-major."""


@cache
def load(name: str) -> Tensor:
    """The table of that name, float32 [V, 1, 8], built and checked once. FormatError if its hash is another."""
    with torch.device("cpu"):  # cached: never on a default device
        table = _BUILD[name]()
    found = hashlib.sha256((table * 4).to(torch.int8).numpy().tobytes()).hexdigest()
    if found != TABLE_SHA256[name]:
        raise FormatError(
            f"structured codebook {name!r} has the hash {found}, must have {TABLE_SHA256[name]}: "
            "this installation of qhal is damaged, install it again"
        )
    return table
