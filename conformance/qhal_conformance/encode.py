"""Quantization computed a second time, with numpy and the tables of `elements.py`: what `quantize` must give, bit for
bit.

Independent of `qhal.encoding` on purpose; both follow the docstrings of `qhal.rules` and `qhal.formats`. float32 steps,
each rounded once. Outer levels of a nested scale come first. Every field of a Rule is here, and every kind of block.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from qhal.elements import WIDE, element
from qhal.formats import Format
from qhal.rules import Rule
from qhal.tensors import QTensor
from qhal_conformance import elements
from qhal_conformance.decode import block_index, decode, numbers
from qhal_conformance.exponents import exponents
from qhal_conformance.generator import F32, I64

Plane = torch.Tensor | QTensor
_EPS = float(np.finfo(np.float32).eps)


def quantize(
    x: F32,
    to: Format,
    *,
    scale: F32 | None = None,
    zero: F32 | None = None,
    clip: tuple[float, float] = (1.0, 1.0),
) -> QTensor:
    """x [m, k] to codes and scales. scale, zero: static, the outermost level, one value or one per block."""
    if to.rule.special == "saturate":
        x = np.nan_to_num(x)
    if to.block is None or to.scale is None:
        return QTensor(to, _codes(to, x), table=_table(to))
    with np.errstate(all="ignore"):
        return _blocked(_arith(x, to.rule), to, scale, zero, clip)


@dataclass(frozen=True)
class _Blocks:
    """Which block of the grid every element belongs to."""

    grid: tuple[int, int]
    index: I64

    def spread(self, plane: Plane, f: Format) -> F32:
        """One number per element."""
        values = _number(plane, f).reshape(-1)
        one = values.size == 1
        return np.asarray(np.broadcast_to(values, self.index.shape) if one else values[self.index])

    def reduce(self, x: F32) -> tuple[F32, F32]:
        """The smallest and the largest number of every block, 0 included."""
        lo, hi = np.zeros(self.grid, np.float32), np.zeros(self.grid, np.float32)
        np.minimum.at(lo.reshape(-1), self.index.reshape(-1), x.reshape(-1))
        np.maximum.at(hi.reshape(-1), self.index.reshape(-1), x.reshape(-1))
        return lo, hi


def _blocks(f: Format, shape: tuple[int, ...]) -> _Blocks:
    assert f.block is not None
    return _Blocks(f.block.grid(*shape), block_index(f.block, shape, None))


def _blocked(x: F32, to: Format, static: F32 | None, zero: F32 | None, clip: tuple[float, float]) -> QTensor:
    assert to.scale is not None
    rule, blocks = to.rule, _blocks(to, x.shape)
    offset: Plane | None = None
    if rule.domain == "mean" and to.offset is not None:
        offset = _mean(x, to, to.offset)
        x = x - np.float32(to.offset_sign) * blocks.spread(offset, to.offset)
    lo, hi = blocks.reduce(x)
    lo, hi = lo * np.float32(clip[0]), hi * np.float32(clip[1])
    if rule.clip == "range":
        low, high = lo.reshape(-1)[blocks.index], hi.reshape(-1)[blocks.index]
        x = np.select([x < low, x > high], [low, high], x)
    symmetric = np.maximum(hi, -lo)
    peak = {"minmax": hi - lo, "signed": np.where(hi > -lo, hi, lo)}.get(rule.domain, symmetric)
    plane = _scale(peak.astype(np.float32), _divisor(to), to, rule, static, 1.0)
    s = blocks.spread(plane, to.scale)
    if to.offset is not None and offset is None:
        offset = _lowest(lo, to, to.offset, _number(plane, to.scale))
        x = x - np.float32(to.offset_sign) * blocks.spread(offset, to.offset)
    q = x * s if to.op == "/" else x / s if rule.apply == "div" else x * (np.float32(1) / s)
    q = _arith(np.where(s == 0, np.where(np.isnan(x), x, np.float32(0)), q).astype(np.float32), rule)
    points: Plane | None = None
    if to.zero is not None:
        points = _zero(to, to.zero, lo, _number(plane, to.scale), zero)
        q = _arith(q + blocks.spread(points, to.zero), rule)
    return QTensor(to, _codes(to, q), plane, points, offset, table=_table(to))


def _scale(peak: F32, divisor: float, to: Format, rule: Rule, static: F32 | None, unit: float) -> Plane:
    """The plane whose value is peak / divisor (its reciprocal for `/`), in the format `to.scale`."""
    fmt = to.scale
    assert fmt is not None
    if fmt.plain:
        if static is not None:
            return _given(static, fmt.element, peak.shape)
        if fmt.element == "e8m0":
            codes = exponents(peak / np.float32(unit), to, rule)
            return _bytes("e8m0", np.where(codes == 255, 255, 254 - codes) if to.op == "/" else codes)
        if to.op == "/":
            return _wide(fmt.element, _reciprocal(peak, divisor, fmt.element, rule))
        empty = {"one": 1.0, "zero": 0.0, "eps": _EPS}[rule.empty]
        return _wide(fmt.element, np.where(peak == 0, np.float32(empty), _divide(peak, divisor, rule)))
    if fmt.offset is not None:
        return quantize(_divide(peak, divisor, rule), fmt, scale=static)
    blocks = _blocks(fmt, peak.shape)
    low, high = blocks.reduce(np.abs(peak))
    inner_top = 1.0 if fmt.element in (*WIDE, "e8m0") else elements.largest(fmt.element)
    outer = _scale(np.maximum(high, -low), divisor * inner_top, fmt, fmt.rule, static, divisor)
    assert fmt.scale is not None
    value = blocks.spread(outer, fmt.scale)

    def units(of: F32) -> F32:
        found = of / value if fmt.op == "*" else of * value
        return np.where(peak == 0, np.float32(0), found).astype(np.float32)

    if fmt.element == "e8m0":
        return QTensor(fmt, _bytes("e8m0", exponents(units(peak), to, rule)), outer)
    return QTensor(fmt, _codes(fmt, units(_divide(peak, divisor, rule))), outer, table=_table(fmt))


def _reciprocal(peak: F32, divisor: float, name: str, rule: Rule) -> F32:
    """divisor / peak, kept a normal finite number of the scale's type where the peak is finite; 1 for no peak."""
    d = np.float32(divisor)
    raw = d / peak if rule.scale == "div" else np.float32(1) / (peak * (np.float32(1) / d))
    raw = _arith(raw.astype(np.float32), rule)
    info = torch.finfo(element(name).storage)
    inside = np.copysign(np.clip(np.abs(raw), np.float32(info.smallest_normal), np.float32(info.max)), raw)
    return np.where(peak == 0, np.float32(1), np.where(np.isfinite(peak), inside, raw)).astype(np.float32)


