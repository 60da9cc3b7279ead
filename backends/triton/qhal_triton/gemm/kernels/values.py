"""From codes and planes to numbers, exactly as `qhal.tensors` defines them; and the matrix instruction."""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.bits import INTERPRETED, e8m0_value, minifloat_value, narrow
from qhal_triton.gemm.kernels.pairs import e2m1_pairs, integer_pairs


@triton.jit
def number(code, KIND: tl.constexpr, table=None):
    """fp32 value of codes: numbers of any type as they are, small floats from uint8."""
    if KIND == "e2m1":
        value = minifloat_value(code, 2, 1, 1)
    elif KIND == "e2m3":
        value = minifloat_value(code, 2, 3, 1)
    elif KIND == "e3m2":
        value = minifloat_value(code, 3, 2, 3)
    elif KIND == "e4m3fn":
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), minifloat_value(code, 4, 3, 7))
    elif KIND == "e4m3fnuz":
        value = tl.where(code == 0x80, float("nan"), minifloat_value(code, 4, 3, 8))
    elif KIND == "e5m2fnuz":
        value = tl.where(code == 0x80, float("nan"), minifloat_value(code, 5, 2, 16))
    elif KIND == "e5m2":  # the upper half of an fp16
        value = (code.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == "e8m0":
        value = e8m0_value(code)
    elif KIND == "table":
        value = tl.load(table + code.to(tl.int32))
    else:
        value = code.to(tl.float32)
    return value


@triton.jit
def plane(p, at, inside, KIND: tl.constexpr):
    """fp32 numbers of a plane of scales, zero points or offsets."""
    return number(tl.load(p + at, mask=inside, other=0), KIND)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b: fp32 sums of exact products, int32 sums of int8."""
    if a.dtype == tl.int8:
        total = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif INTERPRETED or a.dtype == tl.float32:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        total = tl.dot(a, b, acc)
    return total


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
def code_of(code, KIND: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr):
    """The code of one byte, or of its low (HALF 0) or high half."""
    if PACKED:
        code = (code >> 4) if HALF == 1 else (code & 15)
    if PACKED and KIND == "int":
        code = (code ^ 8).to(tl.int32) - 8
    return code


@triton.jit
def exact(
    code, KIND: tl.constexpr, TYPE: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr, table, z,
    ZERO: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The codes of [BN, columns] bytes, less their zero points z [BN], in a 16-bit TYPE (or fp32) that holds them."""
    INTEGER: tl.constexpr = KIND == "int" or KIND == "uint"
    BY_HAND: tl.constexpr = PTX and TYPE != tl.float32 and not INTERPRETED  # noqa: SIM300
    if BY_HAND and PACKED and INTEGER:
        value = integer_pairs(code, KIND, TYPE, HALF, z)
    elif BY_HAND and PACKED and KIND == "e2m1":
        value = e2m1_pairs(code, TYPE, HALF)
    elif BY_HAND and KIND == "e4m3fn":
        value = fp8(code, KIND, False).to(TYPE)
    else:
        value = number(code_of(code, KIND, HALF, PACKED), KIND, table)
        if ZERO != "":
            value = value - z[:, None]
        value = narrow(value, TYPE)
    return value


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
