"""Which data set kills which planted fault: one that no fault needs has no reason to be run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from qhal.interface import QuantOps
from qhal_conformance.mutants import Mutant, cases_of
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case


def matrix(
    ops: QuantOps, mutants: Iterable[Mutant], level: int, seen: Callable[[str], None] = lambda name: None
) -> dict[str, Any]:
    """`sets`: per `operation data` the faults that it kills, and those that no other set of its operation kills;
    `faults`: the reverse; `needless`: the sets that kill no fault alone."""
    faults: dict[str, list[str]] = {}
    for mutant in mutants:
        killers: list[str] = []
        precision = torch.get_float32_matmul_precision()
        for case in cases_of(mutant, level):
            key = f"{case.operation} {case.data}"
            if key in killers or case.operation == "contract":
                continue
            if run_case(case, mutant.make(ops)).outcome.status in (Status.FAIL, Status.ERROR):
                killers.append(key)
        torch.set_float32_matmul_precision(precision)
        faults[mutant.name] = killers
        seen(mutant.name)
    sets = {}
    for key in asked(level):
        operation = key.partition(" ")[0]
        kills = [fault for fault, killers in faults.items() if key in killers]
        alone = [fault for fault in kills if [k.partition(" ")[0] for k in faults[fault]].count(operation) == 1]
        sets[key] = {"kills": kills, "alone": alone}
    needless = [key for key, entry in sets.items() if not entry["alone"]]
    return {"sets": sets, "faults": faults, "needless": needless}


def asked(level: int) -> list[str]:
    """Every `operation data` that a level has a case of."""
    used = {(case.operation, case.data) for case in catalogue(level)}
    return [f"{name} {data}" for name, o in OPERATIONS.items() for data in o.data if (name, data) in used]


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| operation, data set | faults killed | killed by no other set of the operation |", "| --- | --- | --- |"]
    for key, entry in found["sets"].items():
        alone = ", ".join(f"`{name}`" for name in entry["alone"][:3])
        more = f" and {len(entry['alone']) - 3} more" if len(entry["alone"]) > 3 else ""
        lines.append(f"| {key} | {len(entry['kills'])} | {alone}{more} |")
    return "\n".join(lines)
