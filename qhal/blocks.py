"""Block: which elements of a tensor share one scale, and the grid of scales that follows from it.

A tensor is [..., N, K]; its grid is [..., rows, cols] with one value per block. A last block may be short: the grid is
ceil(n / k). Leading axes (experts, tokens) of a grid are those of the tensor, or 1 where one value serves all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qhal.errors import FormatError


@dataclass(frozen=True)
class Block:
    """The elements that share one scale. kind: tensor | row | col | head | group (1 x cols) | tile | flat."""

    kind: str
    rows: int = 1
    cols: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("tensor", "row", "col", "head", "group", "tile", "flat"):
            raise FormatError(f"unknown block {self.kind!r}; known: tensor, row, col, head, g<k>, <n>x<k>, flat<k>")
        if self.rows < 1 or self.cols < 1:
            raise FormatError(f"block {self}: sizes must be at least 1")
        if self.kind == "tile" and self.rows == 1:  # 1xk is g<k>: one value, one name
            object.__setattr__(self, "kind", "group")

    def __str__(self) -> str:
        if self.kind == "group":
            return f"g{self.cols}"
        if self.kind == "tile":
            return f"{self.rows}x{self.cols}"
        return f"flat{self.cols}" if self.kind == "flat" else self.kind

    @property
    def elements(self) -> float:
        """How many elements share one value; infinity where the shape decides."""
        return float(self.rows * self.cols) if self.kind in ("group", "tile", "flat") else float("inf")

    def grid(self, n: int, k: int) -> tuple[int, int]:
        """Rows and columns of the grid over an [n, k] tensor."""
        if self.kind in ("row", "head"):
            return n, 1
        if self.kind == "col":
            return 1, k
        if self.kind in ("group", "tile"):
            return -(-n // self.rows), -(-k // self.cols)
        return (1, -(-n * k // self.cols)) if self.kind == "flat" else (1, 1)

    def expand(self, plane: Tensor, shape: Sequence[int]) -> Tensor:
        """Broadcast one value per block, [..., grid], to every element of a [..., N, K] tensor."""
        n, k = shape[-2], shape[-1]
        if self.kind == "flat":
            per_element = plane.flatten(-2).repeat_interleave(self.cols, -1)[..., : n * k]
            return per_element.reshape(*per_element.shape[:-1], n, k).expand(*shape)
        if self.kind in ("group", "tile"):
            if self.rows > 1:
                plane = plane.repeat_interleave(self.rows, -2)[..., :n, :]
            plane = plane.repeat_interleave(self.cols, -1)[..., :k]
        return plane.expand(*shape)

    def split(self, x: Tensor) -> Tensor:
        """View [..., N, K] as [..., rows, cols, elements]: one block along the last axis, short blocks padded with 0.

        Zero padding is the contract: it never changes an amax, and `minmax` always includes 0. `tensor` and `head`
        blocks span leading axes too (a cache's tokens, an activation's tokens); their leading grid is 1.
        """
        n, k = x.shape[-2], x.shape[-1]
        if self.kind == "tensor":
            return x.reshape(*([1] * (x.dim() - 2)), 1, 1, -1)
        if self.kind == "head":
            lead = x.movedim(-2, 0).flatten(1)  # not reshape(-1): there may be no element
            return lead.reshape(*([1] * (x.dim() - 2)), n, 1, lead.shape[-1])
        if self.kind == "row":
            return x.unsqueeze(-2)
        if self.kind == "col":
            return x.flatten(0, -2).t().reshape(*([1] * (x.dim() - 2)), 1, k, x.shape[:-1].numel())
        if self.kind == "flat":
            padded = torch.nn.functional.pad(x.flatten(-2), (0, -(n * k) % self.cols))
            return padded.reshape(*x.shape[:-2], 1, -1, self.cols)
        rows, cols = self.grid(n, k)
        padded = torch.nn.functional.pad(x, (0, -k % self.cols, 0, -n % self.rows))
        tiles = padded.reshape(*x.shape[:-2], rows, self.rows, cols, self.cols)
        return tiles.movedim(-3, -2).flatten(-2)
