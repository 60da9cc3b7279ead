"""Sums of integer codes, which float64 holds exactly."""

from __future__ import annotations

from typing import Any

import numpy as np

from qhal_schemes.loops.jit import loop, shared

Array = np.ndarray[Any, Any]


def row_sums(codes: Array, sums: Array, magnitudes: bool) -> None:
    """sums, float64 [n]: of int8 codes [n, k], or of their magnitudes."""
    run = _magnitudes if magnitudes else _plain
    shared(lambda a, b: run(codes[a:b], sums[a:b]), len(codes), codes.shape[1])


@loop
def _plain(codes: Array, sums: Array) -> None:
    for i in range(codes.shape[0]):
        row, total = codes[i], np.int64(0)
        for k in range(row.shape[0]):
            total += np.int64(row[k])
        sums[i] = total


@loop
def _magnitudes(codes: Array, sums: Array) -> None:
    for i in range(codes.shape[0]):
        row, total = codes[i], np.int64(0)
        for k in range(row.shape[0]):
            total += abs(np.int64(row[k]))
        sums[i] = total
