"""grouped: no kernel yet, the portable operation serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from qhal.groups import Groups
from qhal.requests import GroupedRequest
from qhal.tensors import QTensor
from qhal_portable.prepared import PreparedWeight
from qhal_triton.paths import Path
from qhal_triton.target import Target
from qhal_triton.tiles import Tile


def choose(request: GroupedRequest, target: Target) -> Path | None:
    """The kernel that takes the request; None: no kernel does."""
    return None


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    yield from ()


def run(path: Path, ops: Any, x: Any, p: PreparedWeight, groups: Groups, out: Any) -> Tensor | QTensor:
    """The grouped product."""
    raise NotImplementedError(path.kernel)
