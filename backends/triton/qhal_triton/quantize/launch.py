"""From tensors to the kernels' arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qhal.elements import WIDE, element
from qhal.formats import Format
from qhal.requests import NumericsClass, QuantizeRequest
from qhal.rounding import to_plane
from qhal.specs import Operand
from qhal.tensors import QTensor, unchecked
from qhal_portable.quantize import write
from qhal_triton.launching import Launcher
from qhal_triton.paths import Path
from qhal_triton.quantize.config import CHUNK, LONGEST, PARTS, config
from qhal_triton.quantize.kernels.grids import block_kernel, long_kernel, part_kernel, tensor_kernel
from qhal_triton.quantize.recipe import Recipe, recipe
from qhal_triton.target import Target

_MOST = 256
"""Shapes that a path remembers; they start anew beyond."""


@dataclass(frozen=True, kw_only=True)
class QuantizePath(Path):
    """A path and the constants of its kernel.

    steps      the launches for one shape and clip
    launchers  by kernel and sizes of its programs
    """

    recipe: Recipe
    target: Target
    steps: dict[tuple[Any, ...], list[Step]] = field(default_factory=dict, compare=False, repr=False)
    launchers: dict[tuple[Any, ...], Launcher] = field(default_factory=dict, compare=False, repr=False)


def choose(request: QuantizeRequest, target: Target) -> QuantizePath | None:
    """The kernel that takes the request; None: no kernel does."""
    found = recipe(request.format, request.x, static=request.static, target=target)
    block = request.format.block
    if found is None or block is None or request.layout != "canonical":
        return None
    if block.kind in ("group", "tile") and block.elements > LONGEST:
        return None
    whole = block.kind == "tensor" or found.outer is not None  # something is shared by all blocks
    passes = "two passes" if whole and not request.static else "one pass"
    return QuantizePath(
        kernel="quantize",
        executes=f"Triton: scales and codes in {passes}, the bits of qhal.encoding",
        numerics=NumericsClass.EXACT,
        invariant=block.kind in ("row", "group") and found.outer is None,
        recipe=found,
        target=target,
    )


def fits(path: Path, x: Tensor, to: Operand, device: torch.device) -> bool:
    """Whether these arguments are what the kernel takes; errors are left to the portable operation."""
    assert isinstance(path, QuantizePath)
    if x.dim() < 2 or x.device != device or to.per_expert:
        return False
    block = to.format.block
    assert block is not None
    size, f = x.numel(), path.recipe
    if not size and (block.kind == "tensor" or f.outer is not None or not x.shape[-1]):
        return False  # there is a scale of nothing
    if size >= 1 << 31 or (size and matrix(x) is None):
        return False  # places within a tensor are 32-bit numbers
    if block.kind == "tile" and x.dim() > 2 and x.shape[:-2].numel() > 1 and x.shape[-2] % block.rows:
        return False
    return _given(to.scale, f.static, device) and _given(to.zero, f.zero == "given", device)


def _given(plane: Tensor | None, wanted: bool, device: torch.device) -> bool:
    """Whether a number is given just where it is wanted, as one that a kernel reads."""
    if plane is None or not wanted:
        return plane is None and not wanted
    return plane.numel() == 1 and plane.device == device and plane.dtype in WIDE.values()


def matrix(x: Tensor) -> Tensor | None:
    """x [..., T, K] as [rows, K] without a copy, rows at one stride and columns beside each other; None: needs one."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    if x.dim() == 2:
        return x
    if x.is_contiguous():
        return x.reshape(-1, x.shape[-1])
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return None


def run(path: Path, x: Tensor, to: Operand, out: QTensor | None) -> QTensor:
    """Codes and scales."""
    assert isinstance(path, QuantizePath)
    f = path.recipe
    if to.clipped:
        found = recipe(to.format, x.dtype, static=f.static, target=path.target, clipped=True)
        assert found is not None
        f = found
    made = empty(f, x, to)
    target = made
    if out is not None and takes(out, made):
        target = out
        for plane, given in ((_outermost(out.scale), to.scale), (out.zero, to.zero)):
            if given is not None and isinstance(plane, Tensor):
                plane.copy_(given.reshape(plane.shape))
    if x.numel():
        rows = matrix(x)
        assert rows is not None
        _launch(path, f, rows, to, target)
    return target if out is None or target is out else write(made, out)


def empty(f: Recipe, x: Tensor, to: Operand) -> QTensor:
    """The planes of the result, given ones as they are."""
    fmt, device = to.format, x.device
    kinds, grid, ones = _planes_of(fmt, x.shape)
    codes = torch.empty(x.shape, dtype=kinds["codes"], device=device)
    scale: Tensor | QTensor
    if f.outer is not None:
        assert fmt.scale is not None
        outer = torch.empty(ones, dtype=kinds["outer"], device=device) if to.scale is None else to.scale.reshape(ones)
        scale = unchecked(fmt.scale, torch.empty(grid, dtype=kinds["scale"], device=device), outer)
    elif to.scale is None:
        scale = torch.empty(grid, dtype=kinds["scale"], device=device)
    else:
        scale = to.scale.reshape(ones)
    zero = None
    if fmt.zero is not None:
        own = None if to.zero is None else _zero_plane(to.zero.reshape(ones), fmt.zero)
        zero = torch.empty(grid, dtype=kinds["zero"], device=device) if own is None else own
    if to.static:
        return QTensor(fmt, codes, scale, zero)
    return unchecked(fmt, codes, scale, zero)


