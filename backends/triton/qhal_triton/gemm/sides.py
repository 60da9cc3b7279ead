"""What the kernels read of an operand's format: kinds of its codes and planes, and which elements share a scale."""

from __future__ import annotations

from dataclasses import dataclass

from qhal.elements import WIDE, element
from qhal.formats import Format

WIDE_KIND = "wide"
_PLANES = ("e8m0", "e4m3fn")
"""Elements of a scale plane beside plain floats."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One operand. "" stands for what does not exist.

    kind    "int", "uint", "wide" (a plain float), "table" (looked up), or the name of a small float
    bits    of a code
    scale   kind of its scales
    outer   kind of the numbers that scales are multiplied by, or divided by
    over    they are divided
    zero    kind of its zero points
    offset  "+" or "-"
    group   columns that share a scale, 0: all of a row
    rows    rows that share a scale
    flat    scales are counted through all rows
    made    planes that are decoded to fp32 first, those of a weight when it is prepared: no kernel reads their format
    """

    kind: str
    bits: int
    scale: str = ""
    outer: str = ""
    over: bool = False
    zero: str = ""
    offset: str = ""
    group: int = 0
    rows: int = 1
    flat: bool = False
    made: tuple[str, ...] = ()

    @property
    def integer(self) -> bool:
        """Whether codes, less their zero points, are whole numbers."""
        return self.kind in ("int", "uint") and self.zero in ("", "int", "uint")

    @property
    def shifted(self) -> bool:
        """Whether codes are whole numbers and their zero points need not be."""
        return self.kind in ("int", "uint") and self.zero == WIDE_KIND and not self.offset

    @property
    def exact(self) -> bool:
        """Whether bf16 and fp16 hold every code, less its zero point."""
        small = self.kind not in ("int", "uint", "table", WIDE_KIND) and not self.zero
        return (self.integer or small) and not self.offset


def side(f: Format, k: int, *, activation: bool) -> Side | None:
    """What is read of [.., k] in format f; None: no kernel reads it."""
    e = element(f.element)
    kind = {"lut": "table", "exponent": None, "int": "int", "uint": "uint"}.get(e.kind, e.name)
    kind = WIDE_KIND if e.name in WIDE else kind
    if kind is None or f.op != "*" or (activation and f.sparsity is not None):  # a sparse weight keeps its zeros
        return None
    if kind == WIDE_KIND and not f.plain:
        return None
    if f.block is None:
        return Side(kind=kind, bits=e.bits) if f.zero is None else None
    scale, outer = _scale(f.scale, activation)
    zero = "" if f.zero is None else _kind(f.zero, integers=True)
    offset = "" if f.offset is None else _kind(f.offset, integers=False)
    made: tuple[str, ...] = ()
    if (scale is None or offset is None) and zero is not None:
        made = tuple(name for name, kind in (("scale", scale), ("offset", offset)) if kind is None)
        scale, offset = (WIDE_KIND if kind is None else kind for kind in (scale, offset))
    if scale is None or zero is None or offset is None:
        return None
    block = f.block
    flat = block.kind == "flat" and k % block.cols == 0
    if not (flat or block.kind in ("tensor", "row", "group") or (block.kind in ("tile", "head") and not activation)):
        return None
    if activation and (kind == "table" or f.offset is not None or flat):
        return None
    grouped = block.kind in ("group", "tile", "flat") and (block.cols < k or flat)
    return Side(
        kind=kind,
        bits=e.bits,
        scale=scale,
        outer=outer,
        over=bool(outer) and f.scale is not None and f.scale.op == "/",
        zero=zero,
        offset="" if f.offset is None else ("+" if f.offset_sign > 0 else "-"),
        group=block.cols if grouped else 0,
        rows=block.rows if block.kind == "tile" else 1,
        flat=flat,
        made=made,
    )


def _scale(f: Format | None, activation: bool) -> tuple[str | None, str]:
    """(kind, kind of the outer scale) of a scale plane; None where no kernel reads it."""
    if f is None:
        return None, ""
    if f.plain:
        return _kind(f, integers=False), ""
    inner, outer = f.element, f.scale
    one = f.block is not None and (f.block.kind == "tensor" or (f.block.kind == "row" and not activation))
    plain = one and f.zero is None and f.offset is None and f.sparsity is None
    if not plain or outer is None or not outer.plain or outer.element not in WIDE:
        return None, ""
    kind = WIDE_KIND if inner in WIDE else inner if inner in _PLANES else None
    return kind, WIDE_KIND if kind is not None else ""


def _kind(f: Format, *, integers: bool) -> str | None:
    """The kind of a plain plane."""
    if not f.plain:
        return None
    e = element(f.element)
    if e.name in WIDE:
        return WIDE_KIND
    if integers:
        return e.kind if e.integer else None
    return e.name if e.name in _PLANES else None
