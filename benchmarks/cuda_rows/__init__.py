"""Rows of `benchmarks/cuda_bars.py`: one file per operation, each a list of `Group`."""

from __future__ import annotations

from cuda_rows import attention, gemm, grouped, host, streams
from cuda_rows.bench import Bench, Group, Measured

GROUPS: tuple[Group, ...] = (*gemm.GROUPS, *grouped.GROUPS, *attention.GROUPS, *streams.GROUPS, *host.GROUPS)

__all__ = ["GROUPS", "Bench", "Group", "Measured"]
