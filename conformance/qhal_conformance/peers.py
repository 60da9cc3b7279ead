"""Other suites' rules beside this one's, on the same faults and the same honest variants.

Each rule sees the same results: of every planted fault that changes a product's numbers, over the cases of its profile
until the rule rejects one; and of every honest variant over every case, where a rejection is a false alarm.

    allclose      |y - ref| <= 1e-2 + 1e-2 |ref| everywhere
    nmse          sum (y - ref)^2 / sum ref^2 < 5e-4
    matched       at least 95 % within 1e-2, absolute or relative
    similarity    1 - 2 sum y ref / sum (y^2 + ref^2) < 1e-3
    tosa          the dot product rule of the TOSA specification for a float32 accumulator: with err = (y - ref) /
                  (S 2^(-1 - fraction bits)) and ksb = ceil(K / 2^((23 - fraction bits) / 2)) + bias, |err| <= 2 ksb,
                  sum err^2 <= 1.6 ksb T, |sum err| <= sqrt(16 ksb T)
    qhal          the bound and the statistics of the declared class
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from qhal.errors import UnsupportedError
from qhal.interface import QuantOps
from qhal.requests import NumericsClass, minimum_class
from qhal.tensors import QTensor
from qhal_conformance.cases import Case
from qhal_conformance.datasets import has_statistics
from qhal_conformance.decode import numbers
from qhal_conformance.gemm_check import Problem, build
from qhal_conformance.generator import F64
from qhal_conformance.honest import HONEST
from qhal_conformance.mutants import MUTANTS, Mutant, cases_of
from qhal_conformance.problem import DTYPES
from qhal_conformance.tolerance import Expected, judge
from qhal_conformance.wrapping import Recomputed

_FRACTION = {"fp32": 23, "fp16": 10, "bf16": 7}
_LEAST = {"fp32": 2.0**-126, "fp16": 2.0**-14, "bf16": 2.0**-126}


@dataclass(frozen=True)
class Result:
    """A product's numbers, its reference, and what it was asked."""

    y: F64
    expected: Expected
    numerics: NumericsClass
    case: Case
    bias: bool

    @property
    def finite(self) -> tuple[F64, F64] | None:
        """(y, ref) where the reference is finite in the result's type; None if y is wrong about the rest."""
        held = self.expected.ref.astype(np.float32)
        ref = torch.from_numpy(held).to(DTYPES[self.case.out]).double().numpy()
        odd = ~np.isfinite(ref)
        same = (np.isnan(ref) & np.isnan(self.y)) | (ref == self.y)
        if not same[odd].all() or not np.isfinite(self.y[~odd]).all():
            return None
        return self.y[~odd], self.expected.ref[~odd]


def _allclose(r: Result) -> bool:
    pair = r.finite
    return pair is not None and bool((np.abs(pair[0] - pair[1]) <= 1e-2 + 1e-2 * np.abs(pair[1])).all())


def _nmse(r: Result) -> bool:
    pair = r.finite
    if pair is None:
        return False
    error, size = ((pair[0] - pair[1]) ** 2).sum(), (pair[1] ** 2).sum()
    return bool(error == 0 or error < 5e-4 * size)


def _matched(r: Result) -> bool:
    pair = r.finite
    if pair is None:
        return False
    error = np.abs(pair[0] - pair[1])
    return bool(((error <= 1e-2) | (error <= 1e-2 * np.abs(pair[1]))).mean() >= 0.95) if error.size else True


def _similarity(r: Result) -> bool:
    pair = r.finite
    if pair is None:
        return False
    size = (pair[0] ** 2 + pair[1] ** 2).sum()
    return bool(size == 0 or 1 - 2 * (pair[0] * pair[1]).sum() / size < 1e-3)


def _tosa(r: Result) -> bool:
    if r.finite is None:
        return False
    use = np.isfinite(r.y) & np.isfinite(r.expected.ref)
    fraction, total = _FRACTION[r.case.out], int(use.sum())
    if not total:
        return True
    ksb = np.ceil(max(r.expected.terms, 1) / 2 ** ((23 - fraction) / 2)) + r.bias
    s = r.expected.s[use]
    error = (r.y[use] - r.expected.ref[use]) / np.maximum(s * 2.0 ** (-1 - fraction), _LEAST[r.case.out])
    if (r.y[use][s == 0] != 0).any() or (np.abs(error) > 2 * ksb).any():
        return False
    if total < 1000:
        return True
    signed = has_statistics(r.case.data)
    return bool((error**2).sum() <= 1.6 * ksb * total and (not signed or abs(error.sum()) <= (16 * ksb * total) ** 0.5))


