"""How far a product may be from the reference: a bound per element, computed from the inputs, never chosen.

With ref = op(x, w), S = op(|x|, |w|) and R = sqrt(op(x^2, w^2)) a result of class c is accepted where

    |y - ref| <= 1/2 ulp_out(ref) * (1 + 2^-7) + gamma_c * S + 6 * rho_c * R

    exact        gamma = K * 2^-52, no 2^-7,                   rho = 0
    fp32-acc     gamma = (min(2 sqrt K, K) + d) * 2^-24,       rho = 0
    reduced-acc  gamma = 1.25 * 2^-12,                         rho = 0, + what alignment may lose
    dequant-16   gamma = d * 2^-24,                            rho = 0.42 * u * sqrt(operands rounded)

A matrix instruction aligns its products, and the running sum, to the largest and cuts what lies 13 bits below it. With
products of very different size, or of one sign, that is more than 2^-12 S, so it is computed from the products
(`Product.aligned`): half of what all products may lose, with their signs, and six deviations of the rest.

u is the unit roundoff of the 16-bit type. d counts the float32 roundings with which the contract defines the operands'
decoding: a kernel that multiplies the sum by the scale, instead of each weight, takes them in another place.
R of a class that rounds operands counts an element's rounding error once: values of one block with the same mantissa
err together, so their products are summed before they are squared (for random data this is the plain R). Six deviations
never exceed the worst case, every rounding at its limit, u * S: that is what holds for one term.

Where one product is all there is and every order of the same class gives its exact value (`Expected.settled`), the
result must be that value rounded half to even, to the bit: the bound alone would accept either side of a tie.

Over T >= 1000 elements two statistics see what a bound per element cannot, an error that is small and everywhere:
mean (e / sigma)^2 <= 1.5 and |mean (e / sigma * sign ref)| <= 0.1 + 6 / sqrt T, with sigma^2 = ulp_out^2 / 12 +
(rho_s R)^2. The second is not asked of reduced-acc: matrix instructions truncate. The bias that rounding the results,
and the weights to 16 bits, is known to have is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qhal.requests import NumericsClass
from qhal_conformance.elements import round_wide
from qhal_conformance.generator import F64
from qhal_conformance.outcome import HISTOGRAM_EDGES, FailKind, Worst

UNIT = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Unit roundoff (half a unit in the last place of 1) of the result types."""

_FRACTION = {"fp32": 23, "fp16": 10, "bf16": 7}
_LOWEST_EXPONENT = {"fp32": -126, "fp16": -14, "bf16": -126}
_LARGEST = {
    "fp32": float(np.finfo(np.float32).max),
    "fp16": 65504.0,
    "bf16": float(np.ldexp(2.0 - 2.0**-7, 127)),
}
_SLACK = 1.0 + 2.0**-7
STATISTICS_FROM = 1000


def ulp(out: str, ref: F64) -> F64:
    """Spacing of the result type at |ref|, floored at that of its smallest normal number."""
    exponent = (np.asarray(ref, np.float64).view(np.int64) >> 52) & 0x7FF  # IEEE 754 binary64, biased by 1023
    exponent = np.where(exponent == 0x7FF, 1023, np.maximum(exponent, 1023 + _LOWEST_EXPONENT[out]))
    return np.asarray(((exponent - _FRACTION[out]) << 52).view(np.float64))


@dataclass(frozen=True)
class Expected:
    """A product's reference and what its error is measured with; all float64 arrays of the result's shape.

    terms     K: how many products are summed
    decoding  d: float32 roundings in the definition of both operands' values
    rounded   R of the operands that a 16-bit class rounds, by shared mantissa; 0 where it rounds none
    operands  how many operands a 16-bit class rounds
    tiny      absolute floor of that class: fp16 has subnormals inside the range of weights
    one_sided what aligned products lose towards zero; spread: the deviation of the rest
    tiny_spread  deviation of the errors behind `tiny`
    rounding  the error that rounding the operands to 16 bits makes, known from the inputs
    settled   where the result is one exact product, rounded once
    """

    ref: F64
    s: F64
    r: F64
    rounded: F64
    terms: int
    decoding: int = 0
    operands: int = 1
    unit16: float = 2.0**-8
    tiny: F64 | float = 0.0
    one_sided: F64 | float = 0.0
    spread: F64 | float = 0.0
    rounding: F64 | float = 0.0
    tiny_spread: F64 | float = 0.0
    settled: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Verdict:
    """What a comparison found: None for `kind` is a pass. headroom = the largest |error| / bound; histogram: of all."""

    kind: FailKind | None
    detail: str
    worst: Worst | None
    headroom: float
    rms: float | None = None
    bias: float | None = None
    histogram: tuple[int, ...] | None = None


