"""quantize: no kernel yet, the portable operation serves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qhal.requests import QuantizeRequest
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_triton.paths import Path
from qhal_triton.target import Target
from qhal_triton.tiles import Tile


def choose(request: QuantizeRequest, target: Target) -> Path | None:
    """The kernel that takes the request; None: no kernel does."""
    return None


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    yield from ()


def fits(path: Path, x: Tensor, to: Operand, device: torch.device) -> bool:
    """Whether these arguments are what the kernel takes; errors are left to the portable operation."""
    raise NotImplementedError(path.kernel)


def run(path: Path, x: Tensor, to: Operand, out: QTensor | None) -> QTensor:
    """Codes and scales."""
    raise NotImplementedError(path.kernel)
