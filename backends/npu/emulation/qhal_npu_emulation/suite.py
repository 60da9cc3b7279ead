"""Levels L1 schema, L1 meta and L2: conformance level 0 through the backend of one generation, counted by operator."""

from __future__ import annotations

import time
from typing import Any

import qhal_npu_emulation as emulation
from qhal_conformance import report
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_npu_emulation import attentions, library

MORE = {
    "int4.row*fp32~int8.row*fp32": ("A2", "A3"),
    "int4.row*fp32~int4.row*fp32": ("A2", "A3"),
    "int8.row*fp32~int8-fp32.tensor*fp32": ("A2", "A3", "A5"),
    "int8.row*bf16": ("A2", "A3"),
    "e2m1.g32*e8m0~e2m1.g32*e8m0": ("A5",),
}
"""Kinds of products that level 0 has no case for: generations by weight and input."""
DATA = ("normal", "codes", "onehot", "zero", "outlier", "positive", "tiny_columns", "special")


def run(arch: str) -> dict[str, Any]:
    """The report of the suite, cut to counts, profiles and what failed; calls by operator."""
    from qhal_conformance.cases import Case

    start = time.perf_counter()
    ops = emulation.ops(arch)
    records = [run_case(case, ops) for case in catalogue(0)]
    found = report.build(ops, emulation.name(arch), records, 0, "", time.perf_counter() - start)
    more = []
    for kind, on in MORE.items():
        options = ("static",) if "tensor" in kind else ()
        cases = [Case("gemm", kind, (("m", 17), ("n", 64), ("k", 160)), "bf16", data, options=options) for data in DATA]
        more += [run_case(case, ops) for case in cases if arch in on]
    bad = [r for r in (*records, *more) if r.outcome.status in (Status.FAIL, Status.ERROR)]
    fused = {a.name: attentions.judged(a, ops, arch) for a in attentions.ASKS if arch in a.on}
    return {
        "arch": arch,
        "evidence": found["evidence"],
        "counts": found["counts"],
        "profiles": found["profiles"],
        "verdict": found["verdict"],
        "more": {"cases": len(more), "passed": sum(r.outcome.status is Status.PASS for r in more)},
        "fused": {"asked": len(fused), "held": sum(not fault for fault in fused.values())},
        "failed": [f"{r.case.id}: {r.outcome.reason}" for r in bad]
        + [f"{n}: {why}" for n, why in fused.items() if why],
        "calls": dict(sorted(library.CALLS.items())),
        "meta": dict(sorted(library.META.items())),
        "keywords": dict(sorted(library.KEYWORDS.items())),
        "schemas": _schemas(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _schemas() -> dict[str, Any]:
    """Operators that were called whose schema in the wheel is not the one of `schemas.txt`."""
    import torch

    wheel = {str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("npu::")}
    lines = [line for line in library.SCHEMAS.read_text().splitlines() if line.startswith("npu::")]
    return {"dumped": len(lines), "differ": [line.partition("(")[0] for line in lines if line not in wheel]}
