"""Weights of ModelSlim: which tensors a type stores for a module, and how they become a QTensor.

int4 codes of W4A8 are packed in pairs of rows (byte [j, i]: row 2j low, row 2j+1 high), those of W4A16 in pairs of
rows with groups and in pairs of columns without; the older writer, and W4A4, store one in a byte. Two stages:
w = code * (weight_scale_second * weight_scale), in this order. The product scale of a static W8A8 stands for the weight
scale that this writer leaves out: w = code * (deq_scale / input_scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import lcm

from torch import Tensor

from qhal.formats import Format
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.lanes import row_sums
from qhal_schemes.ms_static import product_scale
from qhal_schemes.ms_types import Kind
from qhal_schemes.packing import unpack_int4, unpack_nibbles
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.source import WIDE, TensorIndex

_FLOATS = tuple(WIDE)
_DUAL_BLOCKS = (512, 32, 64, 128, 256, 1024, 2048, 4096, 8192, 16384, 32768)
"""Columns of an outer block, the one of the tool's recipes first. A file stores the number of blocks only."""


@dataclass(frozen=True)
class Stored:
    """What one module's weight tensors are, from the index: shape, format, names to read, packed axis (None: none)."""

    n: int
    k: int
    format: Format
    names: tuple[str, ...]
    pairs: int | None = None


def locate(index: TensorIndex, stem: str, kind: Kind, packed: bool, group_size: int) -> Stored:
    """Find and check a module's weight tensors by names, dtypes and shapes.

    packed, group_size  of the description; group_size 0: it says nothing about this module
    """
    weight = index.expect(f"{stem}.weight", (kind.dtype,), (None, None)).shape
    if kind.mx:
        return _locate_mx(index, stem, kind, weight)
    names = [f"{stem}.weight"]
    scale_name = f"{stem}.weight_scale"
    if kind.static == "always" and scale_name not in index:
        n, k = weight
        index.expect(f"{stem}.deq_scale", ("F32", "I64"), (n,))
        return Stored(n, k, _format(kind.element, "row", "(fp32.tensor/fp32)", False), tuple(names))
    flat = scale_name in index and len(index[scale_name].shape) == 1
    scale = index.expect(scale_name, _FLOATS, (None,) if flat else (None, None))
    n, groups = scale.shape[0], 1 if flat else scale.shape[1]
    index.expect(f"{stem}.weight_offset", _FLOATS, scale.shape)
    names += [scale_name, f"{stem}.weight_offset"]
    element = ELEMENT_OF[scale.dtype]
    second = f"{stem}.weight_scale_second"
    if second in index and kind.pairs and kind.input:
        inner = index.expect(second, _FLOATS, (n, None))
        index.expect(scale_name, _FLOATS, (n, 1))
        index.expect(f"{stem}.weight_offset_second", _FLOATS, inner.shape)
        names += [second, f"{stem}.weight_offset_second"]
        groups, element = inner.shape[1], f"({ELEMENT_OF[inner.dtype]}.row*{element})"
    pairs = _pairs(kind, weight, n, groups, packed)
    found = [axis * 2 if pairs == i else axis for i, axis in enumerate(weight)]
    k = found[1]
    if found[0] != n:
        rows = f"{n // 2} or {n}" if kind.pairs and n % 2 == 0 else f"{n}"
        raise index.bad(f"{stem}.weight", f"{rows} rows, as {scale_name} has {n}", f"{weight[0]} rows")
    if groups < 1 or k % groups:
        raise index.bad(scale_name, f"columns that divide the {k} columns (K) of the weight", f"{groups} columns")
    if groups > 1 and group_size and k != groups * group_size:
        raise index.bad(scale_name, f"{k / group_size:g} columns, as group_size is {group_size}", f"{groups} columns")
    if f"{stem}.scale_bias" in index and kind.pairs and kind.input:
        index.expect(f"{stem}.scale_bias", _FLOATS, (n, None))
        names.append(f"{stem}.scale_bias")
    block = "row" if groups == 1 else f"g{k // groups}"
    return Stored(n, k, _format(kind.element, block, element, kind.offset), tuple(names), pairs)


def read(index: TensorIndex, stem: str, kind: Kind, stored: Stored, t: dict[str, Tensor]) -> QTensor:
    """The weight from its tensors, by their last names; every scale, offset and code is checked."""
    f = stored.format
    assert f.block is not None and f.scale is not None
    grid = f.block.grid(stored.n, stored.k)
    codes = _codes(index, stem, kind, stored, t["weight"])
    if "weight_scale" not in t:  # the product scale over the input scale
        deq = product_scale(index, stem, t["deq_scale"])
        scale: Tensor | QTensor = QTensor(f.scale, deq.reshape(grid), t["input_scale"].float().reshape(1, 1))
        return QTensor(f, codes, scale)
    checks.scales(index, f"{stem}.weight_scale", t["weight_scale"])
    scale = t["weight_scale"]
    if "weight_scale_second" in t:
        checks.scales(index, f"{stem}.weight_scale_second", t["weight_scale_second"])
        scale = QTensor(f.scale, t["weight_scale_second"], scale)
        _zero(index, f"{stem}.weight_offset_second", t["weight_offset_second"])
    elif kind.dual:
        checks.scales(index, f"{stem}.weight_dual_scale", t["weight_dual_scale"], positive=True)
        scale = QTensor(f.scale, scale, t["weight_dual_scale"].squeeze(-1))
    else:
        scale = scale.reshape(grid)
    if kind.offset:
        checks.finite(index, f"{stem}.weight_offset", t["weight_offset"])
        return QTensor(f, codes, scale, t["weight_offset"].reshape(grid))
    if not kind.mx:
        _zero(index, f"{stem}.weight_offset", t["weight_offset"])
    weight = QTensor(f, codes, scale)
    if "scale_bias" in t:
        _check_scale_bias(index, f"{stem}.scale_bias", t["scale_bias"], weight)
    return weight


