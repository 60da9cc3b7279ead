"""Which data set kills which planted fault: one that no fault needs has no reason to be run.

`OWN` names one such fault for every set; a test runs these, `qhal conformance by-data` runs all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from qhal.interface import QuantOps
from qhal_conformance.cases import Case
from qhal_conformance.mutants import MUTANTS, Mutant, cases_of
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case

OWN: dict[str, str] = {
    "gemm normal": "fp32-result-through-bf16",
    "gemm codes": "scale-of-first-call",
    "gemm onehot": "one-code-in-one-lane",
    "gemm zero": "zero-row-divided",
    "gemm signed_range": "one-column-zero",
    "gemm outlier": "columns-past-256",
    "gemm tiny_columns": "weight-subnormals-flushed",
    "gemm positive": "rows-past-256",
    "gemm small_onto_large": "features-past-4096",
    "gemm limits": "x-through-fp16",
    "gemm wide": "scale-magnitude-bf16",
    "gemm special": "nan-becomes-zero",
    "quantize normal": "quantize-rows-past-512",
    "quantize grid": "reciprocal-by-row",
    "quantize ties": "quantize-columns-past-4096",
    "quantize codes": "quantize-least-subnormal",
    "quantize zero": "empty-zero",
    "quantize range": "quantize-clamped-2^80",
    "quantize special": "specials-saturate",
    "hadamard impulse": "block-transposed",
    "hadamard integers": "rotation-approximate-root",
    "hadamard normal": "table-sums-in-bf16",
    "hadamard outlier": "rotation-rows-past-256",
    "hadamard quantized": "rotation-static-ignored",
    "hadamard limits": "rotation-scaled-last",
    "hadamard special": "rotation-nan-lost",
    "quant_kv scattered": "slots-consecutive",
    "quant_kv positive": "page-of-64",
    "quant_kv skipped": "all-skipped",
    "quant_kv limits": "cache-through-fp16",
    "quant_kv single": "one-token",
    "attention normal": "keys-past-1024",
    "attention uniform": "softmax-equal-maxima",
    "attention dominant": "softmax-first-maximum",
    "attention positive": "softmax-codes-cut",
    "attention relabel": "softmax-pages-in-order",
    "attention saturated": "p-scale-start",
    "grouped_gemm normal": "expert-twice",
    "grouped_gemm codes": "expert-sums-16-bits",
    "grouped_gemm onehot": "expert-weights-cut",
    "grouped_gemm outlier": "full-expert",
    "grouped_gemm tiny_columns": "expert-scale-clamped",
    "vq_decode identity": "vq-index-32768",
    "vq_decode codes": "vq-lattice-32768",
    "vq_decode ends": "vq-padding",
    "vq_decode scales": "vq-half-product",
    "vq_decode zero": "vq-zero-scale",
    "vq_gemm codes": "vq-last-rows",
    "vq_gemm scales": "vq-half-product",
    "vq_gemm zero": "vq-zero-scale",
    "vq_gemm onehot": "vq-vector-transposed",
    "comm_quant integers": "comm-back-in-float",
    "comm_quant normal": "comm-before-cut",
    "comm_quant ranks": "comm-no-handle",
    "comm_quant positive": "comm-splits-ignored",
}
"""For every `operation data` of level 0 a planted fault that no other set of the operation shows."""


def matrix(
    ops: QuantOps, mutants: Iterable[Mutant], level: int, seen: Callable[[str], None] = lambda name: None
) -> dict[str, Any]:
    """`sets`: per `operation data` the faults that it kills, and those that no other set of its operation kills;
    `faults`: the reverse; `needless`: the sets that kill no fault alone."""
    faults: dict[str, list[str]] = {}
    for mutant in mutants:
        faults[mutant.name] = killers(ops, mutant, [c for c in cases_of(mutant, level) if c.operation != "contract"])
        seen(mutant.name)
    sets = {}
    for key in asked(level):
        operation = key.partition(" ")[0]
        kills = [fault for fault, killers in faults.items() if key in killers]
        alone = [fault for fault in kills if [k.partition(" ")[0] for k in faults[fault]].count(operation) == 1]
        sets[key] = {"kills": kills, "alone": alone}
    needless = [key for key, entry in sets.items() if not entry["alone"]]
    return {"sets": sets, "faults": faults, "needless": needless}


def killers(ops: QuantOps, mutant: Mutant, cases: Iterable[Case]) -> list[str]:
    """The `operation data` among these cases that kill a mutant, in order; settings that it leaves are put back."""
    found: list[str] = []
    precision = torch.get_float32_matmul_precision()
    for case in cases:
        key = f"{case.operation} {case.data}"
        if key not in found and run_case(case, mutant.make(ops)).outcome.status in (Status.FAIL, Status.ERROR):
            found.append(key)
    torch.set_float32_matmul_precision(precision)
    return found


def owned(ops: QuantOps, operation: str, level: int) -> dict[str, list[str]]:
    """For every set of an operation, the sets that kill the fault which `OWN` says is its own: must be itself alone."""
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    found = {}
    for key in [key for key in OWN if key.startswith(f"{operation} ")]:
        mutant = by_name[OWN[key]]
        found[key] = killers(ops, mutant, [c for c in cases_of(mutant, level) if c.operation == operation])
    return found


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
