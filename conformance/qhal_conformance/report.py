"""report.json: everything a reader needs to believe a run, and everything `verify` needs to disbelieve it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from math import isfinite
from typing import Any

from qhal.interface import INTERFACE_VERSION, QuantOps
from qhal_conformance import mustpass, provenance, support
from qhal_conformance.outcome import Status
from qhal_conformance.runner import Record

SCHEMA = 2
"""Version of the report's fields, which `report.schema.json` describes; `verify` refuses others."""


def about(ops: QuantOps, spec: str) -> dict[str, Any]:
    """What a report says of a backend, its device and where it ran; made in the process in which it was asked."""
    spec = provenance.resolved(ops, spec)
    return {
        "interface": list(INTERFACE_VERSION),
        "backend": provenance.backend(ops, spec),
        "device": provenance.device(ops, spec),
        "environment": provenance.environment(),
    }


def build(
    backend: QuantOps | dict[str, Any], spec: str, records: Sequence[Record], level: int, only: str, seconds: float
) -> dict[str, Any]:
    """The report of one run. only: the filter of a partial run, "" for a whole one; a partial run has no verdict.

    backend: the backend, or what `about` said of it in another process, and what it claims under "support"
    """
    if isinstance(backend, QuantOps):
        backend = about(backend, spec) | {"support": support.rows(backend, [record.case for record in records])}
    spec = backend["backend"]["spec"]
    cases = [case_entry(record, spec) for record in records]
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "suite": provenance.suite(level),
        **backend,
        "evidence": evidence(cases, backend["device"]),
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


def evidence(cases: Sequence[dict[str, Any]], device: dict[str, Any]) -> dict[str, dict[str, str]]:
    """By operation and architecture, what was proven by name: one device, so one level, or "not run"."""
    found: dict[str, str] = {}
    for case in cases:
        operation = case["id"].partition("/")[0]
        ran = case["status"] in (Status.PASS.value, Status.FAIL.value)
        if ran or operation not in found:
            found[operation] = device["evidence"] if ran else provenance.NOT_RUN
    return {operation: {device["arch"] or device["type"]: level} for operation, level in sorted(found.items())}


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
        "histogram": None if outcome.histogram is None else list(outcome.histogram),
        "notes": list(outcome.notes),
        "seconds": round(record.seconds, 4),
        "input_sha": record.inputs_sha,
        "repro": repro(case.id, spec),
    }


def repro(case_id: str, spec: str) -> str:
    """The command that runs one case again."""
    return f"qhal conformance repro '{case_id}' --backend {spec}"


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no Inf: they become text."""
    return value if value is None or isfinite(value) else str(value)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _number(v) if isinstance(v, float) else list(v) if isinstance(v, tuple) else v for k, v in values.items()
    }
