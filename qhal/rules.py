"""Rule: how codes and scales are chosen from data, the part of a format that decoding never reads."""

from __future__ import annotations

from dataclasses import dataclass, fields

from qhal.errors import FormatError

_CHOICES: dict[str, tuple[str, ...]] = {
    "domain": ("amax", "minmax", "signed", "mean"),
    "clip": ("scale", "range"),
    "scale": ("div", "rcp"),
    "apply": ("div", "rcp"),
    "round": ("even", "away"),
    "e8m0": ("floor", "ceil", "even", "up1.75", "over1.75"),
    "arith": ("fp32", "bf16"),
    "empty": ("one", "zero", "eps"),
    "special": ("nan", "saturate", "error"),
}


@dataclass(frozen=True)
class Rule:
    """How codes and scales are chosen from data. Decoding never reads it. The first choice of a field is the default.

    Levels are computed from the outermost in; a computed outer level divides amax by qmax times the largest inner scale
    (448 for e4m3fn, 1 for e8m0).
    """

    domain: str = "amax"
    """amax: symmetric | minmax: the range always includes 0 | signed: the peak lands on the most negative code |
    mean: the offset is one value, the mean of the tensor; symmetric around it"""
    qmax: float | None = None
    """divisor of the scale, default the largest code; 127 or 127.5, 448, 240 or 224 are different formats"""
    clip: str = "scale"
    """Operand.clip shrinks the scale (scale), or also clamps x to [lo*min, hi*max] first (range)"""
    scale: str = "div"
    """div: amax / qmax | rcp: amax * (1 / qmax)"""
    apply: str = "div"
    """div: x / s | rcp: x * (1 / s)"""
    e8m0: str = "floor"
    """exponent of amax/qmax's power of two: floor | ceil | even (amax rounded to the element's mantissa) |
    up1.75 (mantissa >= 1.75 goes up) | over1.75 (floor of log2(amax / 7 * 8 + 9.6e-7), in fp32 from left to right)"""
    round: str = "even"
    """ties to even | away from zero"""
    arith: str = "fp32"
    """scale, quotient and product are rounded to fp32 | bf16"""
    empty: str = "one"
    """scale of an all-zero block: one | zero | eps (the fp32 epsilon)"""
    special: str = "nan"
    """NaN or Inf in the input: nan propagates | saturate | error (reference only)"""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise FormatError(f"rule {name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.qmax is not None and not 0 < self.qmax < float("inf"):
            raise FormatError(f"rule qmax={self.qmax!r}: must be a positive number")
        if self.qmax is not None and self.domain == "minmax":
            raise FormatError("rule qmax has no meaning with domain=minmax: the divisor is the span of the codes")

    def __str__(self) -> str:
        parts = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                parts.append(f"{f.name}={value:.17g}" if isinstance(value, float) else f"{f.name}={value}")
        return ",".join(parts)
