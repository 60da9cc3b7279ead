"""Device functions that are exact to the bit: codes to numbers, numbers to codes, one rounding to 16 bits.

Small floats are coded by integer arithmetic on the bits of fp32, so that the interpreter and every compiler give the
same codes; the definitions are those of `qhal.elements` and `qhal.rounding`: half to even, saturated.

Two rules for kernels: divide with `tl.div_rn` where a contract fixes bits (`/` may be off by an ulp), and launch them
with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from qhal_triton import interpreting

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""The interpreter multiplies bf16 wrongly, cuts fp32 to bf16 (triton-lang/triton#11584) and misreads its subnormals:
see `dot`, `narrow`, `widen`."""

if INTERPRETED:
    interpreting.prepare_once()


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to fp32, fp16 or bf16, half to even, overflow to Inf."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        odd = (bits >> 16) & 1
        kept = tl.where(x == x, (bits + 0x7FFF + odd) >> 16, 0x7FC0)
        return kept.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def widen(x):
    """Any float to fp32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b: fp32 sums of exact products, int32 sums of int8."""
    if a.dtype == tl.int8:
        total = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif INTERPRETED or a.dtype == tl.float32:
        total = tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    else:
        total = tl.dot(a, b, acc)
    return total


_TIMES = "{{ .reg .b32 no; mov.b32 no, 0x80008000; fma.rn.{} $0, $1, $2, no; }}"
TIMES_BF16, TIMES_FP16 = tl.constexpr(_TIMES.format("bf16x2")), tl.constexpr(_TIMES.format("f16x2"))


@triton.jit
def times(a, b):
    """a * b of one 16-bit type and shape, rounded once, by NVIDIA's packed instructions; not interpreted."""
    if a.dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(TIMES_BF16, "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        y = tl.inline_asm_elementwise(TIMES_FP16, "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2)
    return y


@triton.jit
def store(pointer, value, mask):
    """A number, rounded once, or the low byte of a code, to a plane of any type."""
    if value.dtype == tl.float32:
        tl.store(pointer, narrow(value, pointer.dtype.element_ty), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def minifloat_value(code, E: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr):
    """fp32 value of a code of 1 + E + M bits without special codes (e2m1, e2m3, e3m2); code: any integer type."""
    word = code.to(tl.int32)
    size = word & ((1 << (E + M)) - 1)
    bits = (size << (23 - M)) | ((word >> (E + M)) << 31)
    return bits.to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))  # also right where the exponent is 0


@triton.jit
def e8m0_value(code):
    """fp32 value 2^(code - 127); 255 is NaN."""
    word = code.to(tl.int32) & 0xFF
    bits = tl.where(word == 0, 0x00400000, word << 23)  # 2^-127 is a subnormal
    return tl.where(word == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def value_of(code, NAME: tl.constexpr):
    """fp32 value of codes by the element's name: small floats and powers of two from bytes, others as they are."""
    if NAME == "e2m1":
        value = minifloat_value(code, 2, 1, 1)
    elif NAME == "e2m3":
        value = minifloat_value(code, 2, 3, 1)
    elif NAME == "e3m2":
        value = minifloat_value(code, 3, 2, 3)
    elif NAME == "e4m3fn":
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), minifloat_value(code, 4, 3, 7))
    elif NAME == "e4m3fnuz":
        value = tl.where((code & 0xFF) == 0x80, float("nan"), minifloat_value(code, 4, 3, 8))
    elif NAME == "e5m2fnuz":
        value = tl.where((code & 0xFF) == 0x80, float("nan"), minifloat_value(code, 5, 2, 16))
    elif NAME == "e5m2":  # the upper half of an fp16
        value = (code.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif NAME == "e8m0":
        value = e8m0_value(code)
    else:
        value = widen(code)
    return value


@triton.jit
def minifloat_code(x, E: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, NAN: tl.constexpr):
    """int32 code of fp32 x: half to even, saturated to code LARGEST; NaN is code NAN. Bit 7 (E + M) is the sign.

    Let p be the power of two at or below |x|, at least the smallest normal number. Codes of its binade are p / 2^M
    apart, the unit in the last place of p * 2^(23-M) + |x|: the sum's mantissa is |x| in such steps, rounded once, and
    its exponent counts the binades, of 2^M codes each.
    """
    TOP: tl.constexpr = ((1 << M) + (LARGEST & ((1 << M) - 1))) * 2.0 ** ((LARGEST >> M) - BIAS - M)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), TOP)
    power = (magnitude.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    total = tl.maximum(power, 2.0 ** (1 - BIAS)) * (2.0 ** (23 - M)) + magnitude
    steps = total.to(tl.int32, bitcast=True) - ((1 - BIAS + 23 - M + 127) << 23)
    code = ((steps >> (23 - M)) + steps) & ((1 << (E + M)) - 1)
    return tl.where(x != x, NAN, code | ((bits >> (31 - E - M)) & (1 << (E + M))))


@triton.jit
def integer_code(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """int32 of fp32 x, half to even, saturated; NaN is 0."""
    kept = tl.where(x != x, 0.0, tl.minimum(tl.maximum(x, LOW), HIGH))
    # 1.5 * 2^23: the sum rounds to whole numbers, half to even, and they are its low bits
    return (kept + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
