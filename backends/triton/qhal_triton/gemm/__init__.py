"""gemm: no kernel yet, the portable operation serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qhal.requests import GemmRequest
from qhal_portable.prepared import PreparedWeight, Run
from qhal_triton.paths import Path
from qhal_triton.target import Target
from qhal_triton.tiles import Tile


def choose(request: GemmRequest, target: Target) -> Path | None:
    """The kernel that takes the request; None: no kernel does."""
    return None


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    yield from ()


def bind(path: Path, ops: Any, p: PreparedWeight) -> Run:
    """The product of one weight with everything bound: the body of `gemm`."""
    raise NotImplementedError(path.kernel)