def _divisor(f: Format) -> float:
    if f.rule.domain == "minmax":
        return elements.largest(f.element) - elements.smallest(f.element)
    if f.rule.domain == "signed":
        return elements.smallest(f.element)
    if f.rule.qmax is not None:
        return f.rule.qmax
    if f.element in WIDE:
        return 1.0  # only a static scale has no largest code to divide by
    half = f.zero is not None and f.element.startswith("uint")
    return 2.0 ** (element(f.element).bits - 1) - 1 if half else elements.largest(f.element)


def _divide(peak: F32, divisor: float, rule: Rule) -> F32:
    d = np.float32(divisor)
    return _arith((peak / d if rule.scale == "div" else peak * (np.float32(1) / d)).astype(np.float32), rule)


def _zero(to: Format, fmt: Format, lo: F32, scale: F32, static: F32 | None) -> torch.Tensor:
    if static is not None:
        return _given(static, fmt.element, lo.shape)
    low, high = elements.smallest(to.element), elements.largest(to.element)
    if to.rule.domain == "minmax":
        steps = lo * scale if to.op == "/" else lo / scale
        ideal = np.float32(low) - np.where(scale == 0, np.float32(0), steps).astype(np.float32)
    else:
        ideal = np.full(lo.shape, 0.0 if low < 0 else (high + 1) / 2, dtype=np.float32)
    if fmt.element not in WIDE and element(fmt.element).bits == element(to.element).bits:
        ideal = np.clip(ideal, np.float32(low), np.float32(high))
    return _wide(fmt.element, np.broadcast_to(ideal, lo.shape))


def _lowest(lo: F32, to: Format, fmt: Format, scale: F32) -> Plane:
    """The offset under which the smallest code is the smallest number."""
    bottom = np.float32(elements.smallest(to.element))
    wanted = (lo - (bottom / scale if to.op == "/" else bottom * scale)) * np.float32(to.offset_sign)
    return _wide(fmt.element, wanted) if fmt.plain else quantize(wanted, fmt)


def _mean(x: F32, to: Format, fmt: Format) -> torch.Tensor:
    """One value: the mean, with exact arithmetic, rounded to float64 and float32."""
    total = sum(map(Fraction, x.reshape(-1).tolist()), Fraction(0)) if np.isfinite(x).all() else None
    mean = np.nan if total is None else float(total) / max(x.size, 1)
    return _wide(fmt.element, np.full((1, 1), to.offset_sign * mean, dtype=np.float64).astype(np.float32))


def _given(static: F32, name: str, grid: tuple[int, ...]) -> torch.Tensor:
    """Static numbers as a plane: plain floats as they are, powers of two as exponents, others as codes."""
    values = np.broadcast_to(static.reshape(1, 1) if static.size == 1 else static.reshape(grid), grid)
    if name == "e8m0":
        return _bytes(name, (np.frexp(values)[1] + 126).astype(np.int64))
    return torch.tensor(values) if name in WIDE else _wide(name, values)


def _wide(name: str, values: F32) -> torch.Tensor:
    """Numbers rounded (half to even) to codes of a type, or to a plain float."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if name in WIDE:
        return torch.tensor(elements.round_wide(name, values)).to(WIDE[name])
    return _bytes(name, elements.nearest_code(name, values.astype(np.float64)))


def _codes(to: Format, q: F32) -> torch.Tensor:
    if to.element in WIDE:
        return _wide(to.element, q)
    codes = elements.nearest_code(to.element, q.astype(np.float64), away=to.rule.round == "away")
    return _bytes(to.element, codes)


def _bytes(name: str, codes: I64) -> torch.Tensor:
    return torch.from_numpy((codes & 0xFF).astype(np.uint8)).view(element(name).storage)


def _table(f: Format) -> torch.Tensor | None:
    return torch.tensor(elements.table("lut8").astype(np.float32)) if f.element == "lut8" else None


def _number(plane: Plane, fmt: Format) -> F32:
    if isinstance(plane, QTensor):
        return decode(plane).value
    if fmt.element in WIDE:
        return numbers(plane)
    return elements.table(fmt.element)[plane.view(torch.uint8).numpy().astype(np.int64)].astype(np.float32)


def _arith(x: F32, rule: Rule) -> F32:
    return elements.round_wide("bf16", np.ascontiguousarray(x)) if rule.arith == "bf16" else x
