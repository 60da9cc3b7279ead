"""vq: no kernel yet, the portable operation serves."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from qhal.requests import VQRequest
from qhal_portable.prepared import PreparedWeight
from qhal_triton.paths import Path
from qhal_triton.target import Target
from qhal_triton.tiles import Tile


def choose(request: VQRequest, target: Target) -> Path | None:
    """The kernel that takes the request; None: no kernel does."""
    return None


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    yield from ()


def run(path: Path, p: PreparedWeight, rows: slice | None, out: Tensor | None) -> Tensor:
    """Dense rows."""
    raise NotImplementedError(path.kernel)
