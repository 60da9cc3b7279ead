"""Does a report hold together? Needs no device: everything that follows from something else is computed again."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from math import isfinite
from pathlib import Path
from sys import float_info
from typing import Any

from qhal.interface import INTERFACE_VERSION
from qhal.requests import NumericsClass, minimum_class
from qhal_conformance import SUITE_VERSION, mustpass, report, schema, support
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import HISTOGRAM_EDGES, Status

_LABELS = {numerics.label: numerics for numerics in NumericsClass}
_SLACK = 1e-9
"""Relative; for sums and quotients of numbers that were written in full."""


def read(path: Path) -> object:
    """The JSON of a file. ValueError for anything that two readers could read differently; OSError as it comes."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"the key {twice[0]!r} stands twice in one object")
        return dict(pairs)

    def refuse(token: str) -> Any:
        raise ValueError(f"{token} is no JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deep for a report") from None


def shape(found: object) -> list[str]:
    """What keeps this suite from reading a report at all: no object, another schema, another suite, missing fields."""
    if not isinstance(found, dict):
        return ["a report is a JSON object"]
    if found.get("schema") != report.SCHEMA:
        return [f"report schema {found.get('schema')!r}; this suite reads schema {report.SCHEMA}"]
    suite = found.get("suite")
    version = suite.get("version") if isinstance(suite, dict) else None
    if version != SUITE_VERSION:
        return [f"made by suite {version}, this is suite {SUITE_VERSION}: verify it with the suite that made it"]
    return schema.faults(found)


def verify(found: object, *, inputs: bool = False) -> list[str]:
    """Everything that does not fit, one line each; an empty list is a report that holds together.

    inputs: also generate every case's inputs again and compare their hashes (slower).
    """
    wrong = shape(found)
    if wrong:
        return wrong
    assert isinstance(found, dict)
    known = {case.id: case for case in catalogue(found["level"])}
    complaints = _digest(found) + _list(found) + _coverage(found, known)
    for case in found["cases"]:
        expected = known.get(case["id"])
        texts = ["no such case in this suite"] if expected is None else _case(case, expected, inputs)
        if case["repro"] != report.repro(case["id"], found["backend"]["spec"]):
            texts.append("repro is not the command that runs this case again")
        complaints += [f"{case['id']}: {text}" for text in texts]
    if not complaints or all("digest" in c for c in complaints):
        complaints += _totals(found) + _support(found, known)
    return complaints


def _digest(found: dict[str, Any]) -> list[str]:
    return [] if report.digest(found) == found["digest"] else ["the digest does not match: the report was edited"]


def _list(found: dict[str, Any]) -> list[str]:
    complaints = []
    ours, theirs = mustpass.sha(found["level"]), found["suite"]["mustpass"]
    if ours != theirs:
        complaints.append(f"made with the list of required cases {theirs}, this suite has {ours}")
    if found["interface"] != list(INTERFACE_VERSION):
        complaints.append(f"made through interface {found['interface']}, this suite asks through {INTERFACE_VERSION}")
    if (found["suite"]["commit"] is None) != (found["suite"]["dirty"] is None):
        complaints.append("suite.commit and suite.dirty are known together or not at all")
    return complaints


def _coverage(found: dict[str, Any], known: dict[str, Case]) -> list[str]:
    ids = Counter(case["id"] for case in found["cases"])
    complaints = [f"{name}: {n} times in the report" for name, n in ids.items() if n > 1]
    wanted = [name for name in known if found["filter"] in name]
    missing = [name for name in wanted if name not in ids]
    if missing:
        complaints.append(f"{len(missing)} cases of level {found['level']} are missing, first {missing[0]}")
    strange = [name for name in ids if found["filter"] not in name]
    if strange:
        complaints.append(f"{len(strange)} cases do not match the filter {found['filter']!r}, first {strange[0]}")
    return complaints


def _case(case: dict[str, Any], known: Case, inputs: bool) -> list[str]:
    if (case["profile"], case["required"]) != (known.profile, known.required):
        return [f"belongs to profile {known.profile}, required: {known.required}"]
    status = Status(case["status"])
    complaints = []
    if (case["kind"] is not None) != (status == Status.FAIL):
        complaints.append(f"status {status.value} with kind {case['kind']}")
    if status != Status.PASS and not case["reason"]:
        complaints.append(f"status {status.value} without a reason")
    if status == Status.PASS:
        complaints += _passes(case, known)
    elif status in (Status.UNSUPPORTED, Status.SKIP) and (case["n"] or case["worst"] or case["headroom"] is not None):
        complaints.append(f"status {status.value} with compared elements: nothing was run")
    complaints += _numbers(case)
    if inputs and OPERATIONS[known.operation].sha(known) != case["input_sha"]:
        complaints.append("was run on other inputs than this suite makes")
    return complaints


