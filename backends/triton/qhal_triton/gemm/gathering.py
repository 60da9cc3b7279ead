"""Rows of x in the column order of an act-order weight that was sorted by group: one launch before its product."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qhal.requests import GemmRequest
from qhal.tensors import QTensor
from qhal_portable.gemm import accept
from qhal_portable.prepared import ORDER, PreparedWeight, Run
from qhal_triton.gemm.kernels.gather import gather
from qhal_triton.launching import Launcher

_BLOCK = 1024
"""Columns of a program."""


def gathering(run: Run, request: GemmRequest, p: PreparedWeight) -> Run:
    """`run` for x whose columns stand as they did before the weight's were moved."""
    order = p.made[ORDER]

    def moved(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        if isinstance(x, Tensor):
            accept(x, request, p.device)
            x = gathered(x.detach(), order)
        return run(x, index, out)

    return moved


def gathered(x: Tensor, order: Tensor) -> Tensor:
    """[T, K]: column j is column order[j] of x [T, K], whose rows may be apart."""
    rows, k = x.shape
    y = torch.empty(rows, k, dtype=x.dtype, device=x.device)
    if y.numel():
        _gathering()((rows, -(-k // _BLOCK), 1), (x, order, y), (k, x.stride(0)))
    return y


@lru_cache(maxsize=1)
def _gathering() -> Launcher:
    return Launcher(gather, ("x", "order", "y"), ("k", "x_row"), {"BLOCK": _BLOCK})
