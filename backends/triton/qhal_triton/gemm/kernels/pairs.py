"""Codes of four bits to pairs of 16-bit floats by NVIDIA's packed instructions; `values.exact` serves any chip.

A register holds four bytes. Their low (or high) halves are spread to two registers of two 16-bit lanes. An integer
below the last bit of 128 (fp16: 1024) is that number plus the code, so one subtraction gives the code less its zero
point. A code of e2m1, its sign moved to the top and the rest below the exponent, is its number times 2^-126 (fp16:
2^-14), and so are subnormal ones. Both are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SPREAD = "prmt.b32 a, s, 0, 0x4140; prmt.b32 b, s, 0, 0x4342;"


def _integers(high: bool, signed: bool, half: bool) -> tl.constexpr:
    one, under, fma = ("0x3c003c00", 0x6400, "f16x2") if half else ("0x3f803f80", 0x4300, "bf16x2")
    under += 8 if signed else 0  # exclusive-or: two's complement to the same plus 8
    both = f"{under << 16 | under:#010x}"
    return tl.constexpr(
        f"{{ .reg .b32 s, a, b, one; {'shr.u32 s, $2, 4' if high else 'mov.b32 s, $2'}; mov.b32 one, {one}; {_SPREAD}"
        f" lop3.b32 a, a, 0x000f000f, {both}, 0x6a; lop3.b32 b, b, 0x000f000f, {both}, 0x6a;"
        f" fma.rn.{fma} $0, a, one, $3; fma.rn.{fma} $1, b, one, $4; }}"
    )


def _floats(high: bool, half: bool) -> tl.constexpr:
    left, keep, up, fma = (
        (9, "0x0e000e00", "0x74007400", "f16x2") if half else (6, "0x01c001c0", "0x7e807e80", "bf16x2")
    )
    return tl.constexpr(
        f"{{ .reg .b32 s, a, b, c, d, up, no; {'shr.u32 s, $2, 4' if high else 'mov.b32 s, $2'}; mov.b32 up, {up};"
        f" mov.b32 no, 0x80008000; {_SPREAD} shl.b32 c, a, 12; shl.b32 d, b, 12; shl.b32 a, a, {left};"
        f" shl.b32 b, b, {left}; and.b32 c, c, 0x80008000; and.b32 d, d, 0x80008000;"
        f" lop3.b32 a, a, {keep}, c, 0xea; lop3.b32 b, b, {keep}, d, 0xea;"
        f" fma.rn.{fma} $0, a, up, no; fma.rn.{fma} $1, b, up, no; }}"
    )


_INT_BF16_LOW, _INT_BF16_HIGH = _integers(False, True, False), _integers(True, True, False)
_INT_FP16_LOW, _INT_FP16_HIGH = _integers(False, True, True), _integers(True, True, True)
_UINT_BF16_LOW, _UINT_BF16_HIGH = _integers(False, False, False), _integers(True, False, False)
_UINT_FP16_LOW, _UINT_FP16_HIGH = _integers(False, False, True), _integers(True, False, True)
_E2M1_BF16_LOW, _E2M1_BF16_HIGH = _floats(False, False), _floats(True, False)
_E2M1_FP16_LOW, _E2M1_FP16_HIGH = _floats(False, True), _floats(True, True)


@triton.jit
def integer_pairs(code, KIND: tl.constexpr, TYPE: tl.constexpr, HALF: tl.constexpr, z):
    """Low (HALF 0) or high codes of uint8 [BN, columns] less z [BN] (or 0.0), in bf16 or fp16."""
    if tl.bfloat16 == TYPE:
        less = _less(code, z, 136.0 if KIND == "int" else 128.0).to(tl.bfloat16)
        INT: tl.constexpr = _INT_BF16_HIGH if HALF == 1 else _INT_BF16_LOW
        UINT: tl.constexpr = _UINT_BF16_HIGH if HALF == 1 else _UINT_BF16_LOW
        ASM: tl.constexpr = INT if KIND == "int" else UINT
        pairs = tl.inline_asm_elementwise(ASM, "=r,=r,r,r,r", [code, less], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        less = _less(code, z, 1032.0 if KIND == "int" else 1024.0).to(tl.float16)
        INT16: tl.constexpr = _INT_FP16_HIGH if HALF == 1 else _INT_FP16_LOW
        UINT16: tl.constexpr = _UINT_FP16_HIGH if HALF == 1 else _UINT_FP16_LOW
        ASM16: tl.constexpr = INT16 if KIND == "int" else UINT16
        pairs = tl.inline_asm_elementwise(ASM16, "=r,=r,r,r,r", [code, less], dtype=tl.float16, is_pure=True, pack=4)
    return pairs


@triton.jit
def _less(code, z, base: tl.constexpr):
    """-(z + base) in fp32, for every code of a row."""
    row = tl.zeros((code.shape[0],), tl.float32) - (z + base)
    return tl.broadcast_to(row[:, None], code.shape)


@triton.jit
def e2m1_pairs(code, TYPE: tl.constexpr, HALF: tl.constexpr):
    """Numbers of the low (HALF 0) or high codes of uint8 [BN, columns], in bf16 or fp16."""
    if tl.bfloat16 == TYPE:
        ASM: tl.constexpr = _E2M1_BF16_HIGH if HALF == 1 else _E2M1_BF16_LOW
        pairs = tl.inline_asm_elementwise(ASM, "=r,=r,r", [code], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        ASM16: tl.constexpr = _E2M1_FP16_HIGH if HALF == 1 else _E2M1_FP16_LOW
        pairs = tl.inline_asm_elementwise(ASM16, "=r,=r,r", [code], dtype=tl.float16, is_pure=True, pack=4)
    return pairs
