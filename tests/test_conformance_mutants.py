"""Planted faults are killed, honest variants are not: the two sides of a tolerance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import qhal
from qhal.requests import NumericsClass
from qhal_conformance import contract_check
from qhal_conformance.cases import find
from qhal_conformance.gemm_cases import cases
from qhal_conformance.generator import Stream
from qhal_conformance.honest import HONEST, sweep
from qhal_conformance.mutants import MUTANTS, cases_of, hunt, judge
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import FailKind, Status
from qhal_conformance.reference import Product
from qhal_conformance.replaying import Replaying
from qhal_conformance.runner import run_case
from qhal_conformance.tolerance import Expected, error_bound
from qhal_conformance.wrapping import Recomputed, Wrapped


def test_there_are_many_and_each_has_cases() -> None:
    assert len(MUTANTS) >= 80 and len({m.name for m in MUTANTS}) == len(MUTANTS)
    assert all(cases_of(m, 0) and m.fault for m in MUTANTS)


@pytest.mark.parametrize("group", ["weight", "product", "quantize", "cache", "contract"])
def test_every_planted_fault_is_killed(group: str) -> None:
    found = hunt(qhal.select("cpu_reference"), [m for m in MUTANTS if m.group == group], 0)
    assert [m["name"] for m in found["mutants"] if not m["killed"]] == []
    assert found["killed"] == found["total"]


@pytest.mark.parametrize("name", ["unchanged", "recomputed"])
def test_a_wrapper_that_changes_nothing_survives(name: str) -> None:
    """Mutants die of their fault, not of being wrapped."""
    kind = {"unchanged": Wrapped, "recomputed": Recomputed}[name]
    for mutant in MUTANTS:
        if mutant.name in ("returns-zeros", "table-off", "refit-moves"):
            fate = judge(
                type(mutant)(name, mutant.group, mutant.profile, "none", kind), qhal.select("cpu_reference"), 0
            )
            assert not fate.killed, fate


def test_graphs_that_replay_rightly_pass() -> None:
    """The backend around which faults of graphs are planted: every rule of the contract holds, and graphs are asked."""
    ops = Replaying(qhal.select("cpu_reference"))
    outcomes = {case.subject: run_case(case, ops).outcome for case in contract_check.cases(0)}
    assert {o.status for o in outcomes.values()} == {Status.PASS}, outcomes
    assert outcomes["graphs-replay"].elements > 20 and outcomes["graphs-see-refits"].elements > 10


def test_honest_variants_raise_no_alarm() -> None:
    """Every variant over formats, data sets and seeds; each in its own class."""
    chosen = [c for c in cases(0) if not c.has("exact") and c.size("m") < 200]
    found = sweep(qhal.select("cpu_reference"), chosen[::6], range(3))
    assert found["alarms"] == []
    assert found["checks"] > 60 * len(HONEST)


def _without(monkeypatch: pytest.MonkeyPatch, **zeros: float) -> None:
    """Take terms out of the tolerance."""
    whole = Product.expected

    def expected(self: Product, numerics: NumericsClass) -> Expected:
        e = whole(self, numerics)
        return replace(e, **{name: np.zeros_like(e.ref) for name in zeros})

    monkeypatch.setattr(Product, "expected", expected)


@pytest.mark.parametrize(
    ("variant", "term", "name"),
    [
        ("dequantized", {"rounded": 0.0}, "gemm/int4.g128*fp16/m64_n64_k384/bf16/positive+strided/0"),
        (
            "reduced-sum",
            {"one_sided": 0.0, "spread": 0.0},
            "gemm/e2m1.g32*e8m0/m64_n64_k160/fp16/small_onto_large+offset/0",
        ),
    ],
)
def test_terms_beyond_a_constant_are_needed(
    variant: str, term: dict[str, float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them an honest variant would be rejected."""
    case = find(catalogue(0), name)
    ops = HONEST[variant](qhal.select("cpu_reference"))
    assert run_case(case, ops).outcome.status == Status.PASS
    _without(monkeypatch, **term)
    assert run_case(case, ops).outcome.kind == FailKind.NUMERIC


def test_roundings_of_decoding_are_needed_for_short_sums() -> None:
    """One product of two scaled codes: scales applied after the product round twice more than the definition."""
    g = Stream("short", "codes")
    c, d = (g.integers(-127, 128, (4000,)) for _ in range(2))
    s, t = (g.mantissas(23, (4000,)) for _ in range(2))
    got = ((c * d).astype(np.float32) * s * t).astype(np.float64)
    products = (c.astype(np.float32) * s).astype(np.float64) * (d.astype(np.float32) * t).astype(np.float64)
    size = np.abs(products)
    outside = []
    for decoding in (0, 2):
        e = Expected(products, size, size, size, terms=1, decoding=decoding)
        outside.append(int((np.abs(got - products) > error_bound(e, NumericsClass.FP32_ACC, "fp32")).sum()))
    assert outside[0] > 0 and outside[1] == 0
