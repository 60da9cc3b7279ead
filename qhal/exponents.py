"""Power-of-two scales: the e8m0 code of a block's peak, by every rule that files were written with.

With p the exponent of the peak and t that of the element's largest value (OCP Microscaling Formats v1.0 section 6.3):
floor p - t | ceil the lowest exponent that peak / qmax does not exceed | even p - t after the peak is rounded to the
element's mantissa | up1.75 one more if the mantissa is at least 1.75 | over1.75 see `Rule.e8m0`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qhal.elements import Element, element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.rules import Rule


def reach(f: Format, e: Element) -> float:
    """The largest value that codes of `f` take, for levels above: 1 for e8m0 and wide floats, that reach anywhere."""
    if e.kind == "exponent" or e.wide:
        return 1.0
    return replace(f, rule=replace(f.rule, qmax=None)).qmax if f.zero is not None else e.largest


def exponent_codes(peak: Tensor, to: Format, rule: Rule) -> Tensor:
    """e8m0 codes: an exponent near log2(peak / qmax), biased by 127; 255 is NaN."""
    e = element(to.element)
    top = math.frexp(reach(to, e))[1] - 1  # exponent of the largest value
    peak = peak.abs()
    if rule.e8m0 == "ceil":
        mantissa, exponent = torch.frexp(peak / (to.qmax if not e.wide else to.rule.qmax or 1.0))
        power = torch.where(mantissa == 0.5, exponent - 1, exponent)
    else:
        power = _binade(peak, to, rule) - top
    if rule.empty == "one":
        power = torch.where(peak == 0, 0, power)
    code = (power + 127).clamp(0, 254)
    code = torch.where(peak == 0, 127 if rule.empty == "one" else 0, code)
    return torch.where(torch.isfinite(peak), code, 255).to(torch.uint8)


def _binade(peak: Tensor, to: Format, rule: Rule) -> Tensor:
    """The exponent of each peak, one more where the rule says so; exact, subnormal peaks included."""
    if rule.e8m0 == "over1.75":
        peak = peak / 7 * 8 + 9.6e-7  # this order overflows for peaks only that get the largest exponent anyway
    half, exponent = torch.frexp(peak.double())  # peak = half * 2^exponent, half in [0.5, 1)
    power = torch.where(torch.isinf(peak), 128, exponent.long() - 1)
    if rule.e8m0 == "up1.75":
        return power + (half >= 0.875)
    if rule.e8m0 == "even":
        bits = {"e2m1": 1, "e3m2": 2, "e2m3": 3, "e4m3fn": 3, "e4m3fnuz": 3, "e5m2": 2, "e5m2fnuz": 2}.get(to.element)
        if bits is None:
            raise FormatError(f"{to}: e8m0=even rounds amax to the element's mantissa, {to.element} has none")
        return power + (half >= 1 - 2.0 ** -(bits + 2))  # half a step below the next power of two: a tie goes up
    return power
