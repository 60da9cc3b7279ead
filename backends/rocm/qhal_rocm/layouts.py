"""Layouts that AMD's library kernels (AITER) read: bijections of the canonical tensors, each with its inverse.

Source: ROCm/aiter, `aiter/ops/shuffle.py` (shuffle_weight), `aiter/utility/fp4_utils.py` (e8m0_shuffle), read 2026-08.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhal.errors import FormatError

ROWS, BYTES = 16, 16
"""Rows of a tile of weights, and bytes of a row that one lane loads at once."""


def shuffled(w: Tensor) -> Tensor:
    """w [N, K] of 1-byte codes (or two 4-bit codes to a byte) in tiles of 16 rows and 32 bytes; the shape stays.

    Within a tile the 16 bytes of a lane lie together, then the 16 rows, then the two halves of the columns.
    N % 16 == 0, K % 32 == 0, else FormatError.
    """
    n, k = _tiled(w)
    parts = w.reshape(n // ROWS, ROWS, k // (2 * BYTES), 2, BYTES)
    return parts.permute(0, 2, 3, 1, 4).contiguous().reshape(n, k)


def unshuffled(w: Tensor) -> Tensor:
    """The inverse of `shuffled`."""
    n, k = _tiled(w)
    parts = w.reshape(n // ROWS, k // (2 * BYTES), 2, ROWS, BYTES)
    return parts.permute(0, 3, 1, 2, 4).contiguous().reshape(n, k)


def swizzled(scale: Tensor) -> Tensor:
    """e8m0 scales [rows, K / 32] as the MXFP4 assembly kernels read them; rows % 32 == 0, columns % 8 == 0."""
    rows, cols = _scales(scale)
    parts = scale.reshape(rows // 32, 2, 16, cols // 8, 2, 4)
    return parts.permute(0, 3, 5, 2, 4, 1).contiguous().reshape(rows, cols)


def unswizzled(scale: Tensor) -> Tensor:
    """The inverse of `swizzled`."""
    rows, cols = _scales(scale)
    parts = scale.reshape(rows // 32, cols // 8, 4, 16, 2, 2)
    return parts.permute(0, 5, 3, 1, 4, 2).contiguous().reshape(rows, cols)


def _tiled(w: Tensor) -> tuple[int, int]:
    if w.dim() != 2 or w.element_size() != 1 or w.shape[0] % ROWS or w.shape[1] % (2 * BYTES):
        raise FormatError(f"{w.dtype} {tuple(w.shape)}: the tiled layout needs bytes [N, K], N % 16 = K % 32 = 0")
    return w.shape[0], w.shape[1]


def _scales(scale: Tensor) -> tuple[int, int]:
    if scale.dim() != 2 or scale.dtype != torch.uint8 or scale.shape[0] % 32 or scale.shape[1] % 8:
        raise FormatError(
            f"scales {scale.dtype} {tuple(scale.shape)}: the swizzled layout needs uint8 [rows, K / 32], "
            "rows % 32 = 0, K % 256 = 0"
        )
    return scale.shape[0], scale.shape[1]
