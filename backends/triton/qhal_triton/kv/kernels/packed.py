"""Codes to bf16 by NVIDIA's packed instructions, several in a register; `decode.numbers` serves any chip.

Words of two codes of eight bits: operands of small products are read from fast memory as whole matrices of words, where
bytes would be read one by one. A register holds words of two rows: the low bytes are a pair of numbers of an even
column, the high bytes one of the next. Nibbles: the low halves of four bytes are two pairs, the high halves two more.

Every number of eight bits is a bf16 number, so that every form is exact, NaN and infinities included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.bits import INTERPRETED, value_of

ELEMENTS = ("e4m3fn", "e5m2", "int8")
"""Of which words are read."""

_WIDEN = "mov.b32 {a, b}, t; cvt.f32.f16 x, a; cvt.f32.f16 y, b; cvt.rn.bf16x2.f32 $0, y, x; }"  # fp16 to bf16 by fp32
_HALVES = "{ .reg .b32 t; .reg .b16 c, d; .reg .f16 a, b; .reg .f32 x, y;"


def _e4m3fn(odd: bool) -> tl.constexpr:
    pick = "0x4431" if odd else "0x4420"
    return tl.constexpr(f"{_HALVES} prmt.b32 t, $1, 0, {pick}; mov.b32 {{c, d}}, t; cvt.rn.f16x2.e4m3x2 t, c; {_WIDEN}")


def _e5m2(odd: bool) -> tl.constexpr:  # the upper half of an fp16
    return tl.constexpr(f"{_HALVES} prmt.b32 t, $1, 0, {'0x3414' if odd else '0x2404'}; {_WIDEN}")


def _int8(odd: bool) -> tl.constexpr:
    """128 + the low seven bits, less 128, or less 256 under a sign."""
    down = "shr.u32 t, $1, 8;" if odd else "mov.b32 t, $1;"
    return tl.constexpr(
        f"{{ .reg .b32 t, s, one; mov.b32 one, 0x3f803f80; {down} and.b32 s, t, 0x00800080;"
        " or.b32 s, s, 0xc300c300; and.b32 t, t, 0x007f007f; or.b32 t, t, 0x43004300;"
        " fma.rn.bf16x2 $0, t, one, s; }"
    )


def _four(once: str) -> tl.constexpr:
    """Bytes 0 and 1, then 2 and 3, in lanes of 16 bits called t; `once` leaves the numbers in IT."""
    first, second = (once.replace("IT", out) for out in ("$0", "$1"))
    spread = "prmt.b32 t, $2, 0, 0x4140; prmt.b32 u, $2, 0, 0x4342;"  # before anything is written
    return tl.constexpr(f"{{ .reg .b32 t, u, s, c, d; {spread} {first} mov.b32 t, u; {second} }}")


def _integer(odd: bool, signed: bool) -> tl.constexpr:
    """128 plus the code, less 128; signed: two's complement is the same plus 8 with its sign turned."""
    under, less = ("0x43084308", "0xc308c308") if signed else ("0x43004300", "0xc300c300")
    down = "shr.u32 t, t, 4; " if odd else ""
    return _four(
        f"{down}lop3.b32 t, t, 0x000f000f, {under}, 0x6a; mov.b32 c, 0x3f803f80; mov.b32 d, {less};"
        " fma.rn.bf16x2 IT, t, c, d;"
    )


def _e2m1(odd: bool) -> tl.constexpr:
    """The bits below the exponent are the number times 2^-126, subnormal ones too."""
    sign, size = (8, 2) if odd else (12, 6)
    return _four(
        f"shl.b32 s, t, {sign}; shl.b32 t, t, {size}; and.b32 s, s, 0x80008000;"
        " lop3.b32 t, t, 0x01c001c0, s, 0xea; mov.b32 c, 0x7e807e80; mov.b32 d, 0x80008000;"
        " fma.rn.bf16x2 IT, t, c, d;"
    )


_E4M3FN_LOW, _E4M3FN_HIGH = _e4m3fn(False), _e4m3fn(True)
_E5M2_LOW, _E5M2_HIGH = _e5m2(False), _e5m2(True)
_INT8_LOW, _INT8_HIGH = _int8(False), _int8(True)
_INT4_LOW, _INT4_HIGH = _integer(False, True), _integer(True, True)
_UINT4_LOW, _UINT4_HIGH = _integer(False, False), _integer(True, False)
_E2M1_LOW, _E2M1_HIGH = _e2m1(False), _e2m1(True)


@triton.jit
def word_numbers(words, ELEMENT: tl.constexpr, ODD: tl.constexpr):
    """bf16 of the low (ODD 0) or high bytes of int16 words."""
    if INTERPRETED:
        return value_of((words >> (8 * ODD)).to(tl.int8), ELEMENT).to(tl.bfloat16)
    if ELEMENT == "e4m3fn":
        ASM: tl.constexpr = _E4M3FN_HIGH if ODD else _E4M3FN_LOW
    elif ELEMENT == "e5m2":
        ASM: tl.constexpr = _E5M2_HIGH if ODD else _E5M2_LOW
    else:
        tl.static_assert(ELEMENT == "int8", "codes of words")
        ASM: tl.constexpr = _INT8_HIGH if ODD else _INT8_LOW
    return tl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def nibble_numbers(codes, ELEMENT: tl.constexpr, ODD: tl.constexpr):
    """bf16 of the low (ODD 0) or high halves of bytes; not interpreted."""
    if ELEMENT == "e2m1":
        ASM: tl.constexpr = _E2M1_HIGH if ODD else _E2M1_LOW
    elif ELEMENT == "int4":
        ASM: tl.constexpr = _INT4_HIGH if ODD else _INT4_LOW
    else:
        tl.static_assert(ELEMENT == "uint4", "codes of nibbles")
        ASM: tl.constexpr = _UINT4_HIGH if ODD else _UINT4_LOW
    return tl.inline_asm_elementwise(ASM, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
