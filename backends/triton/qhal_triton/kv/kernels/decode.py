"""Rows of a cache in registers: codes to operands of matrix instructions, in one or two parts, exactly.

A part is bf16 or fp16. One holds codes, and codes times scales of few bits; two of bf16 hold any 16 significant bits,
and are within 2^-17 of a number that has more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.bits import narrow, times, value_of
from qhal_triton.kv.kernels.packed import nibble_numbers, word_numbers


@triton.jit
def numbers(code, ELEMENT: tl.constexpr):
    """fp32 value of codes (bytes, or the integers 0 to 15 of a nibble) and of wide floats."""
    if ELEMENT == "int8":  # the bits of 2^23 + n are those of 2^23 and of n: no slow conversion
        word = ((code.to(tl.int32) & 0xFF) ^ 0x80) | 0x4B000000
        value = word.to(tl.float32, bitcast=True) - 8388736.0
    elif ELEMENT == "int4":
        word = ((code.to(tl.int32) & 0xF) ^ 0x8) | 0x4B000000
        value = word.to(tl.float32, bitcast=True) - 8388616.0
    elif ELEMENT == "uint8" or ELEMENT == "uint4":
        word = (code.to(tl.int32) & 0xFF) | 0x4B000000
        value = word.to(tl.float32, bitcast=True) - 8388608.0
    else:
        value = value_of(code, ELEMENT)
    return value


@triton.jit
def native(code, ELEMENT: tl.constexpr, TYPE: tl.constexpr):
    """fp8 codes by the chip's conversion to fp16, and on by way of fp32: from there to bf16 it is quick."""
    KIND: tl.constexpr = tl.float8e4nv if ELEMENT == "e4m3fn" else tl.float8e5
    return code.to(KIND, bitcast=True).to(tl.float16).to(tl.float32).to(TYPE)


