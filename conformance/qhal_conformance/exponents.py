"""Power-of-two scales a second time: the e8m0 code of a peak by every rule, from exact mantissas instead of bit tricks.

Independent of `qhal.exponents` on purpose. OCP Microscaling Formats v1.0 section 6.3 is `floor`; the others are in
`qhal.rules.Rule.e8m0`.
"""

from __future__ import annotations

import numpy as np

from qhal.elements import WIDE, element
from qhal.formats import Format
from qhal.rules import Rule
from qhal_conformance import elements
from qhal_conformance.generator import F32, I64


def exponents(peak: F32, to: Format, rule: Rule) -> I64:
    """Codes 0 to 254, the exponent biased by 127, or 255 for a peak that is no number."""
    size = np.abs(peak)
    mantissa, exponent = np.frexp(size.astype(np.float64))  # size = mantissa * 2^exponent, mantissa in [1/2, 1)
    power = exponent.astype(np.int64) - 1
    top = _top(to)
    if rule.e8m0 == "ceil":
        part, upper = np.frexp((size / np.float32(_qmax(to))).astype(np.float64))
        power = np.where(part == 0.5, upper - 1, upper).astype(np.int64)
        top = 0
    elif rule.e8m0 == "over1.75":
        with np.errstate(over="ignore"):
            moved = (size / np.float32(7) * np.float32(8) + np.float32(9.6e-7)).astype(np.float64)
        power = np.where(np.isinf(moved), 128, np.frexp(moved)[1].astype(np.int64) - 1)
    elif rule.e8m0 == "up1.75":
        power = power + (mantissa * 2 >= 1.75)
    elif rule.e8m0 == "even":
        steps = 2.0 ** elements.mantissa_bits(to.element)
        power = power + (np.floor(mantissa * 2 * steps + 0.5) >= 2 * steps)
    code = np.clip(power - top + 127, 0, 254)
    code = np.where(size == 0, 127 if rule.empty == "one" else 0, code)
    return np.where(np.isfinite(size), code, 255).astype(np.int64)


def _top(to: Format) -> int:
    """The exponent of the largest value that codes reach; plain floats and exponents reach anywhere: 0."""
    if to.element in WIDE or to.element == "e8m0":
        return 0
    return int(np.frexp(_largest(to))[1]) - 1


def _qmax(to: Format) -> float:
    if to.rule.qmax is not None:
        return to.rule.qmax
    return 1.0 if to.element in WIDE else _largest(to)


def _largest(to: Format) -> float:
    centred = to.zero is not None and to.element.startswith("uint") and to.rule.domain == "amax"
    return 2.0 ** (element(to.element).bits - 1) - 1 if centred else elements.largest(to.element)
