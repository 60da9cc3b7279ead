"""The unmodified backend on emulated operators, judged by the suite (level L2): schemas of the wheel, no torch_npu."""

from __future__ import annotations

from functools import cache

import pytest
import qhal_npu_emulation as emulation
from qhal_npu_emulation import library
from qhal_npu_emulation.suite import DATA, MORE

from qhal_conformance.cases import Case
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import Outcome, Status
from qhal_conformance.runner import run_case

CASES = [case for case in catalogue(0) if case.required and case.operation != "comm_quant"]
"""Ranks of collectives find a backend by its entry point: `make conformance-npu` runs them, and the optional."""
WHOLE = ("core", "core-int8", "weight-int4", "rotation", "vq")
"""Profiles that every generation has."""


@cache
def ran(arch: str) -> tuple[tuple[Case, Outcome], ...]:
    ops = emulation.ops(arch)
    return tuple((case, run_case(case, ops).outcome) for case in CASES)


@pytest.fixture(params=["A2", "A5"])
def outcomes(request: pytest.FixtureRequest) -> tuple[tuple[Case, Outcome], ...]:
    return ran(request.param)


def test_cases_pass_or_are_refused(outcomes: tuple[tuple[Case, Outcome], ...]) -> None:
    bad = [f"{c.id}: {o.reason}" for c, o in outcomes if o.status in (Status.FAIL, Status.ERROR)]
    assert not bad
    assert sum(o.status is Status.PASS for _, o in outcomes) > 180


def test_required_cases_of_claimed_profiles_are_whole(outcomes: tuple[tuple[Case, Outcome], ...]) -> None:
    missing = [c.id for c, o in outcomes if c.profile in WHOLE and o.status is not Status.PASS]
    assert not missing


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", MORE)
def test_more_kinds_of_products(kind: str, data: str) -> None:
    for outcome in more(kind, data):
        assert outcome.status is Status.PASS, outcome.reason


@cache
def more(kind: str, data: str) -> tuple[Outcome, ...]:
    options = ("static",) if "tensor" in kind else ()
    case = Case("gemm", kind, (("m", 17), ("n", 64), ("k", 160)), "bf16", data, options=options)
    return tuple(run_case(case, emulation.ops(arch)).outcome for arch in MORE[kind])


def test_every_emulated_operator_is_met() -> None:
    """By the cases of this file, all of them: other tests may run in another process."""
    for arch in ("A2", "A5"):
        ran(arch)
    for kind in MORE:
        more(kind, DATA[0])
    assert set(library.KERNELS) == set(library.CALLS)
