"""Format: the arithmetic of a quantized tensor, written down as one value with one name.

A name reads as the decoding rule: `uint4-uint4.g128*bf16` is (uint4 code minus uint4 zero) in groups of 128, times a
bf16 scale. A plane that is itself quantized stands in parentheses, so two-level scales need no second concept:
`e2m1.g16*(e4m3fn.tensor*fp32)`. The grammar is in `qhal/grammar.py`; how codes decode in `qhal/tensors.py`; how codes
and scales are chosen from data, which only the rule after `@` decides, in `qhal/encoding.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from qhal.blocks import Block
from qhal.elements import element
from qhal.errors import FormatError
from qhal.grammar import MAX_DEPTH, read, shown
from qhal.rules import Rule


@dataclass(frozen=True, repr=False)
class Format:
    """How a tensor's numbers are stored: value = (code - zero) * scale + offset, `*` or `/` and `+` or `-` as stated.

    Decoding is exact by definition and in fp32: scale planes first (innermost parentheses outward), then code - zero,
    times or divided by the scale, then the offset; each step rounded once, never contracted.
    """

    element: str
    block: Block | None = None
    scale: Format | None = None
    op: Literal["*", "/"] = "*"
    zero: Format | None = None
    offset: Format | None = None
    offset_sign: Literal[1, -1] = 1
    sparsity: tuple[int, int] | None = None
    rule: Rule = Rule()  # noqa: RUF009 - frozen value

    def __post_init__(self) -> None:
        if not isinstance(self.element, str):
            raise FormatError(f"an element is a name such as 'int4', not {type(self.element).__name__}")
        e = element(self.element)
        if self.op not in ("*", "/") or self.offset_sign not in (1, -1):
            raise FormatError(f"{self.element}: op={self.op!r} is '*' or '/', offset_sign={self.offset_sign!r} 1 or -1")
        if self._depth > MAX_DEPTH:
            raise FormatError(f"{self.element}: planes nest more than {MAX_DEPTH} levels deep")
        if (self.block is None) != (self.scale is None):
            raise FormatError(f"{self.element}: a block and a scale belong together (write {self.element}.row*fp32)")
        if self.offset is not None and self.block is None:
            raise FormatError(f"{self.element}: an offset needs a block and a scale")
        if self.zero is not None and not e.integer and e.kind != "float":
            raise FormatError(f"{self.element}: a zero point has no meaning for this element")
        if self.sparsity is not None:
            pair = self.sparsity
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(type(v) is int for v in pair)):
                raise FormatError(f"sparsity {pair!r}: two whole numbers such as (2, 4)")
            if not 0 < pair[0] < pair[1]:
                raise FormatError(f"sparsity {pair[0]}:{pair[1]}: 0 < first number < second number")
        if self.rule.qmax is not None and self.rule.qmax == self._reach:
            object.__setattr__(self, "rule", replace(self.rule, qmax=None))  # one arithmetic, one name
        if self.scale is None:
            object.__setattr__(self, "op", "*")  # without a scale there is nothing to divide by
        if self.offset is None:
            object.__setattr__(self, "offset_sign", 1)

    @staticmethod
    def parse(text: str) -> Format:
        """Read a canonical name or an alias (`int4_g32`, `mxfp4`, `nvfp4`, ...).

        Raises FormatError with what was read, where it stopped and the nearest names.
        >>> str(Format.parse("int4.channel*bf16"))
        'int4.row*bf16'
        """
        if not isinstance(text, str):
            raise FormatError(f"a format name is text such as 'int4.g128*bf16', not {type(text).__name__}")
        return _parse(text)

    def __str__(self) -> str:
        text = self.element
        if self.zero is not None:
            text += f"-{_plane(self.zero)}"
        if self.block is not None and self.scale is not None:
            text += f".{self.block}{self.op}{_plane(self.scale)}"
        if self.offset is not None:
            text += ("+" if self.offset_sign > 0 else "-") + _plane(self.offset)
        if self.sparsity is not None:
            text += f"%{self.sparsity[0]}:{self.sparsity[1]}"
        rule = str(self.rule)
        return f"{text}@{rule}" if rule else text

    def __repr__(self) -> str:
        return f"Format({str(self)!r})"

    @property
    def plain(self) -> bool:
        """Whether this is a bare element without planes: `bf16`, `int4`."""
        return self.block is None and self.zero is None and self.sparsity is None

    def __hash__(self) -> int:
        return self._hashed

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # hashes of text differ between processes

    @cached_property
    def _hashed(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @cached_property
    def storage(self) -> Format:
        """The format without rules: what a decoder and a kernel table look at."""
        planes = {
            name: plane.storage for name in ("scale", "zero", "offset") if (plane := getattr(self, name)) is not None
        }
        return replace(self, rule=Rule(), **planes)

    def levels(self) -> Iterator[Format]:
        """This format, then those of its planes: scale, zero, offset, each followed by its own."""
        yield self
        for plane in (self.scale, self.zero, self.offset):
            if plane is not None:
                yield from plane.levels()

    @property
    def bits(self) -> float:
        """Bits per element, every plane counted; per-row, per-column and per-tensor values count as zero."""
        bits = float(element(self.element).bits)
        if self.sparsity is not None:
            n, m = self.sparsity
            bits = bits * n / m + 1  # the kept codes and one mask bit per position
        if self.block is not None:
            for plane in (self.scale, self.zero, self.offset):
                if plane is not None:
                    bits += plane.bits / self.block.elements
        return bits

    @property
    def qmax(self) -> float:
        """The divisor that turns amax into a scale: the rule's, else the element's largest value.

        Unsigned codes around a zero point in their middle reach 2^(bits-1) - 1 to either side.
        """
        return self.rule.qmax if self.rule.qmax is not None else self._reach

    @property
    def _depth(self) -> int:
        """Levels of planes, this one included; every plane below passed the same check, so this ends."""
        return 1 + max((p._depth for p in (self.scale, self.zero, self.offset) if p is not None), default=0)

    @property
    def _reach(self) -> float:
        e = element(self.element)
        centred = e.kind == "uint" and self.zero is not None and self.rule.domain == "amax"
        return 2.0 ** (e.bits - 1) - 1 if centred else e.largest


def _plane(f: Format) -> str:
    return f.element if f.plain and f.rule == Rule() else f"({f})"


@lru_cache(maxsize=4096)
def _parse(text: str) -> Format:
    try:
        return _build(read(text))
    except FormatError as bad:
        raise FormatError(f"format {shown(text)}: {bad}") from None


def _build(parts: dict[str, Any]) -> Format:
    fields: dict[str, Any] = {key: _build(value) if isinstance(value, dict) else value for key, value in parts.items()}
    return Format(**fields)
