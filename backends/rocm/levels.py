"""Everything that is known of this backend without an AMD GPU, by level of evidence, in one report.

    python backends/rocm/levels.py --out build/conformance/rocm

L0 layout       the tests of `test_rocm_layouts.py`: bijections, exact changes of flavour
L1 compiles     every kernel and format for every chip (`python -m qhal_triton.compile`)
L2 interpreted  the conformance suite, level 0, in Triton's interpreter, as gfx942 would choose, whole; as gfx950 the
                cases for which `supports` answers otherwise. A result of the same sources is kept, and says that it is
L3 device       not run

Each level is a section of report.json, and none stands in for another. L2 also says how many cases a kernel took and
how many the portable operations. Exit code 0: everything that was run holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import triton

from qhal.requests import Request
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_cases
from qhal_rocm.ops import RocmOps

HERE = Path(__file__).parent
COMPILED = ("gfx942", "gfx950", "gfx1201")
"""Chips of which every cell is claimed. On gfx1100 four kernels of attention spill registers: see docs/rocm.md."""
WHOLE, OTHERS = "gfx942", ("gfx950",)
"""The chip that the whole suite is interpreted as; those of which only what is chosen otherwise is."""
TIMEOUT = "300"
"""Seconds for one case: the interpreter is slow, and a loaded machine is slower."""


def layouts(out: Path) -> dict[str, Any]:
    """L0."""
    xml = out / "layouts.xml"
    tests = HERE / "tests" / "test_rocm_layouts.py"
    done = _run([sys.executable, "-m", "pytest", "-q", str(tests), f"--junitxml={xml}"], out / "layouts.log")
    cases = ElementTree.parse(xml).getroot().iter("testcase") if xml.is_file() else ()
    found = {str(case.get("name")): not list(case) for case in cases}
    return {"ok": done == 0 and bool(found), "checks": found}


def compiles(out: Path, archs: Sequence[str], jobs: int) -> dict[str, Any]:
    """L1."""
    cells = out / "cells.json"
    cells.unlink(missing_ok=True)
    command = [sys.executable, "-m", "qhal_triton.compile", "--jobs", str(jobs), "--json", str(cells), "--arch", *archs]
    code = _run(command, out / "compile.log", without="TRITON_INTERPRET")
    if not cells.is_file():
        return {"ok": False, "reason": f"the compile check ended with {code}, see {out / 'compile.log'}"}
    found = json.loads(cells.read_text())
    bad = [f"{c['arch']} {c['name']}: {'; '.join(c['problems'])}" for c in found["cells"] if c["problems"]]
    return {"ok": code == 0, "triton": found["triton"], "cells": len(found["cells"]), "archs": list(archs), "bad": bad}


def interpreted(out: Path, arch: str, jobs: int) -> dict[str, Any]:
    """L2 of one chip: the whole suite."""
    folder, key = out / arch, sources()
    report, kept = folder / "report.json", folder / "summary.json"
    if kept.is_file() and report.is_file() and (found := json.loads(kept.read_text()))["key"] == key:
        return {**found, "reused": True}
    kept.unlink(missing_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "qhal_cli.entry", "conformance", "run", "--backend", "rocm", "--level", "0"]
    command += ["--jobs", str(jobs)]
    environment = {"TRITON_INTERPRET": "1", "QHAL_ROCM_INTERPRET": arch, "OMP_NUM_THREADS": "1"}
    code = _run([*command, "--timeout", TIMEOUT, "--out", str(folder)], out / f"{arch}.log", environment)
    if not report.is_file():
        return {"ok": False, "reason": f"the suite ended with {code}, see {out / f'{arch}.log'}"}
    found = json.loads(report.read_text())
    assert found["device"]["arch"] == arch and found["device"]["evidence"].startswith("L2")
    summary = {
        "key": key,
        "reused": False,
        "ok": code == 0,
        "verdict": found["verdict"],
        "suite": found["suite"]["version"],
        "counts": found["counts"],
        "profiles": {name: entry["verdict"] for name, entry in found["profiles"].items()},
        "by": by_kernel(found["cases"], arch),
        "seconds": found["seconds"],
        "report": report.relative_to(out).as_posix(),
    }
    kept.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def otherwise(out: Path, arch: str) -> dict[str, Any]:
    """L2 of another chip: the cases for which it chooses something else than `WHOLE`."""
    kept, key = out / f"{arch}.json", sources()
    if kept.is_file() and (found := json.loads(kept.read_text()))["key"] == key:
        return {**found, "reused": True}
    kept.unlink(missing_ok=True)
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    code = _run([sys.executable, __file__, "--cases", arch, "--out", str(out)], out / f"{arch}.log", environment)
    if not kept.is_file():
        return {"ok": False, "reason": f"the cases ended with {code}, see {out / f'{arch}.log'}"}
    return {**json.loads(kept.read_text()), "reused": False}


def cases_of(arch: str, out: Path) -> None:
    """What `otherwise` starts: runs the cases, writes the summary."""
    ops, usual = RocmOps(arch, "cpu"), RocmOps(WHOLE, "cpu")
    asked = ((case, OPERATIONS[case.operation].request(case)) for case in catalogue(0))
    chosen = [c for c, request in asked if request is not None and ops.supports(request) != usual.supports(request)]
    records = run_cases(ops, chosen)
    bad = [f"{r.case.id}: {r.outcome.reason}" for r in records if r.outcome.status in (Status.FAIL, Status.ERROR)]
    entries = [{"id": r.case.id, "status": r.outcome.status.value} for r in records]
    summary = {
        "key": sources(),
        "ok": not bad and bool(records),
        "verdict": "no verdict: only what is chosen otherwise",
        "counts": dict(Counter(entry["status"] for entry in entries)),
        "bad": bad,
        "by": by_kernel(entries, arch),
        "cases": {entry["id"]: entry["status"] for entry in entries},
    }
    (out / f"{arch}.json").write_text(json.dumps(summary, indent=1) + "\n")


@cache
def sources() -> str:
    """What an interpreted result depends on: every Python file of the distributions in it, torch, Triton, Python."""
    found = hashlib.sha256(f"{sys.version} {torch.__version__} {triton.__version__}".encode())
    root = HERE.parents[1]
    for name in ("qhal", "portable", "conformance", "cli", "backends/triton", "backends/rocm"):
        for path in sorted((root / name).rglob("*.py")):
            found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def by_kernel(entries: Sequence[dict[str, Any]], arch: str) -> dict[str, dict[str, int]]:
    """By operation: how many of the executed cases a kernel took, and how many the portable operation."""
    ops = RocmOps(arch, "cpu")
    ran = {entry["id"] for entry in entries if entry["status"] in ("pass", "fail")}
    found: dict[str, Counter[str]] = {}
    for case in catalogue(0):
        if case.id not in ran or case.operation == "contract":
            continue
        request = OPERATIONS[case.operation].request(case)
        who = "portable" if request is None else executor(ops, request)
        found.setdefault(case.operation, Counter({"kernel": 0, "portable": 0}))[who] += 1
    return {operation: dict(count) for operation, count in sorted(found.items())}


def executor(ops: RocmOps, request: Request) -> str:
    """Who takes a request: "kernel" or "portable"."""
    return "portable" if ops._path(request) is None else "kernel"


def _run(command: list[str], log: Path, more: dict[str, str] | None = None, without: str = "") -> int:
    environment = {k: v for k, v in os.environ.items() if k != without} | (more or {})
    with log.open("w") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode


def main() -> int:
    """See the first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/conformance/rocm"))
    parser.add_argument("--compile", nargs="*", default=COMPILED, metavar="ARCH", help="chips of L1")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cases", metavar="ARCH", help=argparse.SUPPRESS)
    given = parser.parse_args()
    out = given.out
    out.mkdir(parents=True, exist_ok=True)
    if given.cases:
        cases_of(given.cases, out)
        return 0
    start = time.monotonic()
    with ThreadPoolExecutor(given.jobs) as pool:
        parts = {WHOLE: pool.submit(interpreted, out, WHOLE, given.jobs)}
        parts |= {arch: pool.submit(otherwise, out, arch) for arch in OTHERS}
        levels: dict[str, Any] = {"L0 layout": layouts(out)}
        levels["L1 compiles"] = compiles(out, given.compile, given.jobs)
        emulated = {arch: part.result() for arch, part in parts.items()}
    levels["L2 interpreted"] = emulated
    levels["L3 device"] = {"ok": None, "reason": "not run: no AMD GPU was at hand"}
    seconds = round(time.monotonic() - start, 1)
    report = {"backend": "rocm", "seconds": seconds, "levels": levels}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(_words(levels))
    print(f"written: {out / 'report.json'} ({seconds:.0f} s)")
    sections = (levels["L0 layout"], levels["L1 compiles"], *emulated.values())
    return 0 if all(section["ok"] for section in sections) else 1


def _words(levels: dict[str, Any]) -> str:
    checks = levels["L0 layout"]["checks"]
    lines = [f"L0 layout: {sum(checks.values())} of {len(checks)} checks hold"]
    cells = levels["L1 compiles"]
    lines.append(
        f"L1 compiles: {cells['cells'] - len(cells['bad'])} of {cells['cells']} cells for {', '.join(cells['archs'])}"
        if "cells" in cells
        else f"L1 compiles: {cells['reason']}"
    )
    lines += [f"  {line}" for line in cells.get("bad", ())]
    for arch, part in levels["L2 interpreted"].items():
        kept = " (kept from a run of the same sources)" * bool(part.get("reused"))
        lines.append(
            f"L2 interpreted as {arch}: {part.get('verdict', part.get('reason'))} {part.get('counts', '')}{kept}"
        )
        lines += [
            f"  {operation}: {count['kernel']} cases by a kernel, {count['portable']} by the portable operation"
            for operation, count in part.get("by", {}).items()
        ]
    return "\n".join([*lines, f"L3 device: {levels['L3 device']['reason']}"])


if __name__ == "__main__":
    sys.exit(main())
