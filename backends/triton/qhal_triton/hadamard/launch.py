"""From a chain of rotations to the kernel's tables and arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qhal.named_tables import revision
from qhal.requests import HadamardRequest, NumericsClass
from qhal.rotations import Diagonal, Hadamard, Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_portable.gemm import write as write_plain
from qhal_portable.quantize import write as write_planes
from qhal_triton.hadamard import mixing
from qhal_triton.hadamard.config import Chip, Plan, plan
from qhal_triton.hadamard.kernels.rotate import rotate_kernel
from qhal_triton.hadamard.mixing import MixPath
from qhal_triton.launching import Launcher
from qhal_triton.paths import Path
from qhal_triton.quantize import Recipe, empty, matrix, recipe, takes
from qhal_triton.target import Target


@dataclass(frozen=True, kw_only=True)
class RotationPath(Path):
    """A path, how its transform is cut, and the constants of a quantization in the same pass (None: a pass of its own).

    block      features of one scale
    launchers  of the kernel by what stands before and after the transform, and whether it quantizes
    """

    plan: Plan
    recipe: Recipe | None = None
    block: int = 0
    launchers: dict[tuple[bool, bool, bool], Launcher] = field(default_factory=dict, compare=False, repr=False)


def choose(request: HadamardRequest, target: Target) -> RotationPath | MixPath | None:
    """The kernel that takes the request: the one pass of `rotated`, else factor by factor."""
    return rotated(request, target) or mixing.choose(request)


def rotated(request: HadamardRequest, target: Target) -> RotationPath | None:
    """The path of one Hadamard transform of 16-bit features, with a diagonal before or after it."""
    names = tuple(kind[0] for kind in request.kinds)
    if names not in _SHAPES or request.x not in (torch.bfloat16, torch.float16):
        return None
    order, k = (int(str(size)) for size in request.kinds[names.index("hadamard")][1:3])
    found = plan(order, k, names[0] == "diagonal", Chip.of(target))
    if found is None:
        return None
    how, block = _fused(request, found, target)
    steps = "two products with signs" if found.left else "one product with signs"
    passes = "" if request.quantize is None else ", quantized in the same pass" if how else ", then quantized"
    return RotationPath(
        kernel="rotate",
        executes=f"Triton: {steps} on matrix instructions, fp32 sums kept to 24 bits between them{passes}",
        numerics=NumericsClass.FP32_ACC,
        plan=found,
        recipe=how,
        block=block,
    )


_SHAPES = (
    ("hadamard",),
    ("diagonal", "hadamard"),
    ("hadamard", "diagonal"),
    ("diagonal", "hadamard", "diagonal"),
)


def _fused(request: HadamardRequest, p: Plan, target: Target) -> tuple[Recipe | None, int]:
    """Constants and features of a scale, where whole scales lie in a tile."""
    f = request.quantize
    if f is None or f.block is None or p.used != p.rows or p.width != p.columns or not Chip.of(target).fused:
        return None, 0
    size = request.n if f.block.kind == "row" else f.block.cols if f.block.kind == "group" else 0
    tile = p.rows * p.columns
    if size < 1 or size & (size - 1) or size > tile or request.n % size:
        return None, 0
    found = recipe(f, request.x, static=False, target=target)
    return (None, 0) if found is None or found.outer is not None else (found, size)


def fits(path: Path, x: Tensor, chain: Sequence[Rotation], device: torch.device) -> bool:
    """Whether these arguments are what the kernel takes; errors are left to the portable operation."""
    return x.device == device and bool(x.numel()) and x.dim() > 0 and matrix(_rows(x)) is not None


def _rows(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 1 else x


def run(
    path: Path, ops: Any, x: Tensor, chain: Sequence[Rotation], to: Operand | None, for_: Any, out: Any
) -> Tensor | QTensor:
    """The chain applied, and quantized if asked."""
    assert isinstance(path, RotationPath | MixPath)
    x = x.detach()
    if to is None:
        direct = isinstance(out, Tensor) and (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
        y = out if direct and matrix(_rows(out)) is not None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _apply(path, x, chain, y)
        return y if y is out else write_plain(y, out)
    if (
        isinstance(path, MixPath)
        or path.recipe is None
        or to.static
        or to.zero is not None
        or to.clipped
        or to.per_expert
        or x.dim() < 2
    ):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _apply(path, x, chain, y)
        quantized: QTensor = ops.quantize(y, to, for_=for_, out=out)
        return quantized
    if for_ is not None:
        ops._weight(for_)
    made = empty(path.recipe, x, to)
    target = out if out is not None and takes(out, made) else made
    _launch(path, x, chain, target, fused=True)
    return target if out is None or target is out else write_planes(made, out)


def _apply(path: RotationPath | MixPath, x: Tensor, chain: Sequence[Rotation], y: Tensor) -> None:
    if isinstance(path, RotationPath):
        _launch(path, x, chain, y, fused=False)
        return
    source, target = matrix(_rows(x)), matrix(_rows(y))
    assert source is not None and target is not None
    mixing.apply(path, source, chain, target)


def _launch(path: RotationPath, x: Tensor, chain: Sequence[Rotation], y: Tensor | QTensor, *, fused: bool) -> None:
    p, source = path.plan, matrix(_rows(x))
    assert source is not None
    rows, n = source.shape
    at = next(i for i, r in enumerate(chain) if isinstance(r, Hadamard))
    turn = chain[at]
    assert isinstance(turn, Hadamard)
    before, after = (
        [r.values.to(x.device, torch.float32).reshape(-1) for r in part if isinstance(r, Diagonal)]
        for part in (chain[:at], chain[at + 1 :])
    )
    left, right = _tables(turn, p, x.dtype, bool(before), x.device, revision())
    target: Any
    scale: Any
    zero: Any
    if isinstance(y, QTensor):
        codes = y.codes.view(torch.uint8) if y.codes.element_size() == 1 else y.codes
        scale, zero = y.scale, y.zero if y.zero is not None else y.scale
        target, ystride = codes, n
    else:
        target = scale = zero = y
        written = matrix(_rows(y))
        assert written is not None
        ystride = written.stride(0) if rows > 1 else n
    units, across = rows * (n // p.width), n // p.width
    tiles = -(-units // p.used)
    _launcher(path, bool(before), bool(after), fused)(
        (min(tiles, p.programs), 1, 1),
        (source, target, scale, zero, left, right, before[0] if before else right, after[0] if after else right),
        (units, across, tiles, source.stride(0) if rows > 1 else n, ystride),
    )


def _launcher(path: RotationPath, before: bool, after: bool, fused: bool) -> Launcher:
    found = path.launchers.get((before, after, fused))
    if found is None:
        p = path.plan
        fixed = {"factor": 1.0 / math.sqrt(p.order), **constants(p, before, after, path if fused else None)}
        options = {"num_warps": p.warps, "num_stages": p.stages, "enable_fp_fusion": False}
        found = path.launchers[before, after, fused] = Launcher(rotate_kernel, _TENSORS, _NUMBERS, fixed, **options)
    return found


_TENSORS = ("x", "y", "scale", "zero", "left", "right", "before", "after")
_NUMBERS = ("units", "across", "tiles", "stride", "ystride")
"""Of a call: the kernel's names."""