def _codes(index: TensorIndex, stem: str, kind: Kind, stored: Stored, weight: Tensor) -> Tensor:
    if kind.dtype == "U8":
        return unpack_nibbles(weight)
    if kind.dtype == "F8_E4M3":
        checks.float8_codes(index, f"{stem}.weight", weight)
        return weight
    if stored.pairs is not None:
        return unpack_int4(weight, stored.pairs)
    checks.code_range(index, f"{stem}.weight", weight, int(kind.element.removeprefix("int")))
    return weight


def _pairs(kind: Kind, weight: tuple[int, ...], n: int, groups: int, packed: bool) -> int | None:
    """The axis along which two int4 codes share a byte."""
    if not kind.pairs:
        return None
    if weight[0] * 2 == n:
        return 0
    return 1 if kind.offset and packed and groups == 1 else None


def _locate_mx(index: TensorIndex, stem: str, kind: Kind, weight: tuple[int, ...]) -> Stored:
    n, k = weight[0], weight[1] * (2 if kind.dtype == "U8" else 1)
    blocks = -(-k // 32)
    index.expect(f"{stem}.weight_scale", ("U8",), (n, blocks))
    names = [f"{stem}.weight", f"{stem}.weight_scale"]
    if not kind.dual:
        return Stored(n, k, Format.parse(f"{kind.element}.g32*e8m0"), tuple(names))
    name = f"{stem}.weight_dual_scale"
    outer = index.expect(name, ("F32",), (n, None, 1)).shape[1]
    size = next((d for d in _DUAL_BLOCKS if -(-k // d) == outer), 0)
    if not size:
        if outer < 1 or blocks % outer or k % 32:
            raise index.bad(name, f"a number of blocks that the {k} columns (K) divide into", f"{outer} blocks")
        size = k // outer
    return Stored(n, k, Format.parse(f"{kind.element}.g32*(e8m0.g{size // 32}*fp32)"), (*names, name))


@lru_cache(maxsize=64)
def dual_input(weight: Format) -> Format:
    """The input of a weight with two levels of scales: the same levels, computed."""
    return Format.parse(f"{weight}@e8m0=over1.75,round=away")


@lru_cache(maxsize=256)
def _format(element: str, block: str, scale: str, offset: bool) -> Format:
    return Format.parse(f"{element}{'-fp32' if offset else ''}.{block}*{scale}")


def _zero(index: TensorIndex, name: str, offset: Tensor) -> None:
    if bool((offset != 0).any()):
        raise index.bad(
            name,
            "zeros: with quantized inputs the tool writes no others, and operators do not look",
            f"{int((offset != 0).sum())} other values",
        )


def _check_scale_bias(index: TensorIndex, name: str, stored: Tensor, weight: QTensor) -> None:
    """8 * the sum of each row, over all of K or over equal slices of it; for other module names the writer leaves the
    weight itself. A correction of operators that read int4 codes as unsigned: checked, then dropped.

    The sum's order is unknown: K roundings of float32; the two scales of a two-stage weight were rounded to bfloat16.
    """
    n, k = weight.shape
    slices = stored.shape[1]
    if slices < 1 or k % slices:
        raise index.bad(name, f"a number of slices that divides {k} columns (K)", f"{slices} columns")
    scale = weight.scale.dequantize() if isinstance(weight.scale, QTensor) else weight.scale
    assert scale is not None
    pieces = lcm(scale.shape[1], slices)  # runs of columns with one scale in one slice
    factor = scale.double().repeat_interleave(pieces // scale.shape[1], 1) * (8 if slices < k or slices == 16 else 1)
    codes = weight.codes.reshape(n, pieces, k // pieces)
    pairs = ((row_sums(codes), factor), (row_sums(codes, magnitudes=True), factor.abs()))
    sums, size = ((of_codes * f).reshape(n, slices, -1).sum(-1) for of_codes, f in pairs)
    rounding = (k // slices + 2) * 2.0**-24 + (2.0**-7 if isinstance(weight.scale, QTensor) else 0)
    wrong = ~((stored.double() - sums).abs() <= size * rounding)  # NaN is wrong, too
    if bool(wrong.any()):
        raise index.bad(name, "8 times the sums of the rows of the weight", f"{int(wrong.sum())} other values")
