"""The unmodified backend on emulated operators, judged by the suite (level L2): schemas of the wheel, no torch_npu."""

from __future__ import annotations

import pytest
import qhal_npu_emulation as emulation
from qhal_npu_emulation import library

from qhal.interface import QuantOps
from qhal_conformance.cases import Case
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case

CASES = [case for case in catalogue(0) if case.operation != "comm_quant"]  # its ranks find a backend by its entry point
DATA = ("normal", "codes", "onehot", "zero", "outlier", "positive", "tiny_columns", "special")
MORE = {
    "int4.row*fp32~int8.row*fp32": ("A2", "A3"),
    "int4.row*fp32~int4.row*fp32": ("A2", "A3"),
    "int8.row*fp32~int8-fp32.tensor*fp32": ("A2", "A5"),
    "int8.row*bf16": ("A2",),
    "e2m1.g32*e8m0~e2m1.g32*e8m0": ("A5",),
}
"""Kinds of products that level 0 has no case for: generations by weight and input."""


@pytest.fixture(scope="module", params=["A2", "A5"])
def ops(request: pytest.FixtureRequest) -> QuantOps:
    return emulation.ops(request.param)


def test_cases_pass_or_are_refused(ops: QuantOps) -> None:
    bad, passed = [], 0
    for case in CASES:
        outcome = run_case(case, ops).outcome
        passed += outcome.status is Status.PASS
        if outcome.status in (Status.FAIL, Status.ERROR):
            bad.append(f"{case.id}: {outcome.reason}")
    assert not bad
    assert passed > 100


def test_required_cases_of_claimed_profiles_are_whole(ops: QuantOps) -> None:
    whole = {"core", "core-int8", "weight-int4", "rotation", "vq"}
    missing = [case.id for case in CASES if case.required and case.profile in whole and not _passes(case, ops)]
    assert not missing


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", MORE)
def test_more_kinds_of_products(kind: str, data: str) -> None:
    options = ("static",) if "tensor" in kind else ()
    case = Case("gemm", kind, (("m", 17), ("n", 64), ("k", 160)), "bf16", data, options=options)
    for arch in MORE[kind]:
        record = run_case(case, emulation.ops(arch))
        assert record.outcome.status is Status.PASS, record.outcome.reason


def test_every_emulated_operator_is_met() -> None:
    assert set(library.KERNELS) == set(library.CALLS)


def _passes(case: Case, ops: QuantOps) -> bool:
    return run_case(case, ops).outcome.status is Status.PASS
