"""Codes of four bits to bytes of e4m3, which hold them, four in a register; `values.fp8` makes operands of these.

Byte m of 0 to 15 of e4m3 is m * 2^-9: subnormal numbers, and the first binade after them has the same step. So an
integer's sign and magnitude are its number times 2^-9, -8 too. A code of e2m1, its sign moved to the top and the rest
to the upper bits of the magnitude, is its number times 2^-6: the exponents differ by six more, subnormal ones alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qhal_triton.bits import INTERPRETED

POWERS = {"int": 512.0, "e2m1": 64.0}
"""What the bytes of a kind of codes are to be multiplied by."""


def _integers(high: bool) -> tl.constexpr:
    """m: one where a code is negative, whose magnitude is 16 less the code: its bits exchanged, plus one."""
    code = "shr.u32 c, $1, 4;" if high else "mov.b32 c, $1;"
    return tl.constexpr(
        f"{{ .reg .b32 c, m, t; shr.u32 m, $1, {7 if high else 3}; {code} and.b32 m, m, 0x01010101;"
        " mul.lo.u32 t, m, 15; lop3.b32 c, c, 0x0f0f0f0f, t, 0x6a; mad.lo.u32 $0, m, 129, c; }"
    )


def _floats(high: bool) -> tl.constexpr:
    moved = "mov.b32 s, $1; shr.u32 t, $1, 2;" if high else "shl.b32 s, $1, 4; shl.b32 t, $1, 2;"
    return tl.constexpr(f"{{ .reg .b32 s, t; {moved} and.b32 t, t, 0x1c1c1c1c; lop3.b32 $0, s, 0x80808080, t, 0xea; }}")


_INT_LOW, _INT_HIGH = _integers(False), _integers(True)
_E2M1_LOW, _E2M1_HIGH = _floats(False), _floats(True)


@triton.jit
def eights(word, KIND: tl.constexpr, PART: tl.constexpr, PTX: tl.constexpr):
    """uint8 e4m3 of the codes ("int", "e2m1") in the low (PART 0) or high half of bytes; they are to be times POWERS.

    PTX: NVIDIA's instructions may be written out, for four neighbours of a row at once.
    """
    if PTX and not INTERPRETED:
        if KIND == "int":
            ASM: tl.constexpr = _INT_HIGH if PART == 1 else _INT_LOW
        else:
            ASM: tl.constexpr = _E2M1_HIGH if PART == 1 else _E2M1_LOW
        byte = tl.inline_asm_elementwise(ASM, "=r,r", [word], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        code = (word.to(tl.int32) >> (4 * PART)) & 15
        if KIND == "int":
            minus = code >> 3
            byte = (((code ^ (minus * 15)) + minus) | (minus << 7)).to(tl.uint8)
        else:
            byte = (((code & 8) << 4) | ((code & 7) << 2)).to(tl.uint8)
    return byte
