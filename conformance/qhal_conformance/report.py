"""report.json: everything a reader needs to believe a run, and everything `verify` needs to disbelieve it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import Distribution, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qhal.interface import INTERFACE_VERSION, QuantOps
from qhal.selection import GROUP, Available, backends, probe
from qhal_conformance import SUITE_VERSION, mustpass
from qhal_conformance.outcome import Status
from qhal_conformance.runner import Record

SCHEMA = 1
"""Version of the report's fields; `verify` refuses others."""


def about(ops: QuantOps, spec: str) -> dict[str, Any]:
    """What a report says of a backend, its device and where it ran; made in the process in which it was asked."""
    return {
        "interface": list(INTERFACE_VERSION),
        "backend": _backend(ops, spec),
        "device": _device(ops, spec),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
        },
    }


def build(
    backend: QuantOps | dict[str, Any], spec: str, records: Sequence[Record], level: int, only: str, seconds: float
) -> dict[str, Any]:
    """The report of one run. only: the filter of a partial run, "" for a whole one; a partial run has no verdict.

    backend: the backend, or what `about` said of it in another process
    """
    cases = [case_entry(record, spec) for record in records]
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": {"version": SUITE_VERSION, "mustpass": mustpass.sha(level)},
        **(about(backend, spec) if isinstance(backend, QuantOps) else backend),
        "evidence": "L3 device",
        "level": level,
        "filter": only,
        "profiles": profiles(cases, level, only),
        "counts": counts(cases),
        "verdict": verdict(cases, level, only),
        "seconds": round(seconds, 3),
        "cases": cases,
    }
    found["digest"] = digest(found)
    return found


def counts(cases: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many cases ended as what."""
    tally = Counter(case["status"] for case in cases)
    return {status.value: tally.get(status.value, 0) for status in Status}


def profiles(cases: Sequence[dict[str, Any]], level: int, only: str) -> dict[str, dict[str, Any]]:
    """Per profile: required, how the required cases ended, and the verdict: pass, fail, incomplete or none.

    fail        a case of the profile, required or not, failed or could not be finished
    incomplete  nothing failed, but a required case is unsupported, skipped or was not run
    none        the run was filtered
    """
    by_id = {case["id"]: case for case in cases}
    found = {}
    for profile, names in sorted(mustpass.required(level).items()):
        mine = [case for case in cases if case["profile"] == profile]
        broken = [case for case in mine if case["status"] in (Status.FAIL.value, Status.ERROR.value)]
        passed = sum(1 for name in names if name in by_id and by_id[name]["status"] == Status.PASS.value)
        word = "none" if only else "fail" if broken else "pass" if passed == len(names) else "incomplete"
        found[profile] = {"verdict": word, "required": len(names), "passed": passed, **counts(mine)}
    return found


def verdict(cases: Sequence[dict[str, Any]], level: int, only: str) -> str:
    """pass | fail | error | none.

    fail: something failed, or no profile is complete. error: nothing was executed. none: a filtered run proves nothing.
    """
    tally = counts(cases)
    if tally[Status.PASS.value] + tally[Status.FAIL.value] + tally[Status.ERROR.value] == 0:
        return "error"
    if only:
        return "none"
    whole = any(p["verdict"] == "pass" for p in profiles(cases, level, only).values())
    return "pass" if whole and not tally[Status.FAIL.value] and not tally[Status.ERROR.value] else "fail"


def digest(report: dict[str, Any]) -> str:
    """sha256 of the report without this field: shows an edit, proves no origin."""
    rest = {key: value for key, value in report.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def case_entry(record: Record, spec: str) -> dict[str, Any]:
    """One case of the report."""
    case, outcome = record.case, record.outcome
    return {
        "id": case.id,
        "profile": case.profile,
        "required": case.required,
        "status": outcome.status.value,
        "kind": None if outcome.kind is None else outcome.kind.value,
        "reason": outcome.reason,
        "class": outcome.numerics,
        "worst": None if outcome.worst is None else _finite(asdict(outcome.worst)),
        "headroom": _number(outcome.headroom),
        "rms": _number(outcome.rms),
        "bias": _number(outcome.bias),
        "n": outcome.elements,
        "notes": list(outcome.notes),
        "seconds": round(record.seconds, 4),
        "input_sha": record.inputs_sha,
        "repro": f"qhal conformance repro '{case.id}' --backend {spec}",
    }


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no Inf: they become text."""
    return value if value is None or np.isfinite(value) else str(value)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _number(v) if isinstance(v, float) else list(v) if isinstance(v, tuple) else v for k, v in values.items()
    }


def _backend(ops: QuantOps, spec: str) -> dict[str, Any]:
    name = spec.partition(":")[0]
    found: dict[str, Any] = {"name": ops.name or name, "spec": spec, "interface": list(type(ops).interface)}
    for point in entry_points(group=GROUP):
        if point.name == name and point.dist is not None:
            found.update(distribution=point.dist.name, version=point.dist.version, files=_files_sha(point.dist))
    return found


def _files_sha(dist: Distribution) -> str:
    """sha256 over the hashes that the installer recorded; "" for an editable installation."""
    recorded = sorted(f"{f} {f.hash.value}" for f in dist.files or [] if f.hash is not None and f.suffix == ".py")
    return hashlib.sha256("\n".join(recorded).encode()).hexdigest() if recorded else ""


def _device(ops: QuantOps, spec: str) -> dict[str, Any]:
    name, _, index = spec.partition(":")
    found: dict[str, Any] = {"type": ops.device.type, "memory": ops.memory_stats().total}
    info = backends().get(name)
    state = None if info is None else probe(info)
    if isinstance(state, Available):
        for device in state.devices:
            if not index or str(device.index) == index:
                found.update(
                    arch=device.arch, count=len(state.devices), facts={str(k): str(v) for k, v in device.facts.items()}
                )
                break
    return found


def save(report: dict[str, Any], folder: Path, markdown: str) -> tuple[Path, Path]:
    """Write report.json and report.md; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (("report.json", json.dumps(report, indent=1) + "\n"), ("report.md", markdown)):
        target, part = folder / name, folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(target)
        written.append(target)
    return written[0], written[1]
