"""The report for people: tables on a terminal, and the same as Markdown for a pull request."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qhal_conformance.cases import PROFILES

_COLOURS = {"pass": "green", "fail": "red", "error": "red", "incomplete": "yellow", "none": "yellow"}
_BAD = ("fail", "error")
_ENDS = ("pass", "fail", "error", "unsupported")


def show(report: dict[str, Any], console: Console) -> None:
    """Profiles, operations, what failed, and the verdict."""
    console.print(_rich("Profiles", *_profiles(report)))
    console.print(_rich("Operations", *_operations(report)))
    bad = [case for case in report["cases"] if case["status"] in _BAD]
    for case in bad[:20]:
        title = f"[red]{escape(case['kind'] or case['status'])}[/red] {escape(case['id'])}"
        console.print(title, highlight=False, soft_wrap=True)
        console.print(f"    {case['reason']}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"    {case['repro']}", highlight=False, markup=False, soft_wrap=True)
    if len(bad) > 20:
        console.print(f"... and {len(bad) - 20} more, see report.json")
    word = report["verdict"]
    console.print(_last_line(report, f"[{_COLOURS[word]}]{word}[/]", escape), highlight=False, soft_wrap=True)


def markdown(report: dict[str, Any]) -> str:
    """The same tables as GitHub-flavoured Markdown."""
    device = report["device"].get("arch") or report["device"]["type"]
    verdict = _last_line(report, f"**{report['verdict']}**", _cell)
    lines = [f"### {_cell(report['backend']['name'])} on {_cell(device)}", "", verdict, ""]
    for header, rows in (_profiles(report), _operations(report)):
        lines += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
        lines.append("")
    bad = [case for case in report["cases"] if case["status"] in _BAD]
    if bad:
        lines += ["| case | ended as | why |", "| --- | --- | --- |"]
        lines += [
            f"| <code>{_cell(c['id'])}</code> | {_cell(c['kind'] or c['status'])} | {_cell(c['reason'])} |"
            for c in bad[:100]
        ]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text of the backend as one cell: one line that starts no markup."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_\[\]|<>&#@])", lambda m: f"&#{ord(m[1])};", line)


def _profiles(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["profile", "verdict", "required", "passed", "fail", "error", "unsup.", "skip"]
    rows = []
    for name in PROFILES:
        p = report["profiles"].get(name)
        if p is not None:
            rows.append([name, p["verdict"], *(str(p[key]) for key in ("required", "passed", *_ENDS[1:], "skip"))])
    return header, rows


def _operations(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["operation", "class", "pass", "fail", "error", "unsup.", "headroom", "rms", "bias", "time"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in report["cases"]:
        groups.setdefault((case["id"].split("/")[0], case["class"]), []).append(case)
    rows = []
    for (operation, label), cases in groups.items():
        count = {s: sum(case["status"] == s for case in cases) for s in _ENDS}
        rows.append(
            [
                operation,
                label or "-",
                *(str(count[s]) for s in _ENDS),
                _largest(case["headroom"] for case in cases),
                _largest(case["rms"] for case in cases),
                _largest(abs(b) if isinstance(b := case["bias"], float) else b for case in cases),
                f"{sum(case['seconds'] for case in cases):.1f} s",
            ]
        )
    return header, rows


def _largest(values: Iterable[float | str | None]) -> str:
    known = [float(v) for v in values if v is not None]
    return f"{max(known):.3f}" if known else "-"


def _last_line(report: dict[str, Any], shown: str, safe: Callable[[str], str]) -> str:
    """The verdict as `shown` and all that it rests on; `safe` keeps a text of the report from being markup."""
    c = report["counts"]
    if report["verdict"] == "none":
        shown = f"no verdict (filtered by {safe(repr(report['filter']))})"
    suite, evidence = safe(report["suite"]["version"]), safe(report["device"]["evidence"])
    return (
        f"qhal-conformance {suite}, level {report['level']}, {evidence}: {shown} "
        f"({c['pass']} pass, {c['fail']} fail, {c['error']} error, {c['unsupported']} unsupported, {c['skip']} skip "
        f"in {report['seconds']:.1f} s)"
    )


def _rich(title: str, header: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for name in header:
        words = name in ("profile", "operation", "class", "verdict")
        table.add_column(name, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"[{_COLOURS[cell]}]{cell}[/]" if cell in _COLOURS else escape(cell) for cell in row))
    return table
