"""Row: a cache's row of keys or values as kernels read it, from its format."""

from __future__ import annotations

from dataclasses import dataclass

from qhal.elements import element
from qhal.formats import Format

NARROW = ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "int8", "uint8")
PACKED = ("int4", "uint4", "e2m1")
WIDE = ("bf16", "fp16", "fp32")
_BITS = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "e2m1": 2, "e8m0": 0, "bf16": 8, "fp16": 11, "fp32": 24} | {
    name: 4 - name.startswith("e5m2") for name in NARROW if name.startswith("e")
}
"""Significant bits of a number of the element, also after an integer zero point is subtracted."""
NOT_OUTSIDE = ("group", "col")
"""Blocks whose scale differs inside of a row, so that it cannot be multiplied after the product."""


@dataclass(frozen=True)
class Row:
    """What decoding a row takes; hashable, so that a kernel is compiled for it.

    element  of the codes: one of NARROW, PACKED (two to a byte, even one low) or WIDE
    kind     of the blocks: "" (no scale), tensor, head, col, row, group
    group    elements that share a scale where kind is group
    divides  the scale divides
    scale    element of the scale's codes
    outer    the scale has a second, static level
    zero     element of the zero point
    """

    element: str
    kind: str = ""
    group: int = 0
    divides: bool = False
    scale: str = ""
    outer: bool = False
    zero: str = ""

    @property
    def packed(self) -> bool:
        """Two codes to a byte."""
        return self.element in PACKED

    @property
    def wide(self) -> bool:
        """Numbers, not codes."""
        return self.element in WIDE

    @property
    def static(self) -> bool:
        """The scale is given, one for all tokens."""
        return self.kind in ("tensor", "head", "col")

    @property
    def inside(self) -> bool:
        """The scale is multiplied before the product."""
        return self.kind in NOT_OUTSIDE

    @property
    def bits(self) -> int:
        """Significant bits of what enters a product: code less zero point, times the scale if that is inside."""
        found = _BITS[self.element]
        if self.zero in WIDE:
            found = 24
        elif self.zero:
            e, z = element(self.element), element(self.zero)
            found = (int(max(e.largest - z.smallest, z.largest - e.smallest)) - 1).bit_length()
        return found + _BITS[self.scale] if self.inside else found

    def plane_kinds(self) -> tuple[str, ...]:
        """Which planes there are beside the codes."""
        return tuple(name for name in ("scale", "zero") if getattr(self, name))


def row_of(f: Format, dim: int) -> Row | None:
    """The row of `dim` elements that a kernel reads; None for formats that only the portable code does."""
    known = f.element in NARROW or f.element in PACKED or f.element in WIDE
    if not known or f.offset is not None or f.sparsity is not None:
        return None
    if f.block is None or f.scale is None:
        return Row(f.element) if f.plain else None
    kind, group, scale, outer = f.block.kind, 0, f.scale, False
    if kind == "group":
        group = f.block.cols
        if group & (group - 1) or (f.element in PACKED and group == 1):
            return None
    elif kind not in ("tensor", "head", "col", "row"):
        return None
    if not scale.plain:
        nested = scale.block is not None and scale.block.kind == "tensor" and scale.op == "*"
        if not nested or scale.zero is not None or scale.offset is not None or scale.scale is None or f.op == "/":
            return None
        if not scale.scale.plain or scale.scale.element not in WIDE:
            return None
        outer = True
    if scale.element not in (*WIDE, "e8m0", "e4m3fn", "e5m2"):
        return None
    zero = f.zero
    if zero is not None and (not zero.plain or zero.element not in (*WIDE, "int8", "uint8", "int4", "uint4")):
        return None
    if zero is not None and not element(f.element).integer:
        return None
    return Row(f.element, kind, group, f.op == "/", scale.element, outer, "" if zero is None else zero.element)
