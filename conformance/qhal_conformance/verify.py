"""Does a report hold together? Needs no device: everything that follows from something else is computed again."""

from __future__ import annotations

from collections import Counter
from typing import Any

from qhal_conformance import SUITE_VERSION, mustpass, report
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import FailKind, Status

_FIELDS: dict[str, type] = {
    "schema": int,
    "suite": dict,
    "interface": list,
    "backend": dict,
    "device": dict,
    "environment": dict,
    "evidence": str,
    "level": int,
    "filter": str,
    "profiles": dict,
    "counts": dict,
    "verdict": str,
    "seconds": float,
    "cases": list,
    "digest": str,
}
_CASE_FIELDS = (
    *("id", "profile", "required", "status", "kind", "reason", "class", "worst", "headroom"),
    *("rms", "bias", "n", "notes", "seconds", "input_sha", "repro"),
)


def verify(found: object, *, inputs: bool = False) -> list[str]:
    """Everything that does not fit, one line each; an empty list is a report that holds together.

    inputs: also generate every case's inputs again and compare their hashes (slower).
    """
    if not isinstance(found, dict):
        return ["a report is a JSON object"]
    if found.get("schema") != report.SCHEMA:
        return [f"report schema {found.get('schema')!r}; this suite reads schema {report.SCHEMA}"]
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(found.get(name), kind)]
    if wrong:
        return [f"field {name!r} is missing or is no {_FIELDS[name].__name__}" for name in wrong]
    version = found["suite"].get("version")
    if version != SUITE_VERSION:
        return [f"made by suite {version}, this is suite {SUITE_VERSION}: verify it with the suite that made it"]
    if found["level"] not in (0, 1):
        return [f"level {found['level']} is unknown"]
    shaped = [c for c in found["cases"] if not isinstance(c, dict) or any(name not in c for name in _CASE_FIELDS)]
    if shaped:
        return [f"{len(shaped)} cases lack fields; every case has: {', '.join(_CASE_FIELDS)}"]
    known = {case.id: case for case in catalogue(found["level"])}
    complaints = _digest(found) + _list(found) + _coverage(found, known)
    for case in found["cases"]:
        complaints += [f"{case['id']}: {text}" for text in _case(case, known.get(case["id"]), inputs)]
    if not complaints or all("digest" in c for c in complaints):
        complaints += _totals(found)
    return complaints


def _digest(found: dict[str, Any]) -> list[str]:
    return [] if report.digest(found) == found["digest"] else ["the digest does not match: the report was edited"]


def _list(found: dict[str, Any]) -> list[str]:
    ours = mustpass.sha(found["level"])
    theirs = found["suite"].get("mustpass")
    return [] if ours == theirs else [f"made with the list of required cases {theirs}, this suite has {ours}"]


def _coverage(found: dict[str, Any], known: dict[str, Case]) -> list[str]:
    ids = Counter(case["id"] for case in found["cases"])
    complaints = [f"{name}: {n} times in the report" for name, n in ids.items() if n > 1]
    if found["filter"]:
        return complaints
    missing = [name for name in known if name not in ids]
    if missing:
        complaints.append(f"{len(missing)} cases of level {found['level']} are missing, first {missing[0]}")
    return complaints


def _case(case: dict[str, Any], known: Case | None, inputs: bool) -> list[str]:
    if known is None:
        return ["no such case in this suite"]
    if (case["profile"], case["required"]) != (known.profile, known.required):
        return [f"belongs to profile {known.profile}, required: {known.required}"]
    try:
        status = Status(case["status"])
        kind = None if case["kind"] is None else FailKind(case["kind"])
    except ValueError as error:
        return [str(error)]
    complaints = []
    if (kind is not None) != (status == Status.FAIL):
        complaints.append(f"status {status.value} with kind {case['kind']}")
    if status != Status.PASS and not case["reason"]:
        complaints.append(f"status {status.value} without a reason")
    headroom, worst = case["headroom"], case["worst"]
    if status == Status.PASS:
        if isinstance(headroom, str) or (headroom is not None and headroom > 1.0):
            complaints.append(f"passes with headroom {headroom}, above its bound")
        if not case["n"] and "empty" not in case["notes"]:
            complaints.append("passes without having compared anything")
        if worst is not None and not isinstance(worst["error"], str) and worst["error"] > worst["bound"]:
            complaints.append(f"passes with error {worst['error']:.3g} above its bound {worst['bound']:.3g}")
    if worst is not None and all(isinstance(worst[name], float | int) for name in ("got", "ref", "error")):
        apart = abs(worst["got"] - worst["ref"])
        if abs(apart - worst["error"]) > 1e-9 * max(apart, 1e-300):
            complaints.append(f"error {worst['error']:.6g} is not |got - ref| = {apart:.6g}")
    if inputs and OPERATIONS[known.operation].sha(known) != case["input_sha"]:
        complaints.append("was run on other inputs than this suite makes")
    return complaints


def _totals(found: dict[str, Any]) -> list[str]:
    cases, level = found["cases"], found["level"]
    complaints = []
    if report.counts(cases) != found["counts"]:
        complaints.append(f"counts {found['counts']} do not fit the cases: {report.counts(cases)}")
    if report.profiles(cases, level, found["filter"]) != found["profiles"]:
        complaints.append("profiles do not fit the cases")
    word = report.verdict(cases, level, found["filter"])
    if word != found["verdict"]:
        complaints.append(f"verdict {found['verdict']!r} does not follow from the cases: {word!r}")
    return complaints