def _qhal(r: Result) -> bool:
    return judge(r.y, r.expected, r.numerics, r.case.out, statistics=has_statistics(r.case.data)).kind is None


RULES: dict[str, Callable[[Result], bool]] = {
    "allclose 1e-2": _allclose,
    "NMSE < 5e-4": _nmse,
    "95 % within 1e-2": _matched,
    "1 - similarity < 1e-3": _similarity,
    "TOSA dot product": _tosa,
    "qhal": _qhal,
}


@dataclass
class Score:
    """What one rule did: faults that it rejected and let pass, honest results that it rejected."""

    killed: int = 0
    survivors: list[str] = field(default_factory=list)
    alarms: int = 0
    alarmed: set[str] = field(default_factory=set)


def numeric(mutants: Iterable[Mutant] = MUTANTS) -> list[Mutant]:
    """The faults that change the numbers of a single product: what a rule for numbers can be asked to see."""
    asked = [m for m in mutants if m.group in ("weight", "product", "rare") and _changes_numbers(m)]
    return [m for m in asked if m.name not in ("reads-past-row", "not-deterministic")]  # guards see these, not numbers


def _changes_numbers(m: Mutant) -> bool:
    spoils = {"Spoiled", "RareProduct"}
    kind = m.make
    return isinstance(kind, type) and (issubclass(kind, Recomputed) or kind.__name__ in spoils)


def compare_rules(
    ops: QuantOps,
    mutants: list[Mutant],
    honest_cases: list[Case],
    seen: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """One object: per rule killed of total, false alarms of checks."""
    scores = {name: Score() for name in RULES}
    for mutant in mutants:
        open_rules = dict(RULES)
        for case in cases_of(mutant, 0):
            if case.operation != "gemm" or not case.size("m") or not open_rules:
                continue
            result = _asked(case, mutant.make(ops), False)
            if result is not None:
                open_rules = {name: rule for name, rule in open_rules.items() if rule(result)}
        for name, score in scores.items():
            score.killed += name not in open_rules
            if name in open_rules:
                score.survivors.append(mutant.name)
        seen(mutant.name)
    checks = 0
    for case in honest_cases:
        for name, make in HONEST.items():
            result = _asked(case, make(ops), True)
            if result is None:
                continue
            checks += 1
            for label, rule in RULES.items():
                if not rule(result):
                    scores[label].alarms += 1
                    scores[label].alarmed.add(name)
        seen(case.id)
    rules = {
        name: {"killed": s.killed, "survivors": s.survivors, "alarms": s.alarms, "alarmed": sorted(s.alarmed)}
        for name, s in scores.items()
    }
    return {"faults": len(mutants), "checks": checks, "rules": rules}


def _asked(case: Case, ops: QuantOps, honest: bool) -> Result | None:
    """One plain call; None where it is refused."""
    p: Problem = build(case)
    support = ops.supports(p.request)
    if not support:
        return None
    numerics = minimum_class(p.request) if support.numerics is None else support.numerics
    x = p.x if isinstance(p.x, QTensor) else torch.from_numpy(p.x).to(DTYPES[case.out])
    bias = None if p.bias is None else torch.from_numpy(p.bias)
    operands = tuple(replace(o) for o in p.operands)
    try:
        y = ops.gemm(x, ops.prepare(p.w, p.request, inputs=operands, bias=bias))
    except UnsupportedError:
        return None
    except RuntimeError:
        if honest:
            raise
        return None  # a fault that raises is no number
    return Result(numbers(y).astype(np.float64), p.product.expected(numerics), numerics, case, p.bias is not None)


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| rule | faults killed | false alarms |", "| --- | --- | --- |"]
    for name, score in found["rules"].items():
        lines.append(f"| {name} | {score['killed']} of {found['faults']} | {score['alarms']} of {found['checks']} |")
    return "\n".join(lines)
