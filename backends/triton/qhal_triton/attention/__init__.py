"""attention: paged attention over every cache that `kv` writes, from codes that are decoded in registers."""

from __future__ import annotations

import torch

from qhal.caches import Limits
from qhal.requests import AttentionRequest
from qhal_triton.attention.batch import TritonBatch
from qhal_triton.attention.config import config
from qhal_triton.attention.launch import run
from qhal_triton.attention.paths import arithmetic, choose
from qhal_triton.attention.tiles import tiles
from qhal_triton.target import Target

__all__ = ["TritonBatch", "batch", "choose", "run", "tiles"]


def batch(request: AttentionRequest, limits: Limits, device: torch.device, target: Target) -> TritonBatch:
    """Buffers and workspace of a request that `choose` has a kernel for."""
    found = arithmetic(request)
    assert found is not None
    return TritonBatch(request, limits, device, target, found, config(request, found, limits, target))