def _passes(case: dict[str, Any], known: Case) -> list[str]:
    complaints = []
    headroom, worst = case["headroom"], case["worst"]
    if isinstance(headroom, str) or (headroom is not None and headroom > 1.0):
        complaints.append(f"passes with headroom {headroom}, above its bound")
    if not case["n"] and "empty" not in case["notes"]:
        complaints.append("passes without having compared anything")
    if worst is not None and _above(worst["error"], worst["bound"]):
        complaints.append(f"passes with error {worst['error']:.3g} above its bound {worst['bound']:.3g}")
    request = OPERATIONS[known.operation].request(known)
    if case["class"] not in _LABELS:
        complaints.append(f"passes in the unknown numerics class {case['class']!r}")
    elif request is not None and _LABELS[case["class"]] > minimum_class(request):
        complaints.append(f"passes in class {case['class']}, looser than {minimum_class(request).label}")
    return complaints


def _numbers(case: dict[str, Any]) -> list[str]:
    """Worst element, headroom and histogram tell one story."""
    complaints = []
    worst, headroom, bins = case["worst"], case["headroom"], case["histogram"]
    if worst is not None and not any(isinstance(worst[name], str) for name in ("got", "ref", "error")):
        apart = abs(worst["got"] - worst["ref"])
        if abs(apart - worst["error"]) > _SLACK * max(apart, 1e-300):
            complaints.append(f"error {worst['error']:.6g} is not |got - ref| = {apart:.6g}")
    share = _share(worst)
    if headroom is not None and share is not None:
        close = (
            headroom == share
            if isinstance(headroom, str) or isinstance(share, str)
            else (abs(headroom - share) <= _SLACK * share)
        )
        if not close:
            complaints.append(f"headroom {headroom} is not error / bound = {share}")
    if bins is not None:
        if sum(bins) > case["n"]:
            complaints.append(f"a histogram of {sum(bins)} elements where {case['n']} were compared")
        if headroom is not None and sum(bins):
            place = len(HISTOGRAM_EDGES) if isinstance(headroom, str) else bisect_left(HISTOGRAM_EDGES, headroom)
            last = max(i for i, count in enumerate(bins) if count)
            if place != last:
                complaints.append(f"headroom {headroom} is not in the histogram's last filled bin")
    return complaints


def _share(worst: dict[str, Any] | None) -> float | str | None:
    """What the headroom must be: error / bound of the worst element, 0 where bits were compared; None if open."""
    if worst is None:
        return 0.0
    if isinstance(worst["error"], str):  # NaN and Inf: right where the reference is too, else outside every bound
        same = worst["got"] == worst["ref"] or worst["ref"] == "nan" == worst["got"]
        return None if same else "inf"
    if isinstance(worst["bound"], str):
        return None
    share = worst["error"] / max(worst["bound"], float_info.min)
    return share if isfinite(share) else "inf"


def _above(error: float | str, bound: float | str) -> bool:
    return not isinstance(error, str) and not isinstance(bound, str) and error > bound


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
    if report.evidence(cases, found["device"]) != found["evidence"]:
        complaints.append(f"evidence does not fit the cases and the device ({found['device']['evidence']})")
    return complaints


def _support(found: dict[str, Any], known: dict[str, Case]) -> list[str]:
    """One row per operation and subject of the cases; where everything is claimed, no case was refused."""
    rows = {(row["operation"], row["subject"]): row for row in found["support"]}
    cases = [(known[case["id"]], case) for case in found["cases"]]
    wanted = {(k.operation, k.subject) for k, _ in cases if support.asked(k)}
    if set(rows) != wanted or len(rows) != len(found["support"]):
        return ["support does not have one row per operation and subject of the cases"]
    refused = {(k.operation, k.subject) for k, c in cases if support.asked(k) and c["status"] == "unsupported"}
    return [
        f"support claims {operation} {subject}, but a case of it was refused"
        for operation, subject in sorted(refused)
        if rows[operation, subject]["level"] in support.LEVELS[:2]
    ]
