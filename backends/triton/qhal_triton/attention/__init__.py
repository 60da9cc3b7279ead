"""attention: no kernel yet, the portable operation serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.requests import AttentionRequest
from qhal_triton.paths import Path
from qhal_triton.target import Target
from qhal_triton.tiles import Tile


def choose(request: AttentionRequest, target: Target) -> Path | None:
    """The kernel that takes the request; None: no kernel does."""
    return None


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    yield from ()


class TritonBatch(AttentionBatch):
    """The lengths and pages of one step on the device."""

    def __init__(self, request: AttentionRequest, limits: Limits, device: torch.device, path: Path) -> None:
        raise NotImplementedError(path.kernel)

    def plan(
        self, query_lens: Any, kv_lens: Any, page_table: Any, *, kv_lens_device: Any = None, tree: Any = None
    ) -> None:
        """See AttentionBatch."""


def run(batch: TritonBatch, q: Tensor, cache: KVCache, sinks: Any, out: Any, lse: Any) -> Tensor:
    """Attention."""
    raise NotImplementedError