REDUCED = 1.25 * 2.0**-12
"""What truncated sums may lose, in units of S: fp8 instructions keep 13 fraction bits of a running sum and add 32
products at a time; promoted to float32 every 128, the four cuts of that sum lose (1/4 + 2/4 + 3/4 + 1) * 2^-13 of it
if it has one sign. What the products lose beside it is computed from them (`Product.aligned`)."""


def error_bound(e: Expected, numerics: NumericsClass, out: str) -> F64:
    """The bound per element; 0 where every term is 0 (the result must be 0) or one is infinite."""
    half = 0.5 * ulp(out, e.ref) * _SLACK
    k = max(e.terms, 1)
    decode = e.decoding * 2.0**-24
    if numerics == NumericsClass.EXACT:
        half, room = half / _SLACK, k * 2.0**-52 * e.s
    elif numerics == NumericsClass.FP32_ACC:
        room = (min(2.0 * k**0.5, float(k)) * 2.0**-24 + decode) * e.s
    elif numerics == NumericsClass.REDUCED_ACC:
        room = REDUCED * e.s + decode * e.s + e.one_sided + 6.0 * e.spread
    else:
        rho = 0.42 * e.unit16 * max(e.operands, 1) ** 0.5
        worst = (e.unit16 * max(e.operands, 1) + min(2.0 * k**0.5, float(k)) * 2.0**-24) * e.s
        room = decode * e.s + np.minimum(6.0 * rho * np.maximum(e.r, e.rounded), worst) + e.tiny
    return np.where((e.s == 0) | np.isinf(e.s), 0.0, half + room)


def _sigma(e: Expected, numerics: NumericsClass, out: str) -> F64:
    """Deviation of an honest result's error, per element.

    Uniform roundings are the model. Where the inputs make them larger (sums that fall on halves of a unit, many weights
    that share one mantissa) the roundings themselves are known, and their mean square replaces the model's.
    """
    use = e.s > 0
    step = ulp(out, e.ref)
    spread = step**2 / 12.0
    spread = spread * _excess(_rounding(e.ref, step)[use], spread[use])
    if numerics == NumericsClass.FP32_ACC:
        k = max(e.terms, 1)
        # a quarter of the bound per element: sums of one sign err with S, not with R
        spread = spread + np.maximum(8 * 2.0**-24 * e.r, 0.25 * min(2.0 * k**0.5, float(k)) * 2.0**-24 * e.s) ** 2
    elif numerics == NumericsClass.REDUCED_ACC:
        spread = spread + (2.0**-11 * e.r) ** 2 + np.square(e.one_sided) + np.square(e.spread)
    elif numerics == NumericsClass.DEQUANT_16:
        rho = 0.42 * e.unit16 * max(e.operands, 1) ** 0.5
        model = (rho * np.maximum(e.r, e.rounded)) ** 2 + np.square(e.tiny_spread)
        spread = spread + model * _excess(np.broadcast_to(e.rounding, e.ref.shape)[use], model[use])
    return np.asarray(np.sqrt(spread))


def _rounding(ref: F64, step: F64) -> F64:
    """What rounding the reference to multiples of `step` changes."""
    return np.asarray(np.round(ref / step) * step - ref)


def _excess(error: F64, variance: F64) -> float:
    """How much larger than modelled the known errors are, at least 1."""
    sound = np.isfinite(error) & (variance > 0)
    return max(1.0, float(np.mean(error[sound] ** 2 / variance[sound]))) if sound.any() else 1.0


def judge(got: F64, e: Expected, numerics: NumericsClass, out: str, *, statistics: bool = True) -> Verdict:
    """Compare a result (its numbers as float64) with the reference under one numerics class."""
    with np.errstate(invalid="ignore"):  # NaN and Inf in the inputs
        bound = error_bound(e, numerics, out)
    found = _statistics(got, e, numerics, out) if statistics else None
    return compare(got, e.ref, bound, out, found, e.settled)


