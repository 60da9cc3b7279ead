"""From numbers to codes and scales, in registers: the steps of `qhal.encoding`, exact to the bit.

For any kernel, F being a `Recipe`: `clean` what was loaded, `extremes` of the elements of every block, `range_of` them,
`scale_of` and `zero_of` that range, `codes_of` the elements. A kernel that calls these is launched with
`enable_fp_fusion=False`.

A part of a constant is named (`LEVEL: tl.constexpr = F.level`) where it is handed on: Triton 3.6 needs that.
"""

import triton
import triton.language as tl

from qhal_triton.bits import INTERPRETED, e8m0_value, integer_code, minifloat_code, narrow, value_of, widen

INF = tl.constexpr(float("inf"))
MANY = tl.constexpr(1024)
"""Numbers of a tensor from which every thread holds several, with the warps that `config.py` gives."""


@triton.jit
def clean(x, F: tl.constexpr):
    """What was loaded, any float, as everything sees it: fp32, special values as the rule says."""
    y = widen(x)
    if F.saturate:
        y = tl.where(y != y, 0.0, tl.minimum(tl.maximum(y, -3.4028234663852886e38), 3.4028234663852886e38))
    if F.bf16:
        y = widen(narrow(y, tl.bfloat16))
    return y


@triton.jit
def extremes(x, AXIS: tl.constexpr, F: tl.constexpr):
    """(down, up): the largest -x and the largest x along AXIS, at least 0, as the bits of an fp32 number in int32.

    Integers order them as numbers do, and NaN above all: parts are joined with `tl.maximum`, an empty part is 0. If
    only the magnitude matters (F.amax) both are that.
    """
    bits = x.to(tl.int32, bitcast=True)
    if F.amax:
        up = tl.max(bits & 0x7FFFFFFF, AXIS)
        down = up
    else:
        up = tl.maximum(tl.max(bits, AXIS), 0)
        down = tl.maximum(tl.max(bits ^ -2147483648, AXIS), 0)
    return down, up


@triton.jit
def range_of(down, up, low_kept, high_kept, F: tl.constexpr):
    """(lo, hi) of every block in fp32: lo <= 0 <= hi, the fractions of them that a clip keeps; both NaN, or none."""
    lost = tl.maximum(down, up) > 0x7F800000
    lo = 0.0 - tl.where(lost, 0x7FC00000, down).to(tl.float32, bitcast=True)
    hi = tl.where(lost, 0x7FC00000, up).to(tl.float32, bitcast=True)
    if F.clip:
        lo = lo * low_kept + 0.0  # there is one zero
        hi = hi * high_kept + 0.0
    return lo, hi


@triton.jit
def peak_of(lo, hi, F: tl.constexpr):
    """What the scale is made from."""
    if F.domain == "minmax":
        peak = hi - lo
    elif F.domain == "signed":
        peak = tl.where(hi > -lo, hi, lo)
    else:
        peak = tl.where((hi > -lo) | (hi != hi), hi, 0.0 - lo)
    return peak


@triton.jit
def _rounded(x, BF16: tl.constexpr):
    return widen(narrow(x, tl.bfloat16)) if BF16 else x


@triton.jit
def divided(peak, L: tl.constexpr):
    """peak / divisor as the level's rule says."""
    raw = peak * L.inverse if L.rcp else tl.div_rn(peak, tl.full(peak.shape, L.divisor, tl.float32))
    return _rounded(raw, L.bf16)


@triton.jit
def wide_scale(peak, L: tl.constexpr):
    """fp32 value of a scale that is kept in 16 or 32 bits."""
    if L.divides:
        if L.rcp:
            raw = tl.div_rn(tl.full(peak.shape, 1.0, tl.float32), peak * L.inverse)
        else:
            raw = tl.div_rn(tl.full(peak.shape, L.divisor, tl.float32), peak)
        raw = _rounded(raw, L.bf16)
        least: tl.constexpr = 6.103515625e-05 if L.code.name == "fp16" else 1.1754943508222875e-38
        kept = tl.minimum(tl.maximum(tl.abs(raw), least), L.code.high)
        raw = tl.where(tl.abs(peak) < INF, tl.where(raw < 0, -kept, kept), raw)
        raw = tl.where(peak == 0, 1.0, raw)
    else:
        raw = divided(peak, L)
        if L.empty != 0:
            raw = tl.where(peak == 0, L.empty, raw)
    NAME: tl.constexpr = L.code.name
    return to_wide(raw, NAME)


@triton.jit
def to_wide(x, NAME: tl.constexpr):
    """fp32 rounded to a wide float, as fp32."""
    if NAME == "bf16":
        x = widen(narrow(x, tl.bfloat16))
    elif NAME == "fp16":
        x = widen(narrow(x, tl.float16))
    return x


@triton.jit
def exponent_code(peak, F: tl.constexpr):
    """int32 e8m0 code of a peak, see `qhal.exponents`."""
    size = tl.abs(peak)
    if F.e8m0 == "ceil":
        size = tl.div_rn(size, tl.full(peak.shape, F.level.divisor, tl.float32))
    elif F.e8m0 == "over1.75":
        size = tl.div_rn(size, tl.full(peak.shape, 7.0, tl.float32)) * 8.0 + 9.6e-7
    subnormal = size < 1.1754943508222875e-38
    bits = tl.where(subnormal, size * 16777216.0, size).to(tl.int32, bitcast=True)
    power = (bits >> 23) - tl.where(subnormal, 127 + 24, 127)
    fraction = bits & 0x7FFFFF
    if F.e8m0 == "ceil":
        power = tl.where(size == 0, 0, power + (fraction != 0).to(tl.int32))
    else:
        if F.e8m0 == "up1.75":
            power += (fraction >= 0x600000).to(tl.int32)
        elif F.e8m0 == "even":
            power += (fraction >= (1 << 23) - (1 << (22 - F.mantissa))).to(tl.int32)
        power -= F.top
    code = tl.minimum(tl.maximum(power + 127, 0), 254)
    code = tl.where(peak == 0, 127 if F.level.empty == 1 else 0, code)
    return tl.where(tl.abs(peak) < INF, code, 255)


