"""Sums of integer codes, which float64 holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from qhal_schemes.loops.jit import loop, shared

Array = np.ndarray[Any, Any]
_RUN = 1 << 16
"""Codes whose sum int32 holds."""


def row_sums(codes: Array, sums: Array, magnitudes: bool) -> None:
    """sums, float64 [n]: of int8 codes [n, k], or of their magnitudes; exact below 2^53."""
    run = _magnitudes if magnitudes else _plain
    shared(lambda a, b: run(codes[a:b], sums[a:b]), len(codes), codes.shape[1])


@loop
def _plain(codes: Array, sums: Array) -> None:
    for i in range(codes.shape[0]):
        sums[i] = 0
        for start in range(0, codes.shape[1], _RUN):
            total = np.int32(0)
            for code in codes[i, start : start + _RUN]:
                total = np.int32(total + np.int32(code))
            sums[i] += total


@loop
def _magnitudes(codes: Array, sums: Array) -> None:
    for i in range(codes.shape[0]):
        sums[i] = 0
        for start in range(0, codes.shape[1], _RUN):
            total = np.int32(0)
            for code in codes[i, start : start + _RUN]:
                total = np.int32(total + abs(np.int32(code)))
            sums[i] += total
