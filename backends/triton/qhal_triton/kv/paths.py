"""Which caches the kernel writes, and how each row is quantized."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from qhal.blocks import Block
from qhal.formats import Format
from qhal.requests import KVRequest, NumericsClass
from qhal.rules import Rule
from qhal_triton.kv.rows import Row, row_of
from qhal_triton.paths import Path
from qhal_triton.quantize.recipe import Recipe, recipe
from qhal_triton.target import Target


class Encoding(NamedTuple):
    """A row and the constants of its quantization; None: a wide float, only rounded."""

    row: Row
    recipe: Recipe | None


def choose(request: KVRequest, target: Target) -> Path | None:
    """The kernel that takes the request; None: no kernel does."""
    pairs = ((request.k, request.k_dim), (request.v, request.v_dim))
    if any(encoding(f, dim, torch.float32, target) is None for f, dim in pairs):
        return None
    return Path(
        kernel="write",
        executes="Triton: scales, codes and their way to the slots in one kernel, the bits of qhal.encoding",
        numerics=NumericsClass.EXACT,
        invariant=True,
    )


@lru_cache(maxsize=4096)
def encoding(f: Format, dim: int, x: torch.dtype, target: Target) -> Encoding | None:
    """How rows of `dim` numbers of type x become format `f`; None where only the portable code does."""
    row = row_of(f, dim)
    if row is None:
        return None
    if not row.kind:
        return Encoding(row, None) if row.wide and f.rule == Rule() else None
    # static scales of heads and columns are used as that of a tensor is
    one = replace(f, block=Block("tensor")) if row.static else f
    found = recipe(one, x, static=row.static or row.outer, target=target)
    return None if found is None else Encoding(row, found)
