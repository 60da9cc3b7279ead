"""From tensors to the kernels' arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhal.elements import WIDE, element
from qhal.formats import Format
from qhal.requests import NumericsClass, QuantizeRequest
from qhal.rounding import to_plane
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_portable.quantize import write
from qhal_triton.paths import Path
from qhal_triton.quantize.config import CHUNK, LONGEST, PARTS, config
from qhal_triton.quantize.kernels.grids import block_kernel, long_kernel, part_kernel, tensor_kernel
from qhal_triton.quantize.recipe import Recipe, recipe
from qhal_triton.target import Target

_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}  # bits are the contract


@dataclass(frozen=True, kw_only=True)
class QuantizePath(Path):
    """A path and the constants of its kernel."""

    recipe: Recipe
    target: Target


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
    if not x.numel() and (block.kind == "tensor" or path.recipe.outer is not None or not x.shape[-1]):
        return False  # there is a scale of nothing
    if x.numel() >= 1 << 31 or (x.numel() and matrix(x) is None):
        return False  # places within a tensor are 32-bit numbers
    if block.kind == "tile" and x.dim() > 2 and x.shape[:-2].numel() > 1 and x.shape[-2] % block.rows:
        return False
    return all(
        (plane is not None) == wanted and (plane is None or _given(plane, device))
        for plane, wanted in ((to.scale, path.recipe.static), (to.zero, path.recipe.zero == "given"))
    )


def _given(plane: Tensor, device: torch.device) -> bool:
    return plane.numel() == 1 and plane.device == device and plane.dtype in WIDE.values()


def matrix(x: Tensor) -> Tensor | None:
    """x [..., T, K] as [rows, K] without a copy, rows at one stride and columns beside each other; None: needs one."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
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
        rows = matrix(x.detach())
        assert rows is not None
        _launch(f, rows, to, target)
    return target if out is None or target is out else write(made, out)


def empty(f: Recipe, x: Tensor, to: Operand) -> QTensor:
    """The planes of the result, given ones as they are."""
    fmt, block = to.format, to.format.block
    assert block is not None and fmt.scale is not None
    lead = x.shape[:-2]
    grid = ([1] * len(lead) if block.kind == "tensor" else list(lead)) + list(block.grid(*x.shape[-2:]))
    ones = [1] * x.dim()

    def new(name: str, shape: list[int]) -> Tensor:
        return torch.empty(shape, dtype=element(name).storage, device=x.device)

    codes = torch.empty(x.shape, dtype=element(fmt.element).storage, device=x.device)
    scale: Tensor | QTensor
    if f.outer is not None:
        assert fmt.scale.scale is not None
        outer = to.scale.reshape(ones) if to.scale is not None else new(fmt.scale.scale.element, ones)
        scale = QTensor(fmt.scale, new(fmt.scale.element, grid), outer)
    else:
        scale = to.scale.reshape(ones) if to.scale is not None else new(fmt.scale.element, grid)
    zero = None
    if fmt.zero is not None:
        zero = new(fmt.zero.element, grid) if to.zero is None else _zero_plane(to.zero.reshape(ones), fmt.zero)
    return QTensor(fmt, codes, scale, zero)


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


def _launch(f: Recipe, x: Tensor, to: Operand, q: QTensor) -> None:
    rows, cols = x.shape
    stride = x.stride(0) if rows > 1 else cols
    block = q.format.block
    assert block is not None
    low, high = to.clip
    codes, scale, outer = _bytes(q.codes), q.scale, _outermost(q.scale)
    if isinstance(scale, QTensor):
        scale = _bytes(scale.codes)
    zero = scale if q.zero is None else q.zero
    parts, count = x, 1
    across, down = (rows * cols, 1) if stride == cols else (cols, rows)  # all of it is one row, if it lies so
    width = min(CHUNK, 1 << (across - 1).bit_length())
    beside = -(-across // width)
    chunks = beside * -(-down // (CHUNK // width))
    tensor = block.kind == "tensor"
    if (tensor and (not f.static or f.clamp)) or (f.outer is not None and not f.static):
        count = min(PARTS, 1 << (chunks - 1).bit_length())
        parts = torch.empty(2 * count, dtype=torch.int32, device=x.device)
        part_kernel[(count,)](
            x, parts, down, across, stride, beside, chunks, count, CHUNK, width, f, num_warps=8, **_OPTIONS
        )
    if tensor:
        tensor_kernel[(chunks,)](
            x, codes, scale, zero, parts, low, high, down, across, stride, beside, count, CHUNK, width, f,
            num_warps=8, **_OPTIONS,
        )  # fmt: skip
        return
    if block.kind == "row" and 1 << (cols - 1).bit_length() > LONGEST:
        long_kernel[(rows,)](x, codes, scale, zero, low, high, cols, stride, CHUNK, f, num_warps=8, **_OPTIONS)
        return
    grid = block.grid(rows, cols)
    of_row = block.kind == "row"
    n = grid[0] * grid[1]
    size = config(cols if of_row else block.rows * block.cols, n)
    block_kernel[(-(-n // size.blocks),)](
        x, codes, scale, zero, outer, parts, low, high, rows, cols, stride, grid[1], n,
        1 if of_row else block.rows, 0 if of_row else block.cols, size.blocks, size.elements, count, f,
        num_warps=size.warps, **_OPTIONS,
    )  # fmt: skip


def _bytes(plane: Tensor) -> Tensor:
    return plane.view(torch.uint8) if plane.element_size() == 1 else plane
