"""The value of a QTensor, computed a second time with numpy: tables of `elements.py`, index arithmetic, float32 steps.

The contract defines decoding as float32 steps, each rounded once, never contracted: scale planes from the innermost
parentheses outward, code - zero, times or divided by the scale, then the offset. numpy's float32 arithmetic is exactly
that. Beside the value it gives the magnitude (|code| + |zero|) * |scale| + |offset| that a kernel's error is relative
to when it folds the zero point into a correction sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qhal.blocks import Block
from qhal.formats import Format
from qhal.tensors import QTensor
from qhal_conformance import elements
from qhal_conformance.generator import F32, F64, I64

Planes = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Decoded:
    """A weight [N, K] or activation [T, K] as numbers.

    value        float32, what the contract says the tensor is
    magnitude    float64 >= |value|: the size of the terms that a kernel may add separately
    significand  int64: equal numbers mean equal |code - zero| mantissas, so rounding the value to 16 bits errs equally
    block        int64: index of the scale block of every element
    """

    value: F32
    magnitude: F64
    significand: I64
    block: I64


def to_numpy(t: torch.Tensor) -> npt.NDArray[np.generic]:
    """A tensor's bits as a numpy array: small floats as bytes, bf16 as uint16, everything else as it is."""
    t = t.detach().cpu().contiguous()
    if t.element_size() == 1:
        return np.asarray(t.view(torch.uint8).numpy())
    if t.dtype == torch.bfloat16:
        return np.asarray(t.view(torch.int16).numpy().view(np.uint16))
    return np.asarray(t.numpy())


def numbers(t: torch.Tensor) -> F32:
    """A plain float tensor as float32 numbers, exactly."""
    bits = to_numpy(t)
    if t.dtype == torch.bfloat16:
        return np.asarray((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))
    return bits.astype(np.float32)


def decode(q: QTensor) -> Decoded:
    """Decode a canonical [N, K] QTensor; stacked experts are decoded one by one by the caller."""
    f = q.format
    shape = tuple(q.codes.shape[-2:])
    codes = _plane(q.codes, f.element, q.table).reshape(shape)
    block = block_index(f.block, shape, None if q.group_index is None else q.group_index.cpu().numpy())
    value, magnitude = codes, np.abs(codes.astype(np.float64))
    centred = codes
    if q.zero is not None and f.zero is not None:
        zero = _gather(_nested(q.zero, f.zero), f.block, shape, block)
        value = value - zero
        centred = value
        magnitude = magnitude + np.abs(zero.astype(np.float64))
    if q.scale is not None and f.scale is not None:
        scale = _gather(_nested(q.scale, f.scale), f.block, shape, block)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            value = value * scale if f.op == "*" else value / scale
            size = np.abs(scale.astype(np.float64))
            magnitude = magnitude * size if f.op == "*" else magnitude / np.where(size == 0, 1.0, size)
    if q.offset is not None and f.offset is not None:
        offset = _gather(_nested(q.offset, f.offset), f.block, shape, block)
        value = value + offset if f.offset_sign > 0 else value - offset
        magnitude = magnitude + np.abs(offset.astype(np.float64))
    return Decoded(value.astype(np.float32), magnitude, significand(centred), block)


def plain(x: F32) -> Decoded:
    """A float tensor that is not quantized: its own value, every element its own block."""
    rows = np.arange(x.size, dtype=np.int64).reshape(x.shape)
    return Decoded(x, np.abs(x.astype(np.float64)), np.zeros(x.shape, dtype=np.int64), rows)


def _plane(t: torch.Tensor, element: str, table: torch.Tensor | None = None) -> F32:
    """Numbers of a plane of codes (or of plain floats, of any float type)."""
    if element in elements.WIDE_BITS:
        return numbers(t)
    lut = elements.table(element) if table is None else table.detach().cpu().double().numpy()
    return np.asarray(lut[to_numpy(t).astype(np.int64)], dtype=np.float32)


def _nested(plane: torch.Tensor | QTensor, fmt: Format) -> F32:
    return decode(plane).value if isinstance(plane, QTensor) else _plane(plane, fmt.element)


def block_index(block: Block | None, shape: tuple[int, ...], group_index: npt.NDArray[np.int32] | None) -> I64:
    """For every element, the flat index of its block: row-major over the grid of scales."""
    i, j = np.indices(shape, dtype=np.int64)
    if block is None or block.kind == "tensor":
        return np.zeros(shape, dtype=np.int64)
    if block.kind in ("row", "head"):
        return np.asarray(i)
    if block.kind == "col":
        return np.asarray(j)
    if block.kind == "flat":
        return np.asarray((i * shape[1] + j) // block.cols)
    columns = -(-shape[1] // block.cols)
    group = j // block.cols
    if group_index is not None:
        columns = max(columns, int(group_index.max()) + 1)
        group = np.broadcast_to(group_index.astype(np.int64), shape)
    return np.asarray((i // block.rows) * columns + group)


def _gather(plane: F32, block: Block | None, shape: tuple[int, ...], index: I64) -> F32:
    flat = plane.reshape(-1)
    if flat.size == 1:
        return np.broadcast_to(flat, shape)
    assert block is not None
    return np.asarray(flat[index])


def significand(codes: F32) -> I64:
    """The mantissa of |code|, so that values of one block that differ by a power of two share it."""
    mantissa, _ = np.frexp(np.nan_to_num(np.abs(codes.astype(np.float64)), posinf=0.0))
    return np.asarray((mantissa * 2.0**24).astype(np.int64))
