"""What every code of every element type stands for, written down a second time, from the specifications.

Independent of `qhal.elements` on purpose: a wrong table there is seen here. Sources: OCP 8-bit Floating Point
Specification rev 1.0 (e4m3, e5m2), OCP Microscaling Formats v1.0 section 5.3 (e3m2, e2m3, e2m1, e8m0), the finite-only
"fnuz" flavours (bias one larger, 0x80 is the only NaN), the QLoRA paper appendix E (nf4), dynamic tree quantization of
Dettmers 2016 (lut8, as far as it is encoded).
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np

from qhal_conformance.generator import F32, F64, I64

_LAYOUT = {  # exponent bits, mantissa bits, bias, kind of special codes
    "e4m3fn": (4, 3, 7, "fn"),
    "e4m3fnuz": (4, 3, 8, "fnuz"),
    "e5m2": (5, 2, 15, "ieee"),
    "e5m2fnuz": (5, 2, 16, "fnuz"),
    "e3m2": (3, 2, 3, "finite"),
    "e2m3": (2, 3, 1, "finite"),
    "e2m1": (2, 1, 1, "finite"),
}
_NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)
WIDE_BITS = {"fp32": 23, "fp16": 10, "bf16": 7}
"""Explicit fraction bits of the plain float types."""


def is_integer(name: str) -> bool:
    """Whether codes are integers that stand for themselves."""
    return name.startswith(("int", "uint"))


@cache
def table(name: str) -> F64:
    """float64 value of code 0, 1, ... of a small float, exponent or nf4 type; integers: of the byte that holds it."""
    if name in _LAYOUT:
        return _floats(*_LAYOUT[name])
    if name == "e8m0":
        return np.array([2.0 ** (c - 127) for c in range(255)] + [np.nan])
    if name == "lut8":
        return _dynamic_tree()
    if name == "nf4":
        return np.array([float(v) for v in _NF4.split()], dtype=np.float32).astype(np.float64)
    if name.startswith("int"):
        return np.array([float(c if c < 128 else c - 256) for c in range(256)])
    if name.startswith("uint"):
        return np.arange(256, dtype=np.float64)
    raise KeyError(f"no table for the element {name!r}")


def _floats(e: int, m: int, bias: int, special: str) -> F64:
    values = []
    for code in range(1 << (1 + e + m)):
        sign = -1.0 if code >> (e + m) else 1.0
        exponent, fraction = (code >> m) & ((1 << e) - 1), code & ((1 << m) - 1)
        if exponent:
            value = sign * (1.0 + fraction / 2.0**m) * 2.0 ** (exponent - bias)
        else:
            value = sign * fraction * 2.0 ** (1 - bias - m)
        if special == "fnuz" and code == 1 << (e + m):
            value = np.nan
        if special == "fn" and exponent == (1 << e) - 1 and fraction == (1 << m) - 1:
            value = np.nan
        if special == "ieee" and exponent == (1 << e) - 1:
            value = sign * np.inf if fraction == 0 else np.nan
        values.append(value)
    return np.array(values)


def _dynamic_tree() -> F64:
    """0, 1 and, with both signs, 2^i values in the decade below 10^(i-6): middles of equal parts of 0.1 to 1.

    float32 numbers. Edges are counted from the nearer end and rounded once, middles and products once each.
    """
    single = np.float32
    low = float(single(0.1))
    step = float(single(1.0) - single(0.1))
    found = [0.0, 1.0]
    for i in range(7):
        parts = 2**i
        half = (parts + 1) // 2
        edges = [
            single(low + step * j / parts if j < half else 1.0 - step * (parts - j) / parts) for j in range(parts + 1)
        ]
        for a, b in itertools.pairwise(edges):
            value = float(single(10.0 ** (i - 6)) * ((a + b) / single(2)))
            found += [value, -value]
    return np.array(sorted(found))


def mantissa_bits(name: str) -> int:
    """Explicit fraction bits of a small float type."""
    return _LAYOUT[name][1]


@cache
def finite_codes(name: str) -> I64:
    """Every code that stands for a finite number, as the byte that holds it."""
    if is_integer(name):
        bits = int(name.lstrip("uint"))
        codes = np.arange(1 << bits, dtype=np.int64)
        return codes if name.startswith("uint") else (codes - (1 << (bits - 1))) & 0xFF
    return np.flatnonzero(np.isfinite(table(name))).astype(np.int64)


@cache
def largest(name: str) -> float:
    """The largest finite value."""
    return float(table(name)[finite_codes(name)].max())


@cache
def smallest(name: str) -> float:
    """The most negative finite value."""
    return float(table(name)[finite_codes(name)].min())


@cache
def _grid(name: str) -> tuple[F64, I64]:
    """Finite values in rising order with their codes; of two zeros the positive one is kept."""
    codes = finite_codes(name)
    values = table(name)[codes]
    keep = ~((values == 0) & np.signbit(values))
    order = np.argsort(values[keep], kind="stable")
    return values[keep][order], codes[keep][order]


@cache
def _steps(name: str, away: bool) -> tuple[F64, I64]:
    """For numbers in rising order: where the next finite value begins, and the code of each.

    Between two neighbours the border is their middle, exact in float64; it belongs to the side that wins the tie.
    """
    values, codes = _grid(name)
    low, high = values[:-1], values[1:]
    upper = np.abs(high) > np.abs(low) if away else codes[1:] % 2 == 0
    if name in ("nf4", "lut8"):
        upper = np.zeros(len(low), dtype=bool)
    middle = (low + high) / 2
    return np.where(upper, middle, np.nextafter(middle, np.inf)), codes


def nearest_code(name: str, q: F64, *, away: bool = False) -> I64:
    """The code whose value is nearest to each number; a tie goes to the even code (or away from zero); saturates.

    Tables (nf4, lut8): a tie goes to the smaller value.

    NaN becomes the type's NaN if it has one, else code 0. A negative number that rounds to zero becomes -0 where the
    type has one.
    """
    if is_integer(name) and not away:
        return np.rint(np.nan_to_num(np.clip(q, smallest(name), largest(name)))).astype(np.int64) & 0xFF
    borders, codes = _steps(name, away)
    found = np.asarray(codes[np.searchsorted(borders, q, side="right")])
    if name in _LAYOUT and _LAYOUT[name][3] != "fnuz":
        top = 1 << (_LAYOUT[name][0] + _LAYOUT[name][1])
        found[(found == 0) & np.signbit(q)] = top
    unknown = np.isnan(q)
    if unknown.any():
        missing = np.flatnonzero(np.isnan(table(name)))
        found[unknown] = missing[0] if len(missing) else 0
    return found


def round_wide(name: str, value: F32) -> F32:
    """Round float32 to fp16 or bf16 (half to even), as float32; fp32 is returned as it is."""
    if name == "fp32":
        return value
    if name == "fp16":
        with np.errstate(over="ignore"):
            return value.astype(np.float16).astype(np.float32)
    bits = value.view(np.uint32).astype(np.uint64)
    rounded = ((bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)) << np.uint64(16)
    return np.where(np.isnan(value), value, rounded.astype(np.uint32).view(np.float32))
