"""The judge is judged: errors at 0.99 and 1.01 of each bound, special values, both statistics."""

from __future__ import annotations

import numpy as np
import pytest

from qhal.requests import NumericsClass
from qhal_conformance.elements import round_wide
from qhal_conformance.generator import Stream
from qhal_conformance.outcome import HISTOGRAM_EDGES, FailKind
from qhal_conformance.tolerance import Expected, error_bound, histogram, judge, ulp

CLASSES = list(NumericsClass)


def _expected(m: int = 8, n: int = 16, k: int = 256) -> Expected:
    g = Stream("tolerance", "e")
    ref = g.normal((m, n)).astype(np.float64) * 16
    s = np.abs(ref) + 100.0
    r = np.full_like(ref, 12.0)
    return Expected(ref, s, r, r, k, decoding=1, one_sided=0.01, spread=0.002)


@pytest.mark.parametrize("numerics", CLASSES)
@pytest.mark.parametrize("out", ["fp32", "fp16", "bf16"])
def test_just_inside_passes_and_just_outside_fails(numerics: NumericsClass, out: str) -> None:
    e = _expected()
    bound = error_bound(e, numerics, out)
    for sign in (1.0, -1.0):
        for place in ((0, 0), (7, 15), (3, 5)):
            got = e.ref.copy()
            got[place] += sign * 0.99 * bound[place]
            assert judge(got, e, numerics, out).kind is None
            got[place] = e.ref[place] + sign * 1.01 * bound[place]
            verdict = judge(got, e, numerics, out)
            assert verdict.kind == FailKind.NUMERIC
            assert verdict.worst is not None and verdict.worst.index == place
            assert verdict.headroom == pytest.approx(1.01)


def test_classes_are_ordered() -> None:
    bounds = [error_bound(_expected(), c, "fp32").max() for c in CLASSES]
    assert bounds == sorted(bounds)


def test_bounds_by_hand() -> None:
    one = np.array([[1.0]])
    e = Expected(one, one * 8, one * 2, one * 2, terms=100, decoding=2)
    half = 0.5 * 2.0**-7 * (1 + 2.0**-7)
    assert error_bound(e, NumericsClass.EXACT, "bf16")[0, 0] == 2.0**-8 + 100 * 2.0**-52 * 8
    assert error_bound(e, NumericsClass.FP32_ACC, "bf16")[0, 0] == half + (20 + 2) * 2.0**-24 * 8
    assert error_bound(e, NumericsClass.DEQUANT_16, "bf16")[0, 0] == pytest.approx(
        half + 6 * 0.42 * 2.0**-8 * 2 + 2 * 2.0**-24 * 8, rel=1e-12
    )


def test_one_term_is_bounded_by_its_own_rounding() -> None:
    one = np.array([[1.0]])
    e = Expected(one, one, one, one, terms=256)
    half = 0.5 * 2.0**-7 * (1 + 2.0**-7)
    assert error_bound(e, NumericsClass.DEQUANT_16, "bf16")[0, 0] == pytest.approx(half + 2.0**-8 + 2.0**-19, rel=1e-9)


def test_ulp_is_floored_at_the_smallest_normal() -> None:
    ref = np.array([0.0, 1.0, 1.99, 2.0, 2.0**-30, 65504.0])
    assert ulp("fp16", ref).tolist() == [2.0**-24, 2.0**-10, 2.0**-10, 2.0**-9, 2.0**-24, 32.0]


def test_no_terms_must_be_exactly_zero() -> None:
    zero = np.zeros((2, 2))
    e = Expected(zero, zero, zero, zero, 4)
    assert judge(zero, e, NumericsClass.DEQUANT_16, "bf16").kind is None
    assert judge(zero + 1e-30, e, NumericsClass.DEQUANT_16, "bf16").kind == FailKind.NUMERIC


def test_special_values() -> None:
    e = _expected()
    for bad in (np.nan, np.inf, -np.inf):
        got = e.ref.copy()
        got[2, 3] = bad
        assert judge(got, e, NumericsClass.DEQUANT_16, "bf16").kind == FailKind.NONFINITE
    ref = e.ref.copy()
    ref[1, 1] = np.nan
    wanted = Expected(ref, e.s, e.r, e.rounded, e.terms)
    assert judge(ref, wanted, NumericsClass.EXACT, "bf16").kind is None
    assert judge(e.ref, wanted, NumericsClass.EXACT, "bf16").kind == FailKind.NUMERIC


def test_one_exact_product_is_rounded_half_to_even() -> None:
    """Both neighbours of a tie are within half a unit; only one is right. Without `settled` both pass."""
    tie = np.array([[1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8]])
    even, odd = np.array([[1.0, 1.0 + 2.0**-6]]), np.array([[1.0 + 2.0**-7, 1.0 + 2.0**-7]])
    for settled, kind in ((np.ones_like(tie, dtype=bool), FailKind.NUMERIC), (None, None)):
        e = Expected(tie, tie, tie, tie, 1, settled=settled)
        assert judge(even, e, NumericsClass.FP32_ACC, "bf16").kind is None
        assert judge(odd, e, NumericsClass.FP32_ACC, "bf16").kind == kind


