"""Quantization computed a second time, with numpy and the tables of `elements.py`: what `quantize` must give, bit for
bit.

Independent of `qhal.encoding` on purpose. float32 steps, each rounded once: amax (or range) of the block, divided by
qmax, rounded to the scale's type; x divided by the scale; half to even; saturated. Outer levels of a nested scale come
first. A second implementation of every Rule field that the formats of the suite use; others raise NotImplementedError.
"""

from __future__ import annotations

import numpy as np
import torch

from qhal.elements import WIDE, element
from qhal.formats import Format
from qhal.rules import Rule
from qhal.tensors import QTensor
from qhal_conformance import elements
from qhal_conformance.decode import block_index, decode, numbers
from qhal_conformance.generator import F32, F64, I64


def quantize(x: F32, to: Format, *, scale: F32 | None = None) -> QTensor:
    """x [m, k] to codes and scales. scale: a static outermost level, one value."""
    if to.rule.domain not in ("amax", "minmax", "signed") or to.rule.clip != "scale":
        raise NotImplementedError(f"the suite has no second implementation of {to}")
    if to.rule.special == "saturate":
        x = np.nan_to_num(x)
    if to.block is None or to.scale is None:
        return QTensor(to, _codes(to, x))
    with np.errstate(all="ignore"):
        return _blocked(_arith(x, to.rule), to, scale)


def _blocked(x: F32, to: Format, static: F32 | None) -> QTensor:
    assert to.block is not None and to.scale is not None
    grid = to.block.grid(*x.shape)
    index = block_index(to.block, x.shape, None)
    lo, hi = np.zeros(grid, np.float32).reshape(-1), np.zeros(grid, np.float32).reshape(-1)
    np.minimum.at(lo, index.reshape(-1), x.reshape(-1))
    np.maximum.at(hi, index.reshape(-1), x.reshape(-1))
    peak = {"amax": np.maximum(hi, -lo), "minmax": hi - lo, "signed": np.where(hi > -lo, hi, lo)}[to.rule.domain]
    plane = _scale(peak.reshape(grid).astype(np.float32), _divisor(to), to, to.scale, to.rule, static)
    number = _number(plane, to.scale).reshape(-1)
    spread = np.broadcast_to(number, x.shape) if number.size == 1 else number[index]
    q = x / spread if to.rule.apply == "div" else x * (np.float32(1) / spread)
    q = _arith(np.where(spread == 0, np.where(np.isnan(x), x, np.float32(0)), q).astype(np.float32), to.rule)
    zero = None
    if to.zero is not None:
        points = _zero_points(to, lo, number)
        shape = grid if number.size != 1 else (1, 1)
        zero = _store(to.zero, points.reshape(shape))
        value = elements.table(to.zero.element)[points].astype(np.float32)
        q = _arith(q + (value.reshape(1, 1) if value.size == 1 else value[index]), to.rule)
    return QTensor(to, _codes(to, q), plane, zero)


def _scale(
    peak: F32, divisor: float, to: Format, fmt: Format, rule: Rule, static: F32 | None
) -> torch.Tensor | QTensor:
    """The plane whose value is peak / divisor, in the format `fmt`."""
    if fmt.plain:
        if fmt.element == "e8m0":
            return torch.from_numpy(_exponents(peak, to, rule).astype(np.uint8))
        if static is not None:
            raw = np.broadcast_to(static.reshape(1, 1) if static.size == 1 else static.reshape(peak.shape), peak.shape)
        else:
            raw = _divide(peak, divisor, rule)
            empty = {"one": 1.0, "zero": 0.0, "eps": float(np.finfo(np.float32).eps)}[rule.empty]
            raw = np.where(peak == 0, np.float32(empty), raw)
        rounded = elements.round_wide(fmt.element, np.ascontiguousarray(raw, dtype=np.float32))
        return torch.tensor(rounded).to(WIDE[fmt.element])
    assert fmt.block is not None and fmt.scale is not None
    if fmt.op != "*":
        raise NotImplementedError(f"the suite has no second implementation of {fmt}")
    largest = 1.0 if fmt.element == "e8m0" else elements.largest(fmt.element)
    outer_grid = fmt.block.grid(*peak.shape)
    index = block_index(fmt.block, peak.shape, None)
    outer_peak = np.zeros(outer_grid, np.float32).reshape(-1)
    np.maximum.at(outer_peak, index.reshape(-1), np.abs(peak).reshape(-1))
    outer = _scale(outer_peak.reshape(outer_grid), divisor * largest, fmt, fmt.scale, fmt.rule, static)
    value = _number(outer, fmt.scale).reshape(-1)
    spread = np.broadcast_to(value, peak.shape) if value.size == 1 else value[index]
    if fmt.element == "e8m0":
        rest = np.where(peak == 0, np.float32(0), peak / spread).astype(np.float32)
        return QTensor(fmt, torch.from_numpy(_exponents(rest, to, rule).astype(np.uint8)), outer)
    ratio = np.where(peak == 0, np.float32(0), _divide(peak, divisor, rule) / spread).astype(np.float32)
    return QTensor(fmt, _codes(fmt, ratio), outer)