@triton.jit
def scale_of(peak, outer, F: tl.constexpr):
    """(plane, number) of every block: the number that elements are divided by, and what its plane stores.

    plane is the number for a wide scale, an int32 code of e8m0 or fp8 otherwise. outer: the number of the level above
    for two-level scales, else anything.
    """
    LEVEL: tl.constexpr = F.level
    if F.e8m0 != "":
        plane = exponent_code(peak, F)
        number = e8m0_value(plane)
    elif F.outer is None:
        number = wide_scale(peak, LEVEL)
        plane = number
    else:
        CODE: tl.constexpr = F.level.code
        wanted = divided(peak, LEVEL)
        outer += tl.zeros_like(wanted)
        ratio = wanted * outer if F.outer.divides else tl.div_rn(wanted, outer)
        plane = element_code(tl.where(peak == 0, 0.0, ratio), CODE, False)
        NAME: tl.constexpr = F.level.code.name
        inner = value_of(plane, NAME)
        number = tl.div_rn(inner, outer) if F.outer.divides else inner * outer
    return plane, number


@triton.jit
def zero_of(lo, scale, F: tl.constexpr):
    """(plane, number) of the zero points; lo, scale: fp32 of every block."""
    if F.zero == "computed":
        steps = lo * scale if F.level.divides else tl.div_rn(lo, scale)
        ideal = F.code.low - tl.where(scale == 0, 0.0, steps)
    else:
        ideal = tl.full(lo.shape, F.middle, tl.float32)
    if F.zero_code.kind == "int":
        plane = integer_code(ideal, F.zero_code.low, F.zero_code.high)
        number = plane.to(tl.float32)
    else:
        NAME: tl.constexpr = F.zero_code.name
        number = to_wide(ideal, NAME)
        plane = number
    return plane, number


@triton.jit
def codes_of(x, scale, zero, lo, hi, F: tl.constexpr):
    """int32 codes of the elements. scale, zero, lo, hi: fp32 of their blocks, in a shape that broadcasts to x."""
    if F.clamp:  # a number inside keeps its bits, -0 too
        x = tl.where(x < lo, lo, tl.where(x > hi, hi, x))
    q = _quotient(x, scale, F)
    if F.zero != "":
        q = _rounded(q + zero, F.bf16)
    CODE: tl.constexpr = F.code
    return element_code(q, CODE, q.numel >= MANY)


@triton.jit
def _quotient(x, s, F: tl.constexpr):
    """x / s as the rule says, rounded once; 0 for numbers under a scale of 0."""
    ones = tl.full(s.shape, 1.0, tl.float32)
    if F.level.divides and F.outer is None:
        q = x * s
    elif F.reciprocal or F.e8m0 != "":  # the reciprocal of a power of two is exact
        q = x * tl.div_rn(ones, s)
    elif F.quick and not INTERPRETED:
        q = _quick(x, s, ones)
    else:
        q = tl.div_rn(x, s + tl.zeros_like(x))
    q = _rounded(q, F.bf16)
    if F.e8m0 == "":
        q = tl.where((s == 0) & (x == x), 0.0, q)
    return q


@triton.jit
def _quick(x, s, ones):
    """x / s rounded once, for x of at most 11 significant bits and quotients up to 2^40 (Recipe.quick).

    A product with the rounded reciprocal and one correction (Markstein, IBM Journal of Research and Development 34,
    1990); all 2^33 pairs of mantissas were tried. A scale that is far out is moved by a power of two, x with it: what
    then underflows, or does here without it, is below 2^-20 and becomes code 0 however it is rounded.
    """
    far = tl.where(tl.abs(s) < 2.0**-60, 2.0**80, tl.where(tl.abs(s) > 2.0**60, 2.0**-80, 1.0))
    t = tl.where(tl.abs(s) == INF, 0.0, s * far)
    y = tl.where(tl.abs(s) == INF, 0.0, tl.div_rn(ones, t))
    v = x * far
    near = v * y
    q = tl.fma(tl.fma(-t, near, v), y, near)
    sign = (x.to(tl.int32, bitcast=True) ^ s.to(tl.int32, bitcast=True)) & -2147483648
    return ((q.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | sign).to(tl.float32, bitcast=True)


@triton.jit
def element_code(q, C: tl.constexpr, NATIVE: tl.constexpr):
    """int32 code of fp32 q; C: a `Code` of an integer or a small float. The low byte is what is stored.

    NATIVE: fp8 by the chip's conversion. Triton 3.6 gives a thread that holds a single number wrong codes, so only
    where threads hold many.
    """
    if C.kind == "int":
        if C.away:
            size = tl.abs(q)
            whole = tl.floor(size)
            q = tl.where(q < 0, -1.0, 1.0) * tl.where(size - whole >= 0.5, whole + 1.0, whole)
        code = integer_code(q, C.low, C.high)
    elif NATIVE and C.native and not INTERPRETED:
        if C.name == "e5m2":
            code = q.to(tl.float8e5).to(tl.uint8, bitcast=True).to(tl.int32)
        else:
            code = q.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        code = minifloat_code(q, C.e, C.m, C.bias, C.largest, C.nan)
        if C.nan == 0x80:  # these have one zero, and NaN where others have its negative
            code = tl.where((code == 0x80) & (q == q), 0, code)
    return code
