"""Errors at 0.99 and 1.01 of the bound of every operation: attention and its lse, transforms, chains, grouped forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qhal.formats import Format
from qhal.requests import NumericsClass
from qhal_conformance import attention_check, grouped_check, hadamard_check
from qhal_conformance.cases import Case
from qhal_conformance.encode import quantize
from qhal_conformance.grouped_reference import judge_quantized
from qhal_conformance.operations import catalogue
from qhal_conformance.tolerance import compare

CLASSES = (NumericsClass.FP32_ACC, NumericsClass.REDUCED_ACC)


def _cases(operation: str) -> list[Case]:
    return [c for c in catalogue(0) if c.operation == operation and c.data != "special"]


def _both_sides(ref: np.ndarray, bound: np.ndarray, out: str) -> None:
    """One element at a time, of those whose bound leaves room and whose result cannot overflow."""
    top = {"fp32": 3e38, "fp16": 6e4, "bf16": 3e38}[out]
    places = np.argwhere((bound > 0) & np.isfinite(bound) & (np.abs(ref) < top))
    assert len(places) > 0
    for place in (tuple(places[0]), tuple(places[len(places) // 2]), tuple(places[-1])):
        for sign in (1.0, -1.0):
            got = ref.copy()
            got[place] = ref[place] + sign * 0.99 * bound[place]
            assert compare(got, ref, bound, out).kind is None
            got[place] = ref[place] + sign * 1.01 * bound[place]
            verdict = compare(got, ref, bound, out)
            assert verdict.kind is not None and verdict.worst is not None and verdict.worst.index == place


@pytest.mark.parametrize("numerics", CLASSES)
@pytest.mark.parametrize("case", _cases("attention")[::5], ids=lambda c: c.id)
def test_attention(case: Case, numerics: NumericsClass) -> None:
    expected = attention_check.build(case).expected(numerics, case.out)
    _both_sides(expected.o, expected.o_bound, case.out)
    _both_sides(expected.lse, expected.lse_bound, "fp32")


@pytest.mark.parametrize("numerics", CLASSES)
@pytest.mark.parametrize("case", [c for c in _cases("hadamard") if c.size("m")][::4], ids=lambda c: c.id)
def test_transforms(case: Case, numerics: NumericsClass) -> None:
    p = hadamard_check.build(case)
    _both_sides(p.ref, hadamard_check.bound_of(case, p, numerics, p.x), case.out)


@pytest.mark.parametrize("numerics", CLASSES)
@pytest.mark.parametrize(
    "case", [c for c in _cases("grouped_gemm") if not {"none", "nowhere"} & set(c.options)][::4], ids=lambda c: c.id
)
def test_grouped(case: Case, numerics: NumericsClass) -> None:
    rows = grouped_check.build(case).expected(numerics, case.out)
    _both_sides(rows.ref, rows.bound(case.out), case.out)


@pytest.mark.parametrize("held", ["int8.row*fp32", "e4m3fn.row*fp32"])
def test_quantized_results(held: str) -> None:
    """The right codes and scales pass; a code two steps off and a scale that is off by a hundredth do not."""
    case = next(c for c in _cases("grouped_gemm") if any(o.startswith("q=") for o in c.options))
    rows = grouped_check.build(case).expected(NumericsClass.FP32_ACC, case.out)
    q = quantize(rows.ref.astype(np.float32), Format.parse(held))
    assert judge_quantized(q, rows, case.out).kind is None
    codes = q.codes.view(torch.int8).clone()
    codes[3, 4] += 2 if codes[3, 4] < 100 else -2
    assert judge_quantized(replace(q, codes=codes.view(q.codes.dtype)), rows, case.out).kind is not None
    assert isinstance(q.scale, torch.Tensor)
    assert judge_quantized(replace(q, scale=q.scale * 1.01), rows, case.out).kind is not None


def test_nothing_is_expected_where_no_expert_is_named() -> None:
    case = next(c for c in _cases("grouped_gemm") if c.has("nowhere"))
    rows = grouped_check.build(case).expected(NumericsClass.DEQUANT_16, case.out)
    assert not rows.ref.any() and not rows.bound(case.out).any()
