"""Planted faults are killed, honest variants are not: the two sides of a tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qhal
from qhal.groups import Groups
from qhal.interface import MemoryStats
from qhal.prepared import Prepared
from qhal.requests import NumericsClass, Request, Support
from qhal.specs import Operand
from qhal_conformance import contract_check
from qhal_conformance.by_data import OWN, asked, matrix, owned
from qhal_conformance.by_data import table as by_data_table
from qhal_conformance.cases import find
from qhal_conformance.faults_softmax import Softmax
from qhal_conformance.generator import Stream
from qhal_conformance.honest import HONEST, chosen, sweep
from qhal_conformance.mutants import MUTANTS, cases_of, hunt, judge
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import FailKind, Status
from qhal_conformance.peers import compare_rules, numeric
from qhal_conformance.reference import Product
from qhal_conformance.replaying import Replaying
from qhal_conformance.runner import run_case
from qhal_conformance.tolerance import Expected, error_bound
from qhal_conformance.wrapping import Recomputed, Weight, Wrapped


def test_there_are_many_and_each_has_cases() -> None:
    assert len(MUTANTS) >= 80 and len({m.name for m in MUTANTS}) == len(MUTANTS)
    assert all(cases_of(m, 0) and m.fault for m in MUTANTS)


@pytest.mark.parametrize("group", sorted({m.group for m in MUTANTS}))
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


@pytest.mark.parametrize(("rounds", "lost"), [(1, False), (2, False), (100, True)])
def test_memory_that_grows_once_is_not_lost(rounds: int, lost: bool) -> None:
    """A workspace that a library takes late, or pages touched again: only what grows in every round is a leak."""
    calls = []

    class Growing(Wrapped):
        def gemm(self, x: Tensor, w: Prepared, *, input: int = 0, out: Tensor | None = None) -> Tensor:
            calls.append(1)
            return super().gemm(x, w, input=input, out=out)

        def memory_stats(self) -> MemoryStats:
            used = 1 + min(len(calls), 8 + rounds * 64) * 2 * 4096 * 64
            return MemoryStats(used, used, 1 << 40)

    case = next(c for c in contract_check.cases(0) if c.subject == "memory-comes-back")
    outcome = run_case(case, Growing(qhal.select("cpu_reference"))).outcome
    assert (outcome.status == Status.FAIL) == lost and (outcome.kind == FailKind.LEAK) == lost, outcome


def test_attention_by_tiles_survives() -> None:
    """What faults of softmax change one step of, unchanged: codes of P included."""
    kind = type("SoftmaxWithCodes", (Softmax,), {"_codes": True})
    ops = kind(qhal.select("cpu_reference"))
    mine = [c for c in catalogue(0) if c.operation == "attention" and c.profile == "kv"]
    assert [c.id for c in mine if run_case(c, ops).outcome.status != Status.PASS] == []


def test_graphs_that_replay_rightly_pass() -> None:
    """The backend around which faults of graphs are planted: every rule of the contract holds, and graphs are asked."""
    ops = Replaying(qhal.select("cpu_reference"))
    outcomes = {case.subject: run_case(case, ops).outcome for case in contract_check.cases(0)}
    assert {o.status for o in outcomes.values()} == {Status.PASS}, outcomes
    assert outcomes["graphs-replay"].elements > 20 and outcomes["graphs-see-refits"].elements > 10


class _Unsteady(Wrapped):
    """Sums in another order each time, which it declares: experts and codebooks end a bit off in one element."""

    def supports(self, request: Request) -> Support:
        return replace(super().supports(request), deterministic=False, batch_invariant=False, concurrent=False)

    def prepare(
        self,
        w: Weight,
        request: Any,
        *,
        inputs: Sequence[Operand] = (),
        operand: Operand | None = None,
        bias: torch.Tensor | None = None,
        into: Prepared | None = None,
    ) -> Prepared:
        made = super().prepare(w, request, inputs=inputs, operand=operand, bias=bias, into=into)
        made.support = replace(made.support, deterministic=False)
        return made

    def grouped_gemm(self, x: Any, w: Prepared, groups: Groups, *, out: Any = None) -> Any:
        return self._off(super().grouped_gemm(x, w, groups, out=out))

    def vq_decode(self, w: Prepared, *, rows: slice | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._off(super().vq_decode(w, rows=rows, out=out))

    def _off(self, y: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        y[(0,) * (y.dim() - 1)].view(torch.int16)[self.calls % y.shape[-1]] ^= 1
        return y


def test_a_backend_that_declares_other_bits_each_time_keeps_every_rule() -> None:
    ops = _Unsteady(qhal.select("cpu_reference"))
    outcomes = {case.subject: run_case(case, ops).outcome for case in contract_check.cases(0)}
    assert {o.status for o in outcomes.values() if o.status != Status.PASS} == {Status.UNSUPPORTED}, outcomes
    assert outcomes["refits"].elements > 6 and outcomes["weights-are-independent"].status == Status.PASS


def test_honest_variants_raise_no_alarm() -> None:
    """Every variant over formats, data sets and seeds; each in its own class."""
    found = sweep(qhal.select("cpu_reference"), chosen(catalogue(0))[::9], range(1))
    assert found["alarms"] == []
    assert found["checks"] > 300
    assert {v["class"] for v in found["variants"].values()} == {c.label for c in NumericsClass}
    assert set(HONEST) <= set(found["variants"]) and {"attention-split-3", "butterflies-fp32"} <= set(found["variants"])


def test_other_rules_beside_ours() -> None:
    """On a few faults and honest products: ours rejects every fault and nothing honest; the others do not."""
    faults = [
        m for m in numeric() if m.name in ("nibbles-swapped", "bf16-sum", "result-half-away", "subnormals-flushed")
    ]
    honest = [c for c in chosen(catalogue(0)) if c.subject == "int4.g32*bf16" and c.operation == "gemm" and c.size("m")]
    found = compare_rules(qhal.select("cpu_reference"), faults, honest[:6])
    assert found["rules"]["qhal"]["killed"] == found["faults"] == len(faults) >= 3
    assert found["rules"]["qhal"]["alarms"] == 0 and found["checks"] > 50
    assert all(found["rules"][name]["killed"] < len(faults) for name in ("NMSE < 5e-4", "1 - similarity < 1e-3"))
    assert found["rules"]["allclose 1e-2"]["alarms"] > 0


def test_every_data_set_names_a_fault() -> None:
    assert set(OWN) == set(asked(0)) == set(asked(1))


@pytest.mark.parametrize("operation", sorted({key.partition(" ")[0] for key in OWN}))
def test_every_data_set_has_a_fault_of_its_own(operation: str) -> None:
    """It kills a planted fault that no other set of its operation shows; a set that does not would go."""
    found = owned(qhal.select("cpu_reference"), operation, 0)
    assert {key: killers for key, killers in found.items() if killers != [key]} == {}


def test_a_data_set_without_a_fault_is_named() -> None:
    found = matrix(qhal.select("cpu_reference"), [m for m in MUTANTS if m.name == "nan-becomes-zero"], 0)
    assert found["faults"]["nan-becomes-zero"] == ["gemm special"]
    assert found["sets"]["gemm special"]["alone"] == ["nan-becomes-zero"]
    assert "gemm normal" in found["needless"] and "gemm special" not in found["needless"]
    assert "| gemm special | 1 | `nan-becomes-zero` |" in by_data_table(found)


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
        ("dequantized", {"rounded": 0.0}, "gemm/uint4-uint4.g32*fp16/m515_n48_k160/bf16/positive+offset+bias/0"),
        (
            "aligned-32x13",
            {"one_sided": 0.0, "spread": 0.0},
            "gemm/bf16/m16_n128_k256/bf16/small_onto_large+offset/0",
        ),
    ],
)
def test_terms_beyond_a_constant_are_needed(
    variant: str, term: dict[str, float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them an honest variant would be rejected."""
    case = find(catalogue(1), name)
    ops = HONEST[variant](qhal.select("cpu_reference"))
    assert run_case(case, ops).outcome.status == Status.PASS
    _without(monkeypatch, **term)
    assert run_case(case, ops).outcome.kind in (FailKind.NUMERIC, FailKind.STATS)


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
