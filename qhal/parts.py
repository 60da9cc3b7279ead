"""A tensor some rows at a time: whole blocks, so few that what is made of them stays in the processor's cache.

The temporaries of one large tensor would take several times its memory, and the time to get it from the system.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qhal.blocks import Block

PART = 1 << 17
"""Elements of a part for each thread: 512 KiB in float32, half of a usual second-level cache."""

Place = tuple[slice, slice, slice] | None
"""Leading indices and rows of a part of a tensor [L, N, K], and the rows of its blocks' grid; None: all of it."""


def parts(x: Tensor, block: Block) -> Iterator[tuple[Tensor, Place]]:
    """x [..., N, K] as parts [l, n, K] and their places. Of a block that spans rows or leading axes, parts have a part.

    A device gets one part, since launches cost it more; so do flat blocks, that may straddle rows.
    """
    if not x.numel():
        return
    x = stacked(x)
    lead, n, k = x.shape
    size = PART * torch.get_num_threads() if x.is_cpu and block.kind != "flat" else x.numel()
    if x.numel() <= size:
        yield x, None
        return
    leads = max(size // (n * k), 1)
    rows = n if n * k <= size else max(size // k // block.rows, 1) * block.rows
    for first in range(0, lead, leads):
        for row in range(0, n, rows):
            cut = slice(first, first + leads), slice(row, row + rows)
            yield x[cut], (*cut, slice(row // block.rows, -(-(row + rows) // block.rows)))


def at(grid: Tensor, place: Place) -> Tensor:
    """The part of a grid [L or 1, rows or 1, cols]; an axis of one serves every part."""
    if place is None:
        return grid
    leads, _, rows = place
    grid = grid[leads] if grid.shape[0] > 1 else grid
    return grid[:, rows] if grid.shape[1] > 1 else grid


def stacked(x: Tensor) -> Tensor:
    """[..., N, K] with all leading axes in one: [L, N, K]."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
