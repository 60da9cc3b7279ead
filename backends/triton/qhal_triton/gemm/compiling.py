"""Candidates compiled in processes that need no device: timing then finds them in Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import triton

from qhal.elements import element
from qhal.formats import Format
from qhal.requests import GemmRequest
from qhal.specs import Operand
from qhal_triton.absent import absent
from qhal_triton.gemm.config import Config
from qhal_triton.gemm.launch import Bound, spec_of
from qhal_triton.gemm.paths import plan
from qhal_triton.gemm.weights import random_weight
from qhal_triton.target import Target

Todo = tuple[Format, int, Config]
"""A format of x, rows, and a tile."""


class Compiler:
    """`compiler(todo)` returns when the products of all of these are compiled; one that cannot be is left out.

    Its processes begin with the first call and end with the `with` block.

    here  makes operations of a target on the processor; a function of a module, so that processes can import it
    jobs  1 compiles nothing ahead
    """

    def __init__(self, here: Callable[[Target], Any], target: Target, request: GemmRequest, jobs: int) -> None:
        self._asked, self._jobs = (here, target, request), jobs
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, todo: Iterable[Todo]) -> None:
        """Waits."""
        if self._jobs < 2:
            return
        if self._pool is None:  # a fork of a process with a device has a broken one
            self._pool = ProcessPoolExecutor(self._jobs, mp_context=multiprocessing.get_context("spawn"))
        cache = str(triton.knobs.cache.dir)
        asked = [self._pool.submit(compiled, *self._asked, *one, cache) for one in todo]
        for one in asked:
            one.exception()  # measuring says of a tile why it does not run

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def jobs() -> int:
    """Processes for this machine: each takes a core and the memory of one weight."""
    return max(min(os.cpu_count() or 1, 17) - 1, 1)


def compiled(
    here: Callable[[Target], Any], target: Target, request: GemmRequest, f: Format, m: int, c: Config, cache: str
) -> None:
    """Compiles what `measuring` launches for this tile."""
    with absent(target, Path(cache)):
        ops, bound = _bound(here, target, request)
        x = torch.zeros(m, request.k, dtype=element(f.element).storage if f.plain else torch.bfloat16)
        q = x if f.plain else ops.quantize(x, f)
        kind = torch.float32 if c.parts > 1 else request.out or x.dtype
        bound.launch(spec_of(bound, q, m), q, torch.empty(c.parts, m, request.n, dtype=kind), c, None)


@lru_cache(maxsize=1)
def _bound(here: Callable[[Target], Any], target: Target, request: GemmRequest) -> tuple[Any, Bound]:
    ops, made = here(target), plan(request, target)
    assert made is not None and isinstance(request.w, Format)
    w = random_weight(request.w, (request.n, request.k), torch.Generator().manual_seed(0), index=request.group_index)
    inputs = [] if all(f.plain for f in request.x) else [Operand(f) for f in request.x]
    bias = torch.zeros(request.n) if request.bias else None
    p = ops.prepare(w, replace(request, graph=False), inputs=inputs, bias=bias)
    return ops, Bound(p, request, made, target)
