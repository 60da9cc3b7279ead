"""Products of 16-bit floats with float32 sums and results, by torch."""

from __future__ import annotations

import torch
from torch import Tensor


def float_product(a: Tensor, b: Tensor) -> Tensor:
    """float32 a @ b. Only NVIDIA's torch leaves the result unrounded; elsewhere the operands are widened first."""
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
