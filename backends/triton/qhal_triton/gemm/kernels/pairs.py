"""Codes of four bits to pairs of 16-bit floats by NVIDIA's packed instructions; `values.exact` serves any chip.

Two words of eight codes each become four registers, of which each lane of 16 bits holds four codes of one word; a shift
and a mask leave one code in a lane. An integer below the last bit of 128 (fp16: 1024) is that number plus the code, so
one subtraction gives the code less its zero point. A code of e2m1, its sign moved to the top and the rest below the
exponent, is its number times 2^-126 (fp16: 2^-14), and so are subnormal ones. Both are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LANES = "prmt.b32 t, $1, $2, $5; shr.u32 t, t, $3;"
"""$1 and $2: the words. $3: bits below the code in its lane. $5: which bytes of both words."""


def _integers(signed: bool, half: bool) -> tl.constexpr:
    one, under, fma = ("0x3c003c00", 0x6400, "f16x2") if half else ("0x3f803f80", 0x4300, "bf16x2")
    under += 8 if signed else 0  # exclusive-or: two's complement to the same plus 8
    both = f"{under << 16 | under:#010x}"
    return tl.constexpr(
        f"{{ .reg .b32 t, one; mov.b32 one, {one}; {_LANES} lop3.b32 t, t, 0x000f000f, {both}, 0x6a;"
        f" fma.rn.{fma} $0, t, one, $7; }}"
    )


def _floats(half: bool) -> tl.constexpr:
    left, keep, up, fma = (
        (9, "0x0e000e00", "0x74007400", "f16x2") if half else (6, "0x01c001c0", "0x7e807e80", "bf16x2")
    )
    return tl.constexpr(
        f"{{ .reg .b32 t, s, up, no; mov.b32 up, {up}; mov.b32 no, 0x80008000; {_LANES} shl.b32 s, t, 12;"
        f" shl.b32 t, t, {left}; and.b32 s, s, 0x80008000; lop3.b32 t, t, {keep}, s, 0xea;"
        f" fma.rn.{fma} $0, t, up, no; }}"
    )


_INT_BF16, _INT_FP16 = _integers(True, False), _integers(True, True)
_UINT_BF16, _UINT_FP16 = _integers(False, False), _integers(False, True)
_E2M1_BF16, _E2M1_FP16 = _floats(False), _floats(True)


@triton.jit
def integer_pairs(words, KIND: tl.constexpr, TYPE: tl.constexpr, PART: tl.constexpr, z):
    """Code PART of int32 words [BN, columns] less z [BN] (or 0.0), in bf16 or fp16."""
    shift = tl.full(words.shape, 4 * (PART % 4), tl.int32)
    bytes_of = tl.full(words.shape, 0x7632 if PART >= 4 else 0x5410, tl.int32)
    if tl.bfloat16 == TYPE:
        less = _less(words, z, 136.0 if KIND == "int" else 128.0).to(tl.bfloat16)
        ASM: tl.constexpr = _INT_BF16 if KIND == "int" else _UINT_BF16
        pairs = tl.inline_asm_elementwise(
            ASM, "=r,r,r,r,r,r,r,r", [words, shift, bytes_of, less], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        less = _less(words, z, 1032.0 if KIND == "int" else 1024.0).to(tl.float16)
        ASM16: tl.constexpr = _INT_FP16 if KIND == "int" else _UINT_FP16
        pairs = tl.inline_asm_elementwise(
            ASM16, "=r,r,r,r,r,r,r,r", [words, shift, bytes_of, less], dtype=tl.float16, is_pure=True, pack=2
        )
    return pairs


@triton.jit
def _less(words, z, base: tl.constexpr):
    """-(z + base) in fp32, for every word of a row."""
    row = tl.zeros((words.shape[0],), tl.float32) - (z + base)
    return tl.broadcast_to(row[:, None], words.shape)


@triton.jit
def e2m1_pairs(words, TYPE: tl.constexpr, PART: tl.constexpr):
    """Numbers of code PART of int32 words [BN, columns], in bf16 or fp16."""
    shift = tl.full(words.shape, 4 * (PART % 4), tl.int32)
    bytes_of = tl.full(words.shape, 0x7632 if PART >= 4 else 0x5410, tl.int32)
    if tl.bfloat16 == TYPE:
        pairs = tl.inline_asm_elementwise(
            _E2M1_BF16, "=r,r,r,r,r,r,r", [words, shift, bytes_of], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        pairs = tl.inline_asm_elementwise(
            _E2M1_FP16, "=r,r,r,r,r,r,r", [words, shift, bytes_of], dtype=tl.float16, is_pure=True, pack=2
        )
    return pairs