@lru_cache(maxsize=4096)
def _planes_of(fmt: Format, shape: torch.Size) -> tuple[dict[str, torch.dtype], tuple[int, ...], tuple[int, ...]]:
    """Types of the planes of a tensor of that shape, the shape of its scales, and that of one number."""
    block = fmt.block
    assert block is not None and fmt.scale is not None
    lead = shape[:-2]
    grid = (*((1,) * len(lead) if block.kind == "tensor" else lead), *block.grid(*shape[-2:]))
    found = {"codes": fmt, "scale": fmt.scale, "outer": fmt.scale.scale, "zero": fmt.zero}
    kinds = {name: element(f.element).storage for name, f in found.items() if f is not None}
    return kinds, grid, (1,) * len(shape)


def _outermost(scale: Tensor | QTensor | None) -> Tensor | QTensor | None:
    return scale.scale if isinstance(scale, QTensor) else scale


def _zero_plane(value: Tensor, fmt: Format) -> Tensor:
    return to_plane(value, element(fmt.element))


def takes(out: QTensor, made: QTensor) -> bool:
    """Whether the kernel can write into the planes of `out`."""
    ours, theirs = made.planes(), out.planes()
    return (
        out.format == made.format
        and out.layout == made.layout
        and ours.keys() == theirs.keys()
        and all(
            (theirs[name].shape, theirs[name].dtype, theirs[name].device) == (p.shape, p.dtype, p.device)
            and theirs[name].is_contiguous()
            for name, p in ours.items()
        )
    )


def _launch(path: QuantizePath, f: Recipe, x: Tensor, to: Operand, q: QTensor) -> None:
    rows, cols = x.shape
    two = isinstance(q.scale, QTensor)
    scale, outer = (_bytes(q.scale.codes), q.scale.scale) if two else (q.scale, q.scale)  # type: ignore[union-attr]
    planes: dict[str, Any] = {"x": x, "codes": _bytes(q.codes), "scale": scale, "outer": outer, "parts": x}
    planes["zero"] = scale if q.zero is None else q.zero
    key = (rows, cols, x.stride(0) if rows > 1 else cols, to.clip)
    steps = path.steps.get(key)
    if steps is None:
        if len(path.steps) >= _MOST:
            path.steps.clear()
        steps = path.steps[key] = _steps(path, f, to, *key[:3])
    for step in steps:
        if step.parts:
            planes["parts"] = torch.empty(step.parts, dtype=torch.int32, device=x.device)
        step.start(step.grid, [planes[name] for name in step.tensors], step.numbers)


class Step(NamedTuple):
    """One launch for matrices of one shape. parts: numbers of a buffer that it fills for the next one."""

    start: Launcher
    grid: tuple[int, int, int]
    tensors: tuple[str, ...]
    numbers: tuple[int | float, ...]
    parts: int = 0


def _steps(path: QuantizePath, f: Recipe, to: Operand, rows: int, cols: int, stride: int) -> list[Step]:
    """The launches for x [rows, cols]."""
    block, kept = to.format.block, to.clip
    assert block is not None

    def step(
        kernel: Any, programs: int, tensors: tuple[str, ...], given: dict[str, int | float],
        constants: dict[str, int], warps: int = 8, parts: int = 0,
    ) -> Step:  # fmt: skip
        key = (kernel, *constants.values(), warps, to.clipped)
        start = path.launchers.get(key)
        if start is None:
            options = {"num_warps": warps, "enable_fp_fusion": False}  # bits are the contract
            start = path.launchers[key] = Launcher(kernel, tensors, tuple(given), {**constants, "F": f}, **options)
        return Step(start, (programs, 1, 1), tensors, tuple(given.values()), parts)

    ends = {"low_kept": kept[0], "high_kept": kept[1]}
    found: list[Step] = []
    count = 1
    across, down = (rows * cols, 1) if stride == cols else (cols, rows)  # all of it is one row, if it lies so
    width = min(CHUNK, 1 << (across - 1).bit_length())
    beside = -(-across // width)
    chunks = beside * -(-down // (CHUNK // width))
    tensor = block.kind == "tensor"
    whole: dict[str, int | float] = {"rows": down, "cols": across, "stride": stride, "beside": beside}
    if (tensor and (not f.static or f.clamp)) or (f.outer is not None and not f.static):
        count = min(PARTS, 1 << (chunks - 1).bit_length())
        constants = {"PARTS": count, "C": CHUNK, "WIDTH": width}
        found.append(step(part_kernel, count, ("x", "parts"), {**whole, "count": chunks}, constants, parts=2 * count))
    if tensor:
        constants = {"PARTS": count, "C": CHUNK, "WIDTH": width}
        names = ("x", "codes", "scale", "zero", "parts")
        return [*found, step(tensor_kernel, chunks, names, {**ends, **whole}, constants)]
    if block.kind == "row" and 1 << (cols - 1).bit_length() > LONGEST:
        given = {**ends, "cols": cols, "stride": stride}
        return [*found, step(long_kernel, rows, ("x", "codes", "scale", "zero"), given, {"C": CHUNK})]
    grid = block.grid(rows, cols)
    of_row = block.kind == "row"
    n = grid[0] * grid[1]
    size = config(cols if of_row else block.rows * block.cols, n)
    given = {**ends, "rows": rows, "cols": cols, "stride": stride, "across": grid[1], "count": n}
    constants = {"ROWS": 1 if of_row else block.rows, "COLS": 0 if of_row else block.cols}
    constants |= {"NB": size.blocks, "C": size.elements, "PARTS": count}
    planes = ("x", "codes", "scale", "zero", "outer", "parts")
    return [*found, step(block_kernel, -(-n // size.blocks), planes, given, constants, size.warps)]


def _bytes(plane: Tensor) -> Tensor:
    return plane.view(torch.uint8) if plane.element_size() == 1 else plane