def compare(
    got: F64,
    ref: F64,
    bound: F64,
    out: str,
    statistics: tuple[float | None, float | None, str] | None = None,
    settled: npt.NDArray[np.bool_] | None = None,
) -> Verdict:
    """Bound per element first, then special values, then the statistics that were computed beside it.

    An infinite reference (a term is infinite) asks for that infinity, or for NaN: sums that a kernel splits may meet
    infinities of both signs.
    """
    if ref.size == 0:
        return Verdict(None, "", None, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.where(got == ref, 0.0, np.abs(got - ref))
        good = error <= bound  # false where anything is NaN or infinite, but for equal infinities
        if settled is not None or not good.all():
            good = _allowed(got, ref, bound, out, good)
        if settled is not None:
            good &= ~settled | (got == round_wide(out, ref.astype(np.float32)))
        ratio = error / np.where(bound > 0, bound, np.finfo(np.float64).tiny)
    if not good.all() or not np.isfinite(ratio).all():
        share = np.where(np.isfinite(error), ratio, np.inf)
        ratio = np.where(good, np.where(np.isfinite(error), share, 0.0), np.maximum(share, 1.0))
    np.minimum(ratio, 1.0, out=ratio, where=good)
    index = int(np.argmax(ratio.reshape(-1)))
    place = tuple(int(i) for i in np.unravel_index(index, ref.shape))
    worst = Worst(place, float(got[place]), float(ref[place]), float(error[place]), float(bound[place]))
    headroom = float(ratio[place])
    bins = histogram(ratio)
    rms, bias, complaint = statistics if statistics is not None else (None, None, "")
    if not good.all():
        wrong_special = np.isfinite(ref) & ~np.isfinite(got) & ~good
        kind = FailKind.NONFINITE if wrong_special.any() else FailKind.NUMERIC
        bad = int((~good).sum())
        detail = f"{bad} of {ref.size} elements outside their bound; worst at {place}: got {worst.got:.9g}, "
        detail += f"reference {worst.ref:.9g}, error {worst.error:.3g}, bound {worst.bound:.3g}"
        return Verdict(kind, detail, worst, headroom, rms, bias, bins)
    if complaint:
        return Verdict(FailKind.STATS, complaint, worst, headroom, rms, bias, bins)
    return Verdict(None, "", worst, headroom, rms, bias, bins)


def _allowed(got: F64, ref: F64, bound: F64, out: str, within: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Where a result is good: within its bound, the same special value, or an overflow that the bound allows."""
    room = np.maximum(bound - 0.5 * ulp(out, ref), 0.0)  # what is left of the bound before the result is rounded
    may_overflow = np.abs(ref) + room >= _LARGEST[out] + 0.5 * float(ulp(out, np.array(_LARGEST[out])))
    same_infinity = np.isinf(got) & (np.sign(got) == np.sign(ref)) & may_overflow
    same_infinity |= np.isinf(ref) & np.isnan(got)
    return np.where(np.isnan(ref), np.isnan(got), within | same_infinity | (got == ref))


def histogram(ratio: F64) -> tuple[int, ...]:
    """How many of |error| / bound lie in each bin of HISTOGRAM_EDGES; NaN counts as above 1."""
    places = np.searchsorted(np.array(HISTOGRAM_EDGES), ratio.reshape(-1), side="left")
    return tuple(int(n) for n in np.bincount(places, minlength=len(HISTOGRAM_EDGES) + 1))


def _statistics(got: F64, e: Expected, numerics: NumericsClass, out: str) -> tuple[float | None, float | None, str]:
    """(rms ratio, signed bias, complaint or "") over the elements that are finite and not exactly determined."""
    use = np.isfinite(got) & np.isfinite(e.ref) & (e.s > 0)
    total = int(use.sum())
    if total == 0:
        return None, None, ""
    sigma = _sigma(e, numerics, out)[use]
    scaled = (got[use] - e.ref[use]) / sigma
    square = float(np.mean(scaled**2))
    bias = float(np.mean(scaled * np.sign(e.ref[use])))
    if total < STATISTICS_FROM:
        return square**0.5, bias, ""
    known = [_rounding(e.ref, ulp(out, e.ref))]
    if numerics == NumericsClass.DEQUANT_16:
        known.append(np.broadcast_to(e.rounding, e.ref.shape))
    one_way = (abs(float(np.mean(error[use] / sigma * np.sign(e.ref[use])))) for error in known)
    limit = 0.1 + 6.0 / total**0.5 + sum(one_way)
    if square > 1.5:
        return square**0.5, bias, f"mean (e/sigma)^2 = {square:.3f} over {total} elements, at most 1.5 allowed"
    if abs(bias) > limit and numerics != NumericsClass.REDUCED_ACC:
        return square**0.5, bias, f"signed bias {bias:+.3f} over {total} elements, at most {limit:.3f} allowed"
    return square**0.5, bias, ""