def test_an_infinite_term_asks_for_that_infinity_or_nan() -> None:
    ref = np.array([[np.inf, -np.inf, np.nan, 1.0]])
    size = np.array([[np.inf, np.inf, np.nan, 1.0]])
    e = Expected(ref, size, size, size, 4)
    assert judge(ref, e, NumericsClass.REDUCED_ACC, "bf16", statistics=False).kind is None
    for place, value, passes in ((0, np.nan, True), (0, -np.inf, False), (1, -3e38, False), (2, np.inf, False)):
        got = ref.copy()
        got[0, place] = value
        assert (judge(got, e, NumericsClass.REDUCED_ACC, "bf16", statistics=False).kind is None) == passes, place


def test_overflow_is_infinite_of_the_right_sign() -> None:
    big = np.array([[1e6, -1e6, 65504.0]])
    e = Expected(big, np.abs(big), np.abs(big), np.abs(big), 1)
    right = np.array([[np.inf, -np.inf, 65504.0]])
    assert judge(right, e, NumericsClass.EXACT, "fp16").kind is None
    assert judge(-right, e, NumericsClass.EXACT, "fp16").kind is not None
    assert judge(np.array([[np.inf, -np.inf, np.inf]]), e, NumericsClass.EXACT, "fp16").kind is not None


def _statistical(shift: float, scale: float, numerics: NumericsClass) -> FailKind | None:
    """Errors inside every bound, but shifted or spread more than rounding spreads them."""
    g = Stream("statistics", "x")
    ref = (np.abs(g.normal((64, 64))) + 1.0).astype(np.float64)
    s = np.full_like(ref, 1e-6)
    e = Expected(ref, s, s, s, 16)
    step = ulp("bf16", ref)
    error = (g.bits(64 * 64).reshape(64, 64) / 2.0**32 - 0.5) * scale + shift
    return judge(ref + np.clip(error, -0.5, 0.5) * step, e, numerics, "bf16").kind


def test_statistics() -> None:
    assert _statistical(0.0, 1.0, NumericsClass.FP32_ACC) is None
    assert _statistical(0.2, 0.6, NumericsClass.FP32_ACC) == FailKind.STATS
    assert _statistical(-0.2, 0.6, NumericsClass.FP32_ACC) == FailKind.STATS
    assert _statistical(0.2, 0.6, NumericsClass.REDUCED_ACC) is None
    assert _statistical(0.0, 2.0, NumericsClass.FP32_ACC) == FailKind.STATS


def test_a_few_results_repeated_may_all_round_one_way() -> None:
    """A bias that outweighs its products: one rounding per column, and a hundred rows that show the same one."""
    column = 1.0 + (np.arange(24) % 3 + 0.25) * 2.0**-7  # every third of bf16's steps, all rounded down
    ref = np.tile(column, (64, 1))
    e = Expected(ref, np.abs(ref), np.zeros_like(ref), np.zeros_like(ref), 4)
    rounded = round_wide("bf16", ref.astype(np.float32)).astype(np.float64)
    assert (rounded < ref).all()
    assert judge(rounded, e, NumericsClass.EXACT, "bf16").kind is None
    spread = Expected(e.ref + 2.0**-9 * Stream("t", "u").integers(-2, 3, ref.shape), e.s, e.r, e.r, 4)
    truncated = np.floor(spread.ref * 2.0**7) * 2.0**-7
    assert judge(truncated, spread, NumericsClass.EXACT, "bf16").kind is not None


def test_empty_results_pass() -> None:
    nothing = np.zeros((0, 4))
    assert judge(nothing, Expected(nothing, nothing, nothing, nothing, 4), NumericsClass.EXACT, "bf16").kind is None


def test_a_histogram_counts_every_element_once() -> None:
    assert len(HISTOGRAM_EDGES) == 11 and HISTOGRAM_EDGES[-1] == 1.0
    for place, edge in enumerate(HISTOGRAM_EDGES):
        below, above = histogram(np.array([edge])), histogram(np.array([np.nextafter(edge, 2)]))
        assert below.index(1) == place and above.index(1) == place + 1
    assert histogram(np.array([np.inf, np.nan, 1.5]))[-1] == 3
    ref = np.array([[1.0, 2.0, 4.0]])
    e = Expected(ref, ref, ref, ref, 1)
    verdict = judge(ref + np.array([[0.0, 0.003, 1.0]]), e, NumericsClass.EXACT, "bf16")
    assert verdict.histogram is not None and sum(verdict.histogram) == 3
    assert verdict.histogram[0] == 1 and verdict.histogram[-1] == 1 and verdict.histogram[9] == 1
