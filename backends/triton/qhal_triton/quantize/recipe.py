"""Recipe: a format and its rule as the constants that one compiled kernel has, or None where no kernel follows them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from qhal.elements import MINI, element
from qhal.errors import QhalError
from qhal.exponents import reach
from qhal.formats import Format
from qhal.rules import Rule
from qhal_triton.target import Target

FLOAT8 = {
    "e4m3fn": (4, 3, 7, 0x7E, 0x7F),
    "e5m2": (5, 2, 15, 0x7B, 0x7F),
    "e4m3fnuz": (4, 3, 8, 0x7F, 0x80),
    "e5m2fnuz": (5, 2, 16, 0x7F, 0x80),
}
"""Exponent bits, mantissa bits, bias, code of the largest number, code of NaN."""
_MANTISSA = {"e2m1": 1, "e3m2": 2, "e2m3": 3, "e4m3fn": 3, "e4m3fnuz": 3, "e5m2": 2, "e5m2fnuz": 2}
_TINY = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Code:
    """How a number becomes a code of one element.

    kind           int | mini (of e, m, bias, largest, nan: see `bits.minifloat_code`) | wide
    native         the target's own conversion rounds and saturates just so
    """

    name: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    away: bool = False
    e: int = 0
    m: int = 0
    bias: int = 0
    largest: int = 0
    nan: int = 0
    native: bool = False


@dataclass(frozen=True)
class Level:
    """peak -> scale, of one level: peak / divisor in fp32 (`rcp`: peak * inverse), `empty` where the peak is 0.

    divides  the scale divides: divisor / peak
    """

    divisor: float
    inverse: float
    rcp: bool
    bf16: bool
    empty: float
    divides: bool
    code: Code


@dataclass(frozen=True)
class Recipe:
    """Constants of the kernels in `kernels/`; `qhal.encoding` says what each means.

    amax         only the largest magnitude matters: domain amax, nothing clipped
    e8m0         the rule of a power-of-two scale, "" for other scales; top: exponent of the largest code
    outer        the level above, for two-level scales
    static       the (outermost) scale is given, of one value
    zero         "" | computed | middle | given
    quick        x has at most 11 significant bits, so three multiplications divide exactly
    """

    code: Code
    level: Level
    domain: str
    amax: bool
    clip: bool
    clamp: bool
    reciprocal: bool
    bf16: bool
    saturate: bool
    quick: bool
    static: bool
    e8m0: str = ""
    top: int = 0
    mantissa: int = 0
    outer: Level | None = None
    zero: str = ""
    zero_code: Code | None = None
    middle: float = 0.0


@lru_cache(maxsize=4096)
def recipe(to: Format, x: torch.dtype, *, static: bool, target: Target, clipped: bool = False) -> Recipe | None:
    """The constants for quantizing x to a format; None where the portable code must serve."""
    try:
        return _recipe(to, x, static, target, clipped)
    except QhalError:  # the definition refuses; its own words are the portable code's
        return None


def _recipe(to: Format, x: torch.dtype, static: bool, target: Target, clipped: bool) -> Recipe | None:
    rule, block, fmt = to.rule, to.block, to.scale
    if block is None or fmt is None or to.sparsity is not None or to.offset is not None:
        return None
    if block.kind not in ("row", "group", "tile", "tensor") or rule.domain == "mean" or rule.special == "error":
        return None
    code = _code(to.element, rule, target)
    if code is None or code.kind == "wide" or (block.kind != "tensor" and static and fmt.plain):
        return None
    made = Recipe(
        code=code,
        level=_level(to, rule, 1.0 if static and fmt.plain else _divisor(to), target),
        domain=rule.domain,
        amax=rule.domain == "amax" and not clipped,
        clip=clipped,
        clamp=clipped and rule.clip == "range",
        reciprocal=rule.apply == "rcp",
        bf16=rule.arith == "bf16",
        saturate=rule.special == "saturate",
        quick=x in (torch.bfloat16, torch.float16) and not clipped and not static and abs(_divisor(to)) < 2.0**20,
        static=static,
    )
    if fmt.plain:
        if made.level.code.kind == "exponent":
            e = element(to.element)
            if static or to.op == "/" or (rule.e8m0 == "even" and to.element not in _MANTISSA):
                return None
            top = math.frexp(reach(to, e))[1] - 1
            level = _level(to, rule, to.qmax, target)
            made = replace(made, level=level, e8m0=rule.e8m0, top=top, mantissa=_MANTISSA.get(to.element, 0))
        elif made.level.code.kind != "wide":
            return None
    elif (found := _nested(made, to, static, target)) is not None:
        made = found
    else:
        return None
    return _zero(made, to, static, target)


def _nested(made: Recipe, to: Format, static: bool, target: Target) -> Recipe | None:
    """Scales of fp8 under one number for the whole tensor (NVFP4)."""
    fmt = to.scale
    assert fmt is not None and fmt.scale is not None and fmt.block is not None
    simple = fmt.zero is None and fmt.offset is None and fmt.sparsity is None and fmt.rule.domain == "amax"
    if not simple or fmt.block.kind != "tensor" or not fmt.scale.plain or to.op == "/" or to.zero is not None:
        return None
    if to.rule.domain != "amax" or made.level.code.kind != "mini" or element(fmt.scale.element).kind != "float":
        return None
    if not element(fmt.scale.element).wide or to.block is None or to.block.kind == "tensor":
        return None
    if fmt.op == "/" and fmt.rule.empty != "one" and not static:
        return None
    divisor = 1.0 if static else _divisor(to) * reach(fmt, element(fmt.element))
    return replace(made, outer=_level(fmt, fmt.rule, divisor, target))


def _zero(made: Recipe, to: Format, static: bool, target: Target) -> Recipe | None:
    if to.zero is None:
        return made
    e, z = element(to.element), element(to.zero.element)
    if not to.zero.plain or not (z.integer or z.wide) or made.e8m0:
        return None
    code = _code(to.zero.element, Rule(), target)
    assert code is not None
    if z.integer and z.bits == e.bits:
        code = replace(code, low=max(code.low, e.smallest), high=min(code.high, e.largest))
    middle = 0.0 if e.smallest < 0 else 2.0 ** (e.bits - 1)
    kind = "given" if static else "computed" if to.rule.domain == "minmax" else "middle"
    return replace(made, zero=kind, zero_code=code, middle=middle)


def _level(of: Format, rule: Rule, divisor: float, target: Target) -> Level:
    assert of.scale is not None
    code = _code(of.scale.element, Rule(round=of.scale.rule.round), target)
    one = torch.ones((), device="cpu")
    return Level(
        divisor=float(one * divisor),
        inverse=float(one / divisor),
        rcp=rule.scale == "rcp",
        bf16=rule.arith == "bf16",
        empty={"one": 1.0, "zero": 0.0, "eps": _TINY}[rule.empty],
        divides=of.op == "/",
        code=code or Code(of.scale.element, "exponent" if element(of.scale.element).kind == "exponent" else "none"),
    )


def _divisor(to: Format) -> float:
    """As `qhal.encoding` divides; what it refuses never comes here."""
    e = element(to.element)
    if to.rule.domain == "minmax":
        return e.largest - e.smallest
    return e.smallest if to.rule.domain == "signed" else to.qmax


def _code(name: str, rule: Rule, target: Target) -> Code | None:
    e = element(name)
    fields: dict[str, Any] = {"low": e.smallest, "high": e.largest}
    if e.integer:
        return Code(name, "int", away=rule.round == "away", **fields)
    if e.wide:
        return Code(name, "wide", **fields)
    if rule.round != "even":
        return None
    if name in MINI:
        bits, m, bias = MINI[name]
        return Code(name, "mini", e=bits, m=m, bias=bias, largest=(1 << (bits + m)) - 1, **fields)
    if name in FLOAT8:
        bits, m, bias, largest, nan = FLOAT8[name]
        native = target.kind == "cuda" and name in target.fp8 and name in ("e4m3fn", "e5m2")
        return Code(name, "mini", e=bits, m=m, bias=bias, largest=largest, nan=nan, native=native, **fields)
    return None
