"""Does the suite notice? Planted faults around a backend that passes; each must be killed by a case of its profile.

A mutant hands every call to the backend and changes one thing. Its cases run until the first failure. What survives is
a hole in the suite, and the command fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qhal.interface import QuantOps
from qhal_conformance.cases import Case
from qhal_conformance.faults_cache import CACHE_FAULTS
from qhal_conformance.faults_comm import COMM_FAULTS
from qhal_conformance.faults_contract import CONTRACT_FAULTS
from qhal_conformance.faults_experts import EXPERT_FAULTS
from qhal_conformance.faults_forms import FORM_FAULTS
from qhal_conformance.faults_inputs import INPUT_FAULTS
from qhal_conformance.faults_mla import MLA_FAULTS
from qhal_conformance.faults_paging import PAGING_FAULTS
from qhal_conformance.faults_product import PRODUCT_FAULTS
from qhal_conformance.faults_quantize import QUANTIZE_FAULTS
from qhal_conformance.faults_rare import RARE_FAULTS
from qhal_conformance.faults_rotation import ROTATION_FAULTS
from qhal_conformance.faults_softmax import SOFTMAX_FAULTS
from qhal_conformance.faults_vq import VQ_FAULTS
from qhal_conformance.faults_weight import WEIGHT_FAULTS
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case


@dataclass(frozen=True)
class Mutant:
    """One planted fault: its name, the profile whose cases must kill it, what is wrong, and the class that is wrong."""

    name: str
    group: str
    profile: str
    fault: str
    make: Callable[[QuantOps], QuantOps]


@dataclass(frozen=True)
class Fate:
    """What became of a mutant: the case that killed it and how, or how many cases it survived."""

    name: str
    group: str
    profile: str
    fault: str
    killed: bool
    case: str
    how: str
    reason: str
    cases: int
    seconds: float


_OPERATIONS = {
    "weight": ("gemm",),
    "product": ("gemm",),
    "quantize": ("quantize", "contract", "gemm"),
    "contract": ("contract",),
    "cache": ("quant_kv", "hadamard", "grouped_gemm", "attention"),
    "rotation": ("hadamard",),
    "mla": ("quant_kv", "attention"),
    "comm": ("comm_quant",),
    "vq": ("vq_decode", "vq_gemm"),
    "rare": ("contract", "gemm"),
}

MUTANTS: tuple[Mutant, ...] = tuple(
    Mutant(name, group, profile, fault.strip(), make)
    for group, faults in (
        ("weight", WEIGHT_FAULTS),
        ("product", PRODUCT_FAULTS),
        ("product", INPUT_FAULTS),
        ("quantize", QUANTIZE_FAULTS),
        ("cache", CACHE_FAULTS),
        ("cache", EXPERT_FAULTS),
        ("rotation", ROTATION_FAULTS),
        ("mla", MLA_FAULTS),
        ("comm", COMM_FAULTS),
        ("vq", VQ_FAULTS),
        ("contract", CONTRACT_FAULTS),
        ("cache", PAGING_FAULTS),
        ("cache", SOFTMAX_FAULTS),
        ("rare", RARE_FAULTS),
    )
    for name, profile, fault, make in faults
) + tuple(Mutant(name, group, profile, fault.strip(), make) for group, name, profile, fault, make in FORM_FAULTS)


def cases_of(mutant: Mutant, level: int) -> list[Case]:
    """The cases that may kill it: its profile's, of the operations that its group touches, cheap ones first."""
    wanted = _OPERATIONS[mutant.group]
    mine = [c for c in catalogue(level) if c.profile == mutant.profile and c.operation in wanted]
    return sorted(mine, key=lambda c: wanted.index(c.operation))


def judge(mutant: Mutant, ops: QuantOps, level: int) -> Fate:
    """Run a mutant's cases until one fails."""
    start, seen = time.perf_counter(), 0
    for case in cases_of(mutant, level):
        outcome = run_case(case, mutant.make(ops)).outcome
        seen += 1
        if outcome.status in (Status.FAIL, Status.ERROR):
            how = outcome.status.value if outcome.kind is None else outcome.kind.value
            return _fate(mutant, True, case.id, how, outcome.reason, seen, start)
    return _fate(mutant, False, "", "", "", seen, start)


def _fate(mutant: Mutant, killed: bool, case: str, how: str, reason: str, seen: int, start: float) -> Fate:
    seconds = round(time.perf_counter() - start, 3)
    return Fate(mutant.name, mutant.group, mutant.profile, mutant.fault, killed, case, how, reason, seen, seconds)


def hunt(
    ops: QuantOps, mutants: Iterable[Mutant], level: int, seen: Callable[[Fate], None] = lambda fate: None
) -> dict[str, Any]:
    """Judge mutants; one object with `killed`, `total` and `mutants`."""
    fates = []
    for mutant in mutants:
        fates.append(judge(mutant, ops, level))
        seen(fates[-1])
    killed = sum(fate.killed for fate in fates)
    return {"killed": killed, "total": len(fates), "level": level, "mutants": [asdict(fate) for fate in fates]}
