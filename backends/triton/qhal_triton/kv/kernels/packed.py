"""Codes to bf16 by NVIDIA's packed instructions, several in a register; `decode.numbers` serves any chip.

Words of two codes of eight bits: operands of small products are read from fast memory as whole matrices of words, where
bytes would be read one by one. A register holds words of two rows: the low bytes are a pair of numbers of an even
column, the high bytes one of the next.

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


_E4M3FN_LOW, _E4M3FN_HIGH = _e4m3fn(False), _e4m3fn(True)
_E5M2_LOW, _E5M2_HIGH = _e5m2(False), _e5m2(True)
_INT8_LOW, _INT8_HIGH = _int8(False), _int8(True)


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
