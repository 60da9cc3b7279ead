"""How the loops are compiled, and how threads share one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import torch
from numba.extending import register_jitable

_LEAST = 1 << 16
"""Steps that are worth a thread."""


def loop(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled at the first call for its types, kept on disk where that can be written."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Callable[..., None] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no place for a cache: every process compiles
        compiled = numba.njit(**options)(function)
    return compiled


def part(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled into every loop that calls it. A loop in the closure of another is never found on disk, a part is."""
    compiled: Callable[..., None] = register_jitable(function)
    return compiled


def shared(run: Callable[[int, int], None], count: int, size: int = 1) -> None:
    """run(start, stop) over range(count) in as many parts as torch has threads. size: work of one step, in codes."""
    threads = min(torch.get_num_threads(), max(count * size // _LEAST, 1), max(count, 1))
    if threads <= 1:
        run(0, count)
        return
    edges = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(run, a, b) for a, b in pairwise(edges)]:
            done.result()