def _divisor(f: Format) -> float:
    if f.rule.domain == "minmax":
        return elements.largest(f.element) - elements.smallest(f.element)
    if f.rule.domain == "signed":
        return elements.smallest(f.element)
    return f.rule.qmax if f.rule.qmax is not None else elements.largest(f.element)


def _divide(peak: F32, divisor: float, rule: Rule) -> F32:
    d = np.float32(divisor)
    return _arith((peak / d if rule.scale == "div" else peak * (np.float32(1) / d)).astype(np.float32), rule)


def _exponents(peak: F32, to: Format, rule: Rule) -> I64:
    """e8m0 codes by the exponent of the peak (OCP Microscaling v1.0 section 6.3) or, `ceil`, of peak / qmax."""
    size: F64 = np.abs(peak.astype(np.float64))
    top = int(np.frexp(elements.largest(to.element))[1]) - 1
    if rule.e8m0 == "floor":
        power = np.frexp(size)[1].astype(np.int64) - 1 - top
    elif rule.e8m0 == "ceil":
        quotient = (np.abs(peak) / np.float32(_divisor(to))).astype(np.float64)
        mantissa, exponent = np.frexp(quotient)
        power = np.where(mantissa == 0.5, exponent - 1, exponent).astype(np.int64)
    else:
        raise NotImplementedError(f"the suite has no second implementation of e8m0={rule.e8m0}")
    code = np.clip(power + 127, 0, 254)
    code = np.where(size == 0, 127 if rule.empty == "one" else 0, code)
    return np.where(np.isfinite(size), code, 255).astype(np.int64)


def _zero_points(to: Format, lo: F32, scale: F32) -> I64:
    assert to.zero is not None
    low, high = elements.smallest(to.element), elements.largest(to.element)
    if to.rule.domain == "minmax":
        ideal = np.float32(low) - np.where(scale == 0, np.float32(0), lo / scale).astype(np.float32)
    else:
        ideal = np.full(lo.shape, 0.0 if low < 0 else (high + 1) / 2, dtype=np.float32)
    if element(to.zero.element).bits == element(to.element).bits:
        ideal = np.clip(ideal, np.float32(low), np.float32(high))
    return elements.nearest_code(to.zero.element, ideal.astype(np.float64))


def _codes(to: Format, q: F32) -> torch.Tensor:
    if to.element in WIDE:
        return torch.tensor(elements.round_wide(to.element, np.ascontiguousarray(q))).to(WIDE[to.element])
    codes = elements.nearest_code(to.element, q.astype(np.float64), away=to.rule.round == "away")
    return _bytes(to.element, codes)


def _store(f: Format, codes: I64) -> torch.Tensor:
    return _bytes(f.element, codes)


def _bytes(name: str, codes: I64) -> torch.Tensor:
    return torch.from_numpy((codes & 0xFF).astype(np.uint8)).view(element(name).storage)


def _number(plane: torch.Tensor | QTensor, fmt: Format) -> F32:
    if isinstance(plane, QTensor):
        return decode(plane).value
    if fmt.element == "e8m0":
        return elements.table("e8m0")[plane.numpy().astype(np.int64)].astype(np.float32)
    return numbers(plane)


def _arith(x: F32, rule: Rule) -> F32:
    return elements.round_wide("bf16", np.ascontiguousarray(x)) if rule.arith == "bf16" else x
