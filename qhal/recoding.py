"""recode: the same numbers under another format, exactly, or a FormatError that says which plane is in the way.

Between checkpoint formats the numbers are often the same and only the words differ: a signed code or an unsigned one
around a zero point, one scale per row or the same one repeated per group, a scale in bf16 or in fp32. Each step below
changes one such word; whatever they give is decoded and compared with the original before it is returned, so a step
can be missing but not wrong. What needs new codes (another element, smaller groups' scales merged, a scale that does
not fit its new type) is no recoding: `qhal.encoding.encode(t.dequantize(), to)` does that, with a loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qhal.blocks import Block
from qhal.elements import Element, decode, element
from qhal.errors import FormatError
from qhal.flavours import factor, relabelled
from qhal.formats import Format
from qhal.rounding import to_plane
from qhal.tensors import QTensor


def recode(t: QTensor, to: Format, *, nearly: bool = False) -> QTensor:
    """`t` in the format `to`: the same dequantization bit for bit (+0 and -0 are equal), the rule of `to` dropped in.

    FormatError names the first difference that cannot be bridged without changing a number. nearly: numbers may move
    by the rounding of a reciprocal, where one format divides by a scale and the other multiplies; codes may not.
    """
    if t.layout != "canonical":
        raise FormatError(f"{t.format}: layout {t.layout!r} is a backend's own; restore it first")
    if t.format.storage == to.storage:
        return replace(t, format=to)
    made = _recode(t, to, nearly)
    if not nearly and not bool((made.dequantize() == t.dequantize()).all()):
        raise FormatError(f"{t.format} as {to}: the scales' types round differently, some numbers would change")
    return made


def _recode(t: QTensor, to: Format, nearly: bool) -> QTensor:
    f = t.format
    if f.sparsity is not None and to.sparsity not in (None, f.sparsity):
        raise _differ(f, to, f"{to.sparsity[0]}:{to.sparsity[1]} sparsity" if to.sparsity else "sparsity")
    if f.sparsity is None and to.sparsity is not None:
        raise _differ(f, to, "sparsity: the weight is not pruned")
    if f.offset is not None or to.offset is not None:
        raise _differ(f, to, "the offset")
    if t.group_index is not None and to.block != f.block:
        raise _differ(f, to, "the block: columns in activation order have uneven groups")
    codes, zero = _codes(t, to)
    scale, by = t.scale, factor(f.element, to.element) or 1.0
    if to.scale is None and scale is not None:
        raise _differ(f, to, "the scale: the target has none")
    if f.scale is None and to.scale is not None:
        raise _differ(f, to, "the scale: there is none to keep")
    if scale is not None and f.block is not None and to.block is not None and to.scale is not None:
        scale = _scale(_spread(scale, f.block, to.block, t.shape, f, to), f, to, nearly, by)
    if zero is not None and to.block is not None:
        if zero.numel() > 1 and f.block is not None:
            zero = _spread_plane(zero, f.block, to.block, t.shape)
        else:
            zero = zero.expand(*t.shape[:-2], *to.block.grid(*t.shape[-2:])).contiguous()
    return QTensor(to, codes, scale=scale, zero=zero, table=t.table, group_index=t.group_index)


def _codes(t: QTensor, to: Format) -> tuple[Tensor, Tensor | None]:
    """Codes and zero points of the target's element: moved together by half the range, or widened."""
    f, e, wanted = t.format, element(t.format.element), element(to.element)
    twins = factor(e.name, wanted.name) is not None and t.zero is None and to.zero is None
    if twins and f.scale is None:
        raise _differ(f, to, "the scale, which would have to double or halve: there is none")
    if twins:
        try:
            return relabelled(t.codes, e.name, wanted.name), None
        except FormatError as lost:
            raise _differ(f, to, str(lost)) from None
    if e.name != wanted.name and not (e.integer and wanted.integer):
        raise _differ(f, to, f"the element: {e.name} codes are not {wanted.name} codes")
    if not e.integer:
        if (f.zero is None) != (to.zero is None) or isinstance(t.zero, QTensor):
            raise _differ(f, to, "the zero point")
        return t.codes, None if t.zero is None or to.zero is None else _exact(t.zero, f.zero, to.zero, f, to)
    zero = _zero_numbers(t)
    shift = 0  # what is added to codes and zero points alike
    if e.kind != wanted.kind:
        shift = (1 << (e.bits - 1)) * (1 if wanted.kind == "uint" else -1)
    if to.zero is None:  # without a zero point it must be 0 in the target
        if zero is not None and not bool((zero + shift == 0).all()):
            raise _differ(f, to, f"the zero points, which are not all {-shift}")
        if zero is None and shift:
            raise _differ(f, to, "the element: signed codes need a zero point to become unsigned")
    codes = t.codes.to(torch.int16) + shift
    if codes.numel() and not wanted.smallest <= int(codes.min()) <= int(codes.max()) <= wanted.largest:
        raise _differ(f, to, f"the codes, which reach from {int(codes.min())} to {int(codes.max())}")
    if to.zero is None:
        return codes.to(wanted.storage), None
    z = element(to.zero.element)
    moved = (torch.zeros([1] * len(t.shape), device=t.device) if zero is None else zero) + shift
    return codes.to(wanted.storage), _fits(moved, z, f, to, "zero points")