def constants(p: Plan, before: bool, after: bool, fused: RotationPath | None) -> dict[str, Any]:
    """The kernel's constants. LIFT keeps the sums of the left product below 2^15, those of one product in fp32."""
    return {
        "M": p.rows,
        "B": p.columns,
        "USED": p.used,
        "WIDTH": p.width,
        "GROUP": p.group,
        "LIFT": 268 - (p.rows - 1).bit_length() if p.left else 268 if before else (p.order - 1).bit_length(),
        "LEFT": p.left,
        "BEFORE": before,
        "AFTER": after,
        "BLOCK": fused.block if fused else 1,
        "F": fused.recipe if fused else None,
    }


@lru_cache(maxsize=256)
def _tables(
    turn: Hadamard, p: Plan, dtype: torch.dtype, split: bool, device: torch.device, named: int
) -> tuple[Tensor, Tensor]:
    """The factors with entries 1, -1 and, between transforms and past their ends, 0: left [rows, rows], right.

    In the type of the operand that they meet: the features' own, fp16 for numbers in two parts. named: the revision
    of the tables that have names.
    """
    first = torch.float16 if split else dtype
    whole = torch.device("cpu")
    if not p.left:
        right = _padded(_signs(turn, turn.n), p.columns)
        return right.to(device, first), right.to(device, first)
    small = Hadamard(p.group, turn.k, turn.table, turn.transpose)
    block = _signs(small, p.group).T.contiguous()  # y = left @ X, not X @ left
    left = _padded(torch.kron(torch.eye(p.used // p.group, device=whole), block), p.rows)
    right = _padded(_signs(Hadamard(p.width), p.width), p.columns)
    return left.to(device, first), right.to(device, torch.float16)


def _signs(turn: Hadamard, n: int) -> Tensor:
    return turn.matrix(n).sign().float()


def _padded(m: Tensor, size: int) -> Tensor:
    wide = torch.zeros(size, size, device="cpu")
    wide[: m.shape[0], : m.shape[1]] = m
    return wide
