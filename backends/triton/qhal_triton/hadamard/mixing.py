"""Chains that the one-pass kernel does not take: matrix by matrix, fp32 between them, rounded once at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qhal.named_tables import revision
from qhal.requests import HadamardRequest, NumericsClass
from qhal.rotations import Dense, Diagonal, Hadamard, Kronecker, Permutation, Rotation
from qhal_triton.hadamard.kernels.mix import left_kernel, right_kernel, scale_kernel
from qhal_triton.paths import Path

WIDTH = 128
"""Features of the right factor of a Hadamard transform; its left factor is all the rest."""
SCALED = 1024
"""Features of a program that only scales."""
RIGHT = {"BM": 32, "BN": 64, "BK": 32}
LEFT = {"BM": 32, "BN": 32, "BK": 32}
"""Tiles of the results; a wider one from the left spills on NVIDIA's chips."""
WARPS = 4


@dataclass(frozen=True, kw_only=True)
class MixPath(Path):
    """A chain as steps, see `steps`."""

    steps: tuple[tuple[int | None, int | None, int | None], ...]


def choose(request: HadamardRequest) -> MixPath | None:
    """The kernels that take the request; None: a chain that does nothing, or on a type that is no wide float."""
    names = [str(kind[0]) for kind in request.kinds]
    if not names or ("kronecker", 0, 0) in request.kinds:
        return None
    found = steps(names)
    passes = f"{len(found)} passes" if len(found) > 1 else "one pass"
    return MixPath(
        kernel="mix",
        executes=f"Triton: factor by factor in fp32, {passes}" + ", then quantized" * (request.quantize is not None),
        numerics=NumericsClass.FP32_ACC,
        graph="permutation" not in names,  # whether it is one is read on the host
        steps=found,
    )


def steps(names: Sequence[str]) -> tuple[tuple[int | None, int | None, int | None], ...]:
    """(diagonal before, matrix, diagonal after) by index in the chain; None for what a step lacks.

    >>> steps(["diagonal", "dense", "diagonal", "diagonal", "permutation"])
    ((0, 1, 2), (3, None, None), (None, 4, None))
    """
    found: list[tuple[int | None, int | None, int | None]] = []
    at = 0
    while at < len(names):
        before = at if names[at] == "diagonal" else None
        core = at if before is None else at + 1
        if before is not None and (core == len(names) or names[core] in ("diagonal", "permutation")):
            found.append((before, None, None))
            at += 1
            continue
        after = core + 1 if names[core] != "permutation" and names[core + 1 : core + 2] == ["diagonal"] else None
        found.append((before, core, after))
        at = core + 1 if after is None else after + 1
    return tuple(found)


def apply(path: MixPath, x: Tensor, chain: Sequence[Rotation], y: Tensor) -> None:
    """x [rows, n] through the chain into y, both with neighbouring features beside each other."""
    for number, step in enumerate(path.steps):
        last = number == len(path.steps) - 1
        out = y if last else torch.empty(x.shape, dtype=torch.float32, device=x.device)
        _step(x, out, *(None if i is None else chain[i] for i in step))
        x = out


def _step(x: Tensor, y: Tensor, before: Rotation | None, core: Rotation | None, after: Rotation | None) -> None:
    rows, n = x.shape
    if core is None:
        assert isinstance(before, Diagonal)
        grid = (rows, -(-n // SCALED))
        scale_kernel[grid](x, y, _vector(before, x), n, x.stride(0), y.stride(0), BLOCK=SCALED)
        return
    if isinstance(core, Permutation):
        torch.index_select(x.to(y.dtype), 1, core.checked().to(x.device), out=y)
        return
    left, right, unit, factor = _factors(core, n, x.device)
    first = left is None or right is None
    if right is not None:
        middle = y if left is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
        width = right.shape[0]
        units = rows * (n // width)
        grid = (-(-units // RIGHT["BM"]), -(-width // RIGHT["BN"]))
        _launch(
            right_kernel, RIGHT, grid, x, middle, right, before, after if first else None, factor if first else 1.0,
            units, n // width, width,
        )  # fmt: skip
        x, before = middle, None
    if left is not None:
        height, width = left.shape[0], unit // left.shape[0]
        across = n // unit
        shape = (rows * across, -(-height // LEFT["BM"]), -(-width // LEFT["BN"]))
        _launch(left_kernel, LEFT, shape, x, y, left, before, after, factor, across, height, width)


def _launch(
    kernel: Any, tile: dict[str, int], grid: tuple[int, ...], x: Tensor, y: Tensor, table: Tensor,
    before: Rotation | None, after: Rotation | None, factor: float, *sizes: int,
) -> None:  # fmt: skip
    around = [None if d is None else _vector(d, x) for d in (before, after)]
    kernel[grid](
        x, y, table, *around, factor, *sizes, x.stride(0), y.stride(0),
        BEFORE=before is not None, AFTER=after is not None, **tile, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _vector(d: Rotation, x: Tensor) -> Tensor:
    assert isinstance(d, Diagonal)
    return _single(d.values, x.device).reshape(-1)


def _single(t: Tensor, device: torch.device) -> Tensor:
    """On the device, contiguous, in a type that kernels read exactly or in fp32."""
    return t.detach().to(device, torch.float32 if t.dtype == torch.float64 else t.dtype).contiguous()


def _factors(core: Rotation, n: int, device: torch.device) -> tuple[Tensor | None, Tensor | None, int, float]:
    """(left, right, features of a unit, factor): X -> left^T @ X @ right * factor for a unit seen as a matrix."""
    if isinstance(core, Dense):
        return None, _single(core.block, device), core.block.shape[0], 1.0
    if isinstance(core, Kronecker):
        left, right = (None if m is None else _single(m, device) for m in (core.left, core.right))
        return left, right, n, 1.0
    assert isinstance(core, Hadamard)
    left, right = _signs(core, device, revision())
    return left, right, core.n, 1.0 / math.sqrt(core.n)


@lru_cache(maxsize=64)
def _signs(turn: Hadamard, device: torch.device, named: int) -> tuple[Tensor | None, Tensor | None]:
    """The factors of a transform, of 1 and -1. named: the revision of the tables that have names."""
    width = min(turn.n // turn.k, WIDTH)
    group = turn.n // width
    left = None if group == 1 else _matrix(Hadamard(group, turn.k, turn.table, turn.transpose), device)
    return left, None if width == 1 else _matrix(Hadamard(width), device)


def _matrix(turn: Hadamard, device: torch.device) -> Tensor:
    return turn.matrix(turn.n).sign().float().contiguous().to(device)
