"""Where results go: into what the caller gave, and the sum of the parts of a product."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qhal_portable.gemm import write
from qhal_triton.gemm.kernels.finish import finish
from qhal_triton.launching import Launcher

_BLOCK = 256
"""Columns of a program of `finish`."""


def place(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, out: Tensor | None) -> Tensor:
    """`out` where a kernel can write the result into it, else a new tensor."""
    fits = isinstance(out, Tensor) and (tuple(out.shape), out.dtype, out.device) == (shape, dtype, device)
    return out if fits and out.stride(1) == 1 else torch.empty(shape, dtype=dtype, device=device)  # type: ignore[union-attr, return-value]


def given(y: Tensor, out: Tensor | None) -> Tensor:
    """The result in `out`, where the kernel may have written it; FormatError if it does not fit."""
    return out if out is not None and y.data_ptr() == out.data_ptr() and y.shape == out.shape else write(y, out)


def finished(part: Tensor, rows: int, width: int, dtype: torch.dtype, out: Tensor | None = None, **more: Any) -> Tensor:
    """[rows, width] of the parts [parts, rows * TOP, N] of a product, see `kernels/finish.py`."""
    y = place((rows, width), dtype, part.device, out)
    asked = {"weights": None, "ids": None, "alpha": 1.0, "limit": 0.0, "shift": 0.0, **more}
    flags = {"TOP": 1, "WEIGHTED": False, "NAME": "", "GATED": False, "LIMITED": False, "PARTS": part.shape[0]}
    flags |= {name: asked.pop(name) for name in list(asked) if name in flags}
    _finishing(**flags)(
        (rows, -(-width // _BLOCK), 1),
        (part, y, asked["weights"], asked["ids"]),
        (part.stride(0), part.shape[2], width, y.stride(0), asked["alpha"], asked["limit"], asked["shift"]),
    )
    return y


@lru_cache(maxsize=256)
def _finishing(**flags: Any) -> Launcher:
    numbers = ("part_stride", "n", "width", "y_row", "alpha", "limit", "shift")
    return Launcher(finish, ("part", "y", "weights", "ids"), numbers, {**flags, "BLOCK": _BLOCK}, num_warps=4)
