"""report.html: one page that fetches nothing. Here numbers become widths and paths; `templates/` has words and script.

Reports come from anywhere: the template escapes every text, styles and paths are made of numbers only, and the one
script is named by its hash in the page's own security policy.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from functools import cache
from math import log10
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from qhal_conformance import report as reports
from qhal_conformance.cases import PROFILES
from qhal_conformance.outcome import HISTOGRAM_EDGES

BAD = ("fail", "error")
CLAIMS = {
    "full": "full",
    "conditional": "conditional",
    "not_implemented": "refused",
    "unsupported": "refused",
    "broken": "broken",
}
"""How a claim is shown in the matrix."""
COLUMN, HEIGHT = 10, 40
"""Histogram: width of a bin and height of the tallest, in units of the drawing."""


def html(report: dict[str, Any]) -> str:
    """The whole page. The report must fit the schema (`schema.faults`)."""
    template, script = _parts()
    cases = [_case(case, report) for case in report["cases"]]
    operations, rows = matrix(report)
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(
        report=report,
        cases=cases,
        groups=groups(cases),
        profiles=[name for name in PROFILES if name in report["profiles"]],
        meanings=PROFILES,
        operations=operations,
        matrix=rows,
        bars=bars(report["cases"]),
        script=script,
        policy=f"'sha256-{policy}'",
    )


@cache
def _parts() -> tuple[Template, str]:
    environment = Environment(
        loader=PackageLoader("qhal_conformance"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["percent"] = percent
    script = (Path(__file__).parent / "templates/report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html"), script


def number(value: float | str | None) -> str:
    """Four digits, or the word."""
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def percent(headroom: float | str | None) -> float:
    """Width of a bar: the share of the bound that was used, full where it was exceeded."""
    value = 0.0 if headroom is None else float(headroom)
    return round(100 * min(value, 1.0), 2) if value >= 0 else 100.0  # NaN is no comfort


def histogram(bins: Iterable[int]) -> str:
    """The outline of a histogram as SVG path data: bin i from x = 10 i, height by log10(1 + count)."""
    counts = list(bins)
    top = log10(1 + max([*counts, 1]))
    parts = []
    for i, count in enumerate(counts):
        height = round(HEIGHT * log10(1 + count) / top, 1)
        if height:
            parts.append(f"M{i * COLUMN + 1} {HEIGHT}v-{height}h{COLUMN - 2}v{height}z")
    return "".join(parts)


def matrix(report: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[dict[str, Any] | None]]]]:
    """(operations, rows): a row per subject, a cell per operation: what is claimed, and how its cases ended."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report["support"]:
        claim = _cell(CLAIMS[row["level"]], f"{row['level']}: {row['detail']}")
        cells.setdefault(row["subject"], {})[row["operation"]] = claim
    for case in report["cases"]:
        operation, subject = case["id"].split("/")[:2] if "/" in case["id"] else (case["id"], "")
        cell = cells.get(subject, {}).get(operation)
        if cell is not None:
            cell["total"] += 1
            cell["passed"] += case["status"] == "pass"
            cell["bad"] += case["status"] in BAD
            cell["ran"] += case["status"] in ("pass", *BAD)
    for each in (cell for line in cells.values() for cell in line.values()):
        seen = each["ran"] or each["claim"] == "refused"
        each["shown"] = "fail" if each["bad"] else each["claim"] if seen else "none"
    operations = list(dict.fromkeys(row["operation"] for row in report["support"]))
    return operations, [(subject, [line.get(name) for name in operations]) for subject, line in cells.items()]


def _cell(claim: str, title: str) -> dict[str, Any]:
    return {"claim": claim, "title": title, "total": 0, "passed": 0, "bad": 0, "ran": 0}


def groups(cases: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """What failed, once per operation, subject and kind: the first case, and how many there are."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for case in cases:
        if case["status"] in BAD:
            key = (*case["id"].split("/")[:2], case["status"], case["kind"] or "")
            found.setdefault(key, []).append(case)
    return [(group[0], len(group)) for group in found.values()]


def bars(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest headroom per operation and class, and whose it is; cases that were judged by a bound."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases:
        if case["headroom"] is None:
            continue
        key = (case["id"].partition("/")[0], case["class"])
        if key not in found or percent(case["headroom"]) > percent(found[key]["headroom"]):
            found[key] = {"operation": key[0], "class": key[1], "headroom": case["headroom"], "id": case["id"]}
    return list(found.values())


def _case(case: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """A case as the template shows it; the command is made here, so that a report cannot hand out its own."""
    shown = {**case, "repro": reports.repro(case["id"], report["backend"]["spec"])}
    shown["path"] = None if case["histogram"] is None else histogram(case["histogram"])
    return shown


assert len(HISTOGRAM_EDGES) + 1 == 12  # the template's axis has a tick per bin