@triton.jit
def spread(value, EACH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS / EACH] to [ROWS, COLS]: every number EACH times."""
    GROUPS: tl.constexpr = COLS // EACH
    return tl.reshape(tl.broadcast_to(value[:, :, None], (ROWS, GROUPS, EACH)), (ROWS, COLS))


@triton.jit
def inner(plane, at, ELEMENT: tl.constexpr, ok, ODD: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
          ROWS: tl.constexpr, COLS: tl.constexpr, NATIVE: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """The scale or zero point of every element of a tile, in a shape that broadcasts to [ROWS, COLS].

    at    [ROWS] where the plane has the row's first number; a static plane begins with the head's
    ODD   0, or 1 for the high halves of bytes
    TYPE  what holds each exactly
    """
    STEP: tl.constexpr = 2 if R.element == "int4" or R.element == "uint4" or R.element == "e2m1" else 1
    if R.kind == "group":
        EACH: tl.constexpr = R.group // STEP if R.group // STEP < COLS else COLS
        GROUPS: tl.constexpr = COLS // EACH
        groups = tl.arange(0, GROUPS)
        here = ok[:, None] & (groups * (EACH * STEP) < D)[None, :]
        code = tl.load(plane + at[:, None] + groups[None, :], mask=here, other=1)
        value = native(code, ELEMENT, TYPE) if ELEMENT == "e4m3fn" and NATIVE else numbers(code, ELEMENT).to(TYPE)
        value = spread(value, EACH, ROWS, COLS)
    elif R.kind == "col":
        cols = tl.arange(0, COLS) * STEP + ODD
        value = numbers(tl.load(plane + cols, mask=cols < D, other=1), ELEMENT).to(TYPE)[None, :]
    elif R.kind == "row":
        value = numbers(tl.load(plane + at, mask=ok, other=1), ELEMENT)[:, None]
    else:
        value = numbers(tl.load(plane), ELEMENT)
    return value


@triton.jit
def parts(value, PARTS: tl.constexpr, TYPE: tl.constexpr):
    """fp32 as one exact part, or as two: (upper 8 bits, the next)."""
    if PARTS == 1:
        upper = value.to(TYPE)
        rest = upper
    else:
        high = (value.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        upper = high.to(tl.bfloat16)
        rest = narrow(tl.where(tl.abs(value) == float("inf"), 0.0, value - high), tl.bfloat16)
    return upper, rest


@triton.jit
def operand(code, scale, s_at, zero, z_at, ok, ODD: tl.constexpr, R: tl.constexpr,
            D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, NATIVE: tl.constexpr, PARTS: tl.constexpr,
            TYPE: tl.constexpr):  # fmt: skip
    """The parts of a tile of codes [ROWS, COLS]; NATIVE: by the instructions of a chip that has fp8."""
    INSIDE: tl.constexpr = R.kind == "group" or R.kind == "col"
    ONE: tl.constexpr = R.zero == "" and PARTS == 1
    PLAIN: tl.constexpr = ONE and not INSIDE
    FP8: tl.constexpr = R.element == "e4m3fn" or R.element == "e5m2"
    NIBBLES: tl.constexpr = R.element == "int4" or R.element == "uint4" or R.element == "e2m1"
    if code.dtype == tl.int16:
        tl.static_assert(PLAIN and tl.bfloat16 == TYPE, "words of two codes have their scale outside")
        upper = word_numbers(code, tl.constexpr(R.element), ODD)
        rest = upper
    elif PLAIN and (R.element == "bf16" or R.element == "fp16"):
        upper = code.to(TYPE)
        rest = upper
    elif PLAIN and FP8 and NATIVE:
        upper = native(code, tl.constexpr(R.element), TYPE)
        rest = upper
    elif (NIBBLES or FP8) and ONE and tl.bfloat16 == TYPE and NATIVE and not R.divides:
        if NIBBLES:
            upper = nibble_numbers(code, tl.constexpr(R.element), ODD)
        else:
            upper = native(code, tl.constexpr(R.element), TYPE)
        if INSIDE:  # one part holds the bits of code and scale together
            s = inner(scale, s_at, tl.constexpr(R.scale), ok, ODD, R, D, ROWS, COLS, NATIVE, TYPE)
            upper = times(upper, tl.broadcast_to(s, upper.shape))
        rest = upper
    else:
        if NIBBLES:
            code = code >> 4 if ODD else code & 0xF
        value = numbers(code, tl.constexpr(R.element))
        if R.zero != "":
            value = value - inner(zero, z_at, tl.constexpr(R.zero), ok, ODD, R, D, ROWS, COLS, NATIVE, tl.float32)
        if INSIDE:
            s = inner(scale, s_at, tl.constexpr(R.scale), ok, ODD, R, D, ROWS, COLS, NATIVE, tl.float32)
            value = tl.div_rn(value, s + tl.zeros_like(value)) if R.divides else value * s
        upper, rest = parts(value, PARTS, TYPE)
    return upper, rest


@triton.jit
def tile(codes, c_at, scale, s_at, zero, z_at, ok, R: tl.constexpr, D: tl.constexpr,
         ROWS: tl.constexpr, COLS: tl.constexpr, NATIVE: tl.constexpr, PARTS: tl.constexpr,
         TYPE: tl.constexpr):  # fmt: skip
    """Rows from memory as parts of [ROWS, COLS]: (upper, lower) and, of paired codes, those of the odd columns.

    Paired are codes of four bits, two to a byte, and those of eight bits where `codes` points to words of 16.

    c_at, s_at, z_at  [ROWS] where each row begins; ok [ROWS]: which rows are read at all
    COLS              columns of a tile: a power of two, of paired codes half of the row's
    """
    PACKED: tl.constexpr = R.element == "int4" or R.element == "uint4" or R.element == "e2m1"
    WORDS: tl.constexpr = codes.dtype.element_ty == tl.int16
    WIDTH: tl.constexpr = (D + 1) // 2 if PACKED or WORDS else D
    cols = tl.arange(0, COLS)
    here = ok[:, None]
    if WIDTH != COLS:
        here = here & (cols < WIDTH)[None, :]
    code = tl.load(codes + c_at[:, None] + cols[None, :], mask=here, other=0)
    if PACKED or WORDS:
        upper, rest = operand(code, scale, s_at, zero, z_at, ok, 0, R, D, ROWS, COLS, NATIVE,
                              PARTS, TYPE)  # fmt: skip
        odd, odd_rest = operand(code, scale, s_at, zero, z_at, ok, 1, R, D, ROWS, COLS, NATIVE,
                                PARTS, TYPE)  # fmt: skip
    else:
        upper, rest = operand(code, scale, s_at, zero, z_at, ok, 0, R, D, ROWS, COLS, NATIVE, PARTS,
                              TYPE)  # fmt: skip
        odd = upper
        odd_rest = rest
    return upper, rest, odd, odd_rest
