"""kv: no kernel yet, the portable operation serves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.requests import KVRequest
from qhal_triton.paths import Path
from qhal_triton.target import Target
from qhal_triton.tiles import Tile


def choose(request: KVRequest, target: Target) -> Path | None:
    """The kernel that takes the request; None: no kernel does."""
    return None


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    yield from ()


def run(path: Path, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor, device: torch.device) -> None:
    """Rows quantized and written."""
    raise NotImplementedError(path.kernel)
