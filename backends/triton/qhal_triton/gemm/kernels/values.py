"""From codes and planes to numbers, exactly as `qhal.tensors` defines them; and to operands of matrix instructions."""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.bits import INTERPRETED, narrow, value_of
from qhal_triton.gemm.kernels.pairs import e2m1_pairs, integer_pairs


@triton.jit
def number(code, KIND: tl.constexpr, table=None):
    """fp32 value of codes, those of a table too."""
    return tl.load(table + code.to(tl.int32)) if KIND == "table" else value_of(code, KIND)


@triton.jit
def plane(p, at, inside, KIND: tl.constexpr):
    """fp32 numbers of a plane of scales, zero points or offsets."""
    return number(tl.load(p + at, mask=inside, other=0), KIND)


@triton.jit
def under(s, outer, KIND: tl.constexpr, OVER: tl.constexpr):
    """Scales times the numbers above them, or divided by these; KIND "": there are none."""
    if KIND == "":
        value = s
    elif OVER:
        value = tl.div_rn(s, outer)
    else:
        value = s * outer
    return value


@triton.jit
def fp8(code, KIND: tl.constexpr, FOREIGN: tl.constexpr):
    """uint8 codes as the matrix instruction takes them; FOREIGN: half their value, in the flavour without -0 (fnuz)."""
    if FOREIGN:  # the same byte, but for -0, and for what is no number: 0x80 is NaN there
        LARGEST: tl.constexpr = 0x7E if KIND == "e4m3fn" else 0x7B
        code = tl.where((code & 0x7F) > LARGEST, 0x80, tl.where(code == 0x80, 0, code)).to(tl.uint8)
    if FOREIGN and INTERPRETED:
        value = number(code, "e4m3fnuz" if KIND == "e4m3fn" else "e5m2fnuz")
    elif FOREIGN and KIND == "e4m3fn":
        value = code.to(tl.float8e4b8, bitcast=True)
    elif FOREIGN:
        value = code.to(tl.float8e5b16, bitcast=True)
    elif INTERPRETED:
        value = number(code, KIND)
    elif KIND == "e4m3fn":
        value = code.to(tl.float8e4nv, bitcast=True)
    elif KIND == "e5m2":
        value = code.to(tl.float8e5, bitcast=True)
    elif KIND == "e4m3fnuz":
        value = code.to(tl.float8e4b8, bitcast=True)
    else:
        value = code.to(tl.float8e5b16, bitcast=True)
    return value


@triton.jit
def code_of(word, KIND: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr):
    """Code PART of words that hold PARTS of 4 bits each; 1: the word is the code."""
    code = word
    if PARTS > 1:
        code = (word >> (4 * PART)) & 15
    if PARTS > 1 and KIND == "int":
        code = (code ^ 8).to(tl.int32) - 8
    return code


@triton.jit
def exact(
    word, KIND: tl.constexpr, TYPE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, table, z,
    ZERO: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Codes PART of [BN, columns] words, less their zero points z [BN], in a 16-bit TYPE (or fp32) that holds them."""
    INTEGER: tl.constexpr = KIND == "int" or KIND == "uint"
    BY_HAND: tl.constexpr = PTX and TYPE != tl.float32 and not INTERPRETED  # noqa: SIM300
    if BY_HAND and PARTS == 8 and INTEGER:
        value = integer_pairs(word, KIND, TYPE, PART, z)
    elif BY_HAND and PARTS == 8 and KIND == "e2m1":
        value = e2m1_pairs(word, TYPE, PART)
    elif BY_HAND and KIND == "e4m3fn":
        value = fp8(word, KIND, False).to(tl.float16)
        if tl.bfloat16 == TYPE:  # by way of fp32: the compiler's own way to bf16 takes four times as long
            value = value.to(tl.float32).to(TYPE)
    else:
        value = number(code_of(word, KIND, PART, PARTS), KIND, table)
        if ZERO != "":
            value = value - z[:, None]
        value = narrow(value, TYPE)
    return value


@triton.jit
def whole_weight(
    word, z, valid, KIND: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, ZERO: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """Codes PART of words as int8 and the int32 zero point of every row that is still to be subtracted, less SHIFT.

    Codes of 4 bits less their zero point fit; those of 8 bits without a sign are moved by SHIFT = -128.
    """
    code = code_of(word, KIND, PART, PARTS)
    zero = tl.zeros((word.shape[0],), tl.int32) + SHIFT
    if PARTS == 1 and ZERO != "":
        zero += z.to(tl.int32)
    if SHIFT != 0:
        w8 = tl.where(valid[None, :], (code ^ 128).to(tl.int8, bitcast=True), 0)
    elif PARTS > 1 and ZERO != "":
        w8 = tl.where(valid[None, :], code.to(tl.int32) - z.to(tl.int32)[:, None], 0).to(tl.int8)
    else:
        w8 = code.to(tl.int8)
    return w8, zero


@triton.jit
def whole_activation(code, z, valid, KIND: tl.constexpr):
    """Codes of x as int8, those without a sign moved by 128, and the zero point of every row, moved alike.

    And what a zero point is more than a whole number, or than MOST: the rest of it is exact in fp32.
    """
    MOST: tl.constexpr = 256.0  # sums of codes less such zero points stay in int32
    near = tl.minimum(tl.maximum(tl.floor(z + 0.5), -MOST), MOST)
    zero = near.to(tl.int32)
    if KIND == "uint":
        x8 = tl.where(valid[:, None], (code ^ 128).to(tl.int8, bitcast=True), 0)
        zero -= 128
    else:
        x8 = code
    return x8, zero, z - near


@triton.jit
def decoded(
    code, KIND: tl.constexpr, table, s, z, f, S: tl.constexpr, Z: tl.constexpr, F: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """(code - zero) * scale + offset of [BN, columns] in fp32, each step rounded once.

    s, z, f are per row, or FULL per element; "" says that a plane does not exist.
    """
    value = number(code, KIND, table)
    if Z != "":
        value = value - (z if FULL else z[:, None])
    if S != "":
        value = value * (s if FULL else s[:, None])
    if F == "+":
        value = value + (f if FULL else f[:, None])
    elif F == "-":
        value = value - (f if FULL else f[:, None])
    return value
