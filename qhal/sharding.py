"""Cutting, fusing and stacking quantized tensors exactly, or refusing with the name of the block that is in the way.

Every function works on any QTensor by recursion over its planes: a plane is cut along its own grid, so two-level scales
need no case of their own. `narrow(t).dequantize()` equals `narrow(t.dequantize())` to the bit; so do the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from qhal.blocks import Block
from qhal.errors import ShardError

if TYPE_CHECKING:
    from qhal.tensors import QTensor

    P = TypeVar("P", Tensor, QTensor)

_PLANES = ("scale", "zero", "offset")


def bounds(size: int, rank: int, world: int, what: str) -> tuple[int, int]:
    """First and last index of part `rank` of `world` equal parts; ShardError if the axis does not divide."""
    if type(rank) is not int or type(world) is not int or world < 1:
        raise ShardError(f"rank {rank!r} of {world!r}: both are whole numbers, and there is at least 1 rank")
    if not 0 <= rank < world:
        raise ShardError(f"rank {rank} of {world}: ranks count from 0 to {world - 1}")
    if size % world:
        raise ShardError(f"{what}: {size} does not divide into {world} equal parts")
    return size // world * rank, size // world * (rank + 1)


def shard(t: QTensor, dim: int, rank: int, world: int) -> QTensor:
    """Part `rank` of `world` along N (dim 0) or K (dim 1)."""
    check_axis(dim)
    start, stop = bounds(t.shape[dim - 2], rank, world, f"{'rows' if dim == 0 else 'columns'} of {t.format}")
    return narrow(t, dim, start, stop)


def narrow(t: QTensor, dim: int, start: int, stop: int) -> QTensor:
    """Rows (dim 0) or columns (dim 1) start:stop of the last two axes."""
    check_axis(dim)
    n, k = t.shape[-2:]
    size = (n, k)[dim]
    if not 0 <= start <= stop <= size:
        raise ShardError(f"{t.format}: {start}:{stop} is outside 0:{size}")
    if (start, stop) == (0, size):
        return t
    if dim == 1 and t.format.sparsity is not None and (start % t.format.sparsity[1] or stop % t.format.sparsity[1]):
        raise ShardError(f"{t.format}: columns {start}:{stop} cut a {t.format.sparsity[0]}:{t.format.sparsity[1]} run")
    changed: dict[str, Any] = {"codes": _cut(t.codes, dim, start, stop)}
    if dim == 1 and t.group_index is not None:  # uneven groups: every shard keeps all of them and its own index
        return replace(t, **changed, group_index=t.group_index[start:stop].contiguous())
    for name in _PLANES:
        plane = getattr(t, name)
        if plane is None or (name != "scale" and tuple(plane.shape[-2:]) == (1, 1)):
            continue  # one zero point or offset for the whole tensor
        assert t.format.block is not None
        if dim == 0 and t.group_index is not None and plane.shape[-2] == 1:
            continue  # one row of groups serves every row
        first, last, grid_dim = grid_range(t.format.block, (n, k), dim, start, stop, f"{t.format} ({name})")
        changed[name] = plane if last < 0 else _cut_plane(plane, grid_dim, first, last)
    return replace(t, **changed)


def grid_range(
    block: Block, shape: tuple[int, int], dim: int, start: int, stop: int, what: str
) -> tuple[int, int, int]:
    """Grid indices first:last and the grid axis that a cut keeps; last -1: the whole plane."""
    n, k = shape
    if block.kind == "flat":
        if dim == 1 and n > 1:
            raise ShardError(f"{what}: a column cut goes through flat blocks of {block.cols}")
        first, last = (start * k, stop * k) if dim == 0 else (start, stop)
        if first % block.cols or (last % block.cols and last != n * k):
            raise ShardError(f"{what}: {('row', 'column')[dim]} {start} or {stop} lies inside a block of {block.cols}")
        return first // block.cols, -(-last // block.cols), 1
    step = {"row": (1, 0), "head": (1, 0), "col": (0, 1), "tensor": (0, 0)}.get(block.kind, (block.rows, block.cols))
    size = step[dim]
    if size == 0:
        return 0, -1, dim
    if start % size or (stop % size and stop != shape[dim]):
        raise ShardError(f"{what}: {('row', 'column')[dim]} {start} or {stop} lies inside a block of {size}")
    return start // size, -(-stop // size), dim


def concat(parts: Sequence[QTensor], dim: int) -> QTensor:
    """Fuse along N (dim 0: projections that share an input) or K (dim 1: the parts of a row-parallel weight)."""
    check_axis(dim)
    if not parts:
        raise ShardError("nothing to fuse: no parts were given")
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(p.format != first.format for p in parts):
        raise ShardError(f"cannot fuse different formats: {', '.join(sorted({str(p.format) for p in parts}))}")
    if any(p.shape[:-2] != first.shape[:-2] or p.shape[-1 - dim] != first.shape[-1 - dim] for p in parts):
        raise ShardError(f"{first.format}: shapes {[p.shape for p in parts]} do not join along dim {dim}")
    if not _all_equal([p.table for p in parts]):
        raise ShardError(f"{first.format}: parts with different tables cannot be fused")
    sparsity = first.format.sparsity
    if dim == 1 and sparsity is not None and any(p.shape[-1] % sparsity[1] for p in parts[:-1]):
        raise ShardError(f"{first.format}: a seam inside a {sparsity[0]}:{sparsity[1]} run cannot be fused")
    codes = _join([p.codes for p in parts], dim)
    indexed = [p.group_index for p in parts]
    if any(g is not None for g in indexed):
        return _concat_indexed(parts, codes, dim)
    fmt, changed = first.format, {}
    for name in _PLANES:
        planes = [getattr(p, name) for p in parts]
        if planes[0] is None:
            continue
        joined, widened = _concat_planes(parts, planes, name, dim)
        changed[name] = joined
        if widened:
            fmt = replace(fmt, block=Block("row"))
        if not isinstance(joined, Tensor) and getattr(fmt, name) != joined.format:
            fmt = replace(fmt, **{name: joined.format})
    if fmt.block is not None and fmt.block.kind == "row" and first.format.block != fmt.block:
        changed = {name: _per_row(plane, codes.shape[-2]) for name, plane in changed.items()}
    return replace(first, format=fmt, codes=codes, **changed)


def _concat_planes(parts: Sequence[QTensor], planes: list[P], name: str, dim: int) -> tuple[P, bool]:
    """The joined plane, and whether per-tensor values had to become per-row ones."""
    block, fmt = parts[0].format.block, parts[0].format
    if block is not None and block.kind != "tensor" and all(tuple(p.shape[-2:]) == (1, 1) for p in planes):
        one_block = all(block.grid(p.shape[-2], p.shape[-1]) == (1, 1) for p in parts)
        if not one_block and _all_equal(planes):
            return planes[0], False  # a zero point or offset with one value for the whole tensor
        if not one_block and name != "scale":
            raise ShardError(f"{fmt}: parts have different {name} values for the whole tensor")
    if block is None or block.kind == "tensor":
        if _all_equal(planes):
            return planes[0], False
        if dim == 1 or block is None:
            raise ShardError(f"{fmt}: parts have different per-tensor {name} values and share rows")
        rows = [_per_row(plane, part.shape[-2]) for plane, part in zip(planes, parts, strict=True)]
        return _join_planes(rows, 0), True
    if block.kind == "flat":
        flat_ok = (dim == 0 or parts[0].shape[-2] == 1) and all(
            p.shape[-2] * p.shape[-1] % block.cols == 0 for p in parts[:-1]
        )
        if not flat_ok:
            raise ShardError(f"{fmt}: a seam inside a flat block of {block.cols} cannot be fused")
        return _join_planes(planes, 1), False
    step = {"row": (1, 0), "head": (1, 0), "col": (0, 1)}.get(block.kind, (block.rows, block.cols))[dim]
    if step == 0:
        if _all_equal(planes):
            return planes[0], False
        raise ShardError(f"{fmt}: parts have different {name} values and share {('columns', 'rows')[dim]}")
    if any(p.shape[dim - 2] % step for p in parts[:-1]):
        raise ShardError(f"{fmt}: a seam at {[p.shape[dim - 2] for p in parts]} lies inside a block of {step}")
    return _join_planes(planes, dim), False


def _concat_indexed(parts: Sequence[QTensor], codes: Tensor, dim: int) -> QTensor:
    """Parts with act-order groups: along K they must share the groups, along N the index."""
    first = parts[0]
    planes = {name: [getattr(p, name) for p in parts] for name in _PLANES if getattr(first, name) is not None}
    if any(p.group_index is None for p in parts):
        raise ShardError(f"{first.format}: some parts have a group index and some have none")
    index = [p.group_index for p in parts if p.group_index is not None]
    if dim == 1:
        if not all(_all_equal(group) for group in planes.values()):
            raise ShardError(f"{first.format}: parts with a group index join along K only if they share all groups")
        return replace(first, codes=codes, group_index=torch.cat(index))
    if not _all_equal(index):
        raise ShardError(f"{first.format}: parts have different group indices and cannot share their input columns")
    for name, group in planes.items():
        planes[name] = [_per_row(plane, p.shape[-2]) for plane, p in zip(group, parts, strict=True)]
    return replace(first, codes=codes, **{name: _join_planes(group, 0) for name, group in planes.items()})


def stack(parts: Sequence[QTensor]) -> QTensor:
    """Equal formats and shapes on a new leading axis."""
    if not parts:
        raise ShardError("nothing to stack: no parts were given")
    first = parts[0]
    if any(p.format != first.format or p.shape != first.shape for p in parts):
        raise ShardError(f"cannot stack {sorted({f'{p.format} {p.shape}' for p in parts})}")
    if not (_all_equal([p.group_index for p in parts]) and _all_equal([p.table for p in parts])):
        raise ShardError(f"{first.format}: a group index or table that differs between experts cannot be stacked")
    changed: dict[str, Any] = {"codes": torch.stack([p.codes for p in parts])}
    for name in _PLANES:
        planes = [getattr(p, name) for p in parts]
        if planes[0] is not None:
            changed[name] = torch.stack(planes) if isinstance(planes[0], Tensor) else stack(planes)
    return replace(first, **changed)


def select(t: QTensor, first: int, count: int) -> QTensor:
    """Entries first:first+count of the leading axis (experts)."""
    if len(t.shape) < 3 or not 0 <= first <= first + count <= t.shape[0]:
        raise ShardError(f"{t.format} {t.shape}: no experts {first}:{first + count}")
    changed: dict[str, Any] = {"codes": t.codes[first : first + count]}
    for name in _PLANES:
        plane = getattr(t, name)
        if plane is not None and plane.shape[0] != 1:
            cut = plane[first : first + count] if isinstance(plane, Tensor) else select(plane, first, count)
            changed[name] = cut
    return replace(t, **changed)


def permute_rows(t: QTensor, index: Tensor) -> QTensor:
    """Rows in the order of `index` [N]."""
    block = t.format.block
    if block is not None and (block.kind == "flat" or block.rows > 1):
        raise ShardError(f"{t.format}: rows cannot be permuted, {block} blocks span several")
    changed: dict[str, Any] = {"codes": t.codes.index_select(-2, index)}
    for name in _PLANES:
        plane = getattr(t, name)
        if plane is not None and plane.shape[-2] > 1:
            moved = plane.index_select(-2, index) if isinstance(plane, Tensor) else permute_rows(plane, index)
            changed[name] = moved
    return replace(t, **changed)


def transposed(t: QTensor) -> QTensor:
    """[..., N, K] as [..., K, N]: the same codes, every block turned (row to col, g<k> to kx1, n x k to k x n)."""
    block, fmt = t.format.block, t.format
    if t.layout != "canonical":
        raise ShardError(f"{fmt}: layout {t.layout!r} is a backend's own; `QuantOps.restore` it first")
    if t.group_index is not None:
        raise ShardError(f"{fmt}: a group index orders columns; act-order groups have no transpose")
    if fmt.sparsity is not None:
        raise ShardError(f"{fmt}: {fmt.sparsity[0]}:{fmt.sparsity[1]} runs lie along K; they have no transpose")
    if block is not None and block.kind == "flat":
        raise ShardError(f"{fmt}: blocks of {block.cols} run along rows; they have no transpose")
    if block is not None:
        turned = {"row": Block("col"), "head": Block("col"), "col": Block("row"), "tensor": block}
        fmt = replace(fmt, block=turned.get(block.kind, Block("tile", block.cols, block.rows)))
    changed: dict[str, Any] = {"codes": _turn(t.codes)}
    for name in _PLANES:
        plane = getattr(t, name)
        if plane is not None:
            changed[name] = _turn(plane) if isinstance(plane, Tensor) else transposed(plane)
            if not isinstance(plane, Tensor):
                fmt = replace(fmt, **{name: changed[name].format})
    return replace(t, format=fmt, **changed)


def check_axis(dim: int) -> None:
    """ShardError unless dim is 0 or 1."""
    if type(dim) is not int or dim not in (0, 1):
        raise ShardError(f"dim {dim!r}: 0 cuts rows (N), 1 cuts columns (K)")


def _turn(x: Tensor) -> Tensor:
    """Last two axes exchanged, contiguous; one-byte floats as bytes: not every device copies them."""
    if x.element_size() == 1 and x.is_floating_point():
        return x.view(torch.uint8).transpose(-1, -2).contiguous().view(x.dtype)
    return x.transpose(-1, -2).contiguous()


def _cut(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    return x.narrow(dim - 2, start, stop - start)


def _cut_plane(plane: P, dim: int, start: int, stop: int) -> P:
    return _cut(plane, dim, start, stop) if isinstance(plane, Tensor) else narrow(plane, dim, start, stop)


def _join(tensors: Sequence[Tensor], dim: int) -> Tensor:
    dtype = tensors[0].dtype
    if dtype.itemsize == 1 and dtype.is_floating_point:  # torch.cat has no float8 kernels on every device
        return torch.cat([t.view(torch.uint8) for t in tensors], dim - 2).view(dtype)
    return torch.cat(list(tensors), dim - 2)


def _join_planes(planes: Sequence[P], dim: int) -> P:
    if isinstance(planes[0], Tensor):
        return _join(planes, dim)
    return concat(planes, dim)


def _per_row(plane: P, rows: int) -> P:
    """One value repeated for every row; a plane that already has rows is left alone."""
    if plane.shape[-2] != 1:
        return plane
    if isinstance(plane, Tensor):
        return plane.expand(*plane.shape[:-2], rows, plane.shape[-1]).contiguous()
    return replace(plane, codes=_per_row(plane.codes, rows))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bit pattern (NaN equals the same NaN, -0 differs from +0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def _all_equal(planes: Sequence[object]) -> bool:
    first = planes[0]
    if first is None or any(p is None for p in planes):
        return all(p is None for p in planes)
    if isinstance(first, Tensor):
        return all(isinstance(p, Tensor) and same_bits(p, first) for p in planes[1:])
    return all(first.equal(p) for p in planes[1:])  # type: ignore[attr-defined]