def _zero_numbers(t: QTensor) -> Tensor | None:
    """float32 zero points, None where there are none."""
    if t.zero is None:
        return None
    if isinstance(t.zero, QTensor):
        return t.zero.dequantize()
    assert t.format.zero is not None
    return decode(t.format.zero.element, t.zero)


def _scale(scale: Tensor | QTensor, f: Format, to: Format, nearly: bool, by: float) -> Tensor | QTensor:
    """The scale plane, `by` times as large, in the target's type; a nested one by the same rules, level by level."""
    assert f.scale is not None and to.scale is not None
    if isinstance(scale, QTensor):
        if f.op != to.op:
            raise _differ(f, to, "the scale: one format multiplies, the other divides")
        by = 1 / by if f.op == "/" else by
        if to.scale.plain:
            return _fits(scale.dequantize() * by, element(to.scale.element), f, to, "scales")
        if by != 1:
            raise _differ(f, to, "the scales of two levels, neither of which alone can double or halve")
        return recode(scale, to.scale, nearly=nearly)
    if not to.scale.plain:
        raise _differ(f, to, "the scale: one level cannot be split into two")
    number = decode(f.scale.element, scale) * (1 / by if f.op == "/" else by)
    if f.op != to.op:
        number = 1 / number
    return _fits(number, element(to.scale.element), f, to, "scales")


def _exact(plane: Tensor, old: Format | None, new: Format, f: Format, to: Format) -> Tensor:
    assert old is not None
    return _fits(decode(old.element, plane), element(new.element), f, to, "zero points")


def _fits(number: Tensor, e: Element, f: Format, to: Format, what: str) -> Tensor:
    """The numbers as a plane of element `e`; FormatError if one of them is rounded."""
    plane = number.to(e.storage) if e.wide else to_plane(number.contiguous(), e)
    lost = decode(e.name, plane) != number
    if bool(lost.any()):
        raise _differ(f, to, f"{what} such as {number[lost][0].item():g}, which {e.name} does not hold")
    return plane


def _spread(
    scale: Tensor | QTensor, old: Block, new: Block, shape: tuple[int, ...], f: Format, to: Format
) -> Tensor | QTensor:
    """One value per new block, where every new block lies inside an old one."""
    if old == new:
        return scale
    if not _inside(old, new, shape):
        raise _differ(f, to, f"the blocks: {new} does not lie inside {old}")
    if isinstance(scale, QTensor):
        inner = scale.format.block
        if inner is None or inner.kind != "tensor":
            raise _differ(f, to, f"the blocks: the scale's own {inner} blocks would move")
        return replace(scale, codes=_spread_plane(scale.codes, old, new, shape))
    return _spread_plane(scale, old, new, shape)


def _inside(old: Block, new: Block, shape: tuple[int, ...]) -> bool:
    """Whether every block of `new` lies inside one of `old` on this shape."""
    if "flat" in (old.kind, new.kind):
        return False
    sizes = zip(_size(old, shape), _size(new, shape), shape[-2:], strict=True)
    return all(a >= axis or (b <= a and a % b == 0) for a, b, axis in sizes)


def _size(b: Block, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a block on this shape."""
    n, k = shape[-2:]
    return {"tensor": (n, k), "row": (1, k), "head": (1, k), "col": (n, 1)}.get(b.kind, (b.rows, b.cols))


def _spread_plane(plane: Tensor, old: Block, new: Block, shape: tuple[int, ...]) -> Tensor:
    """A plane of one value per old block as one per new block: what stands at each new block's first element."""
    if old == new:
        return plane
    rows, cols = _size(new, shape)
    raw = plane.view(torch.uint8) if plane.element_size() == 1 else plane
    return old.expand(raw, shape)[..., ::rows, ::cols].contiguous().view(plane.dtype)


def _differ(f: Format, to: Format, what: str) -> FormatError:
    return FormatError(f"{f} cannot be written as {to} exactly: {what}")
