"""Commands that work on reports that exist: verify, render, diff. None needs a device, but for --rerun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qhal_conformance import diff as comparing
from qhal_conformance import rendering, report, rerun
from qhal_conformance import verify as verifying
from qhal_conformance.options import AsJson, dump, selected, usage

_Report = Annotated[Path, typer.Argument(metavar="REPORT", help="a report.json of `qhal conformance run --out`")]


def _read(path: Path) -> object:
    try:
        return verifying.read(path)
    except (OSError, ValueError) as error:
        raise usage(f"cannot read {path}: {error}") from None


def _whole(path: Path) -> dict[str, Any]:
    """A report that can be read and that nobody edited; anything else is wrong use."""
    found = _read(path)
    wrong = verifying.shape(found)
    if not wrong and isinstance(found, dict) and report.digest(found) == found["digest"]:
        return found
    raise usage(f"{path}: {wrong[0] if wrong else 'was edited'}; see `qhal conformance verify {path}`")


def verify(
    path: _Report,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="also generate every input again and compare its hash")
    ] = False,
    again: Annotated[
        int,
        typer.Option("--rerun", min=0, help="also run this many cases again on --backend, chosen by the digest"),
    ] = 0,
    backend: Annotated[str, typer.Option("--backend", "-b", help="where --rerun runs: a name, or name:index")] = "",
    as_json: AsJson = False,
) -> None:
    """Check that a report holds together and was not edited. Needs no device, but for --rerun.

    Example: `qhal conformance verify results/report.json --rerun 20 --backend cpu_reference`
    """
    if bool(again) != bool(backend):
        raise usage("--rerun N and --backend B go together: N cases are run again on B")
    found = _read(path)
    complaints = verifying.verify(found, inputs=inputs)
    ran: list[str] = []
    if again and not complaints:
        assert isinstance(found, dict)
        ran, complaints = rerun.rerun(found, selected(backend), again)
    if as_json:
        dump({"report": str(path), "holds": not complaints, "complaints": complaints, "rerun": ran})
    else:
        for text in complaints[:50]:
            typer.echo(text)
        if len(complaints) > 50:
            typer.echo(f"... and {len(complaints) - 50} more, see --json")
        end = f"{len(complaints)} complaints" if complaints else "holds together"
        typer.echo(f"{path}: {end}" + (f"; {len(ran)} cases ended as reported" if ran and not complaints else ""))
    raise typer.Exit(1 if complaints else 0)


def render(
    path: _Report,
    html: Annotated[Path | None, typer.Option("--html", help="write the page here")] = None,
    md: Annotated[Path | None, typer.Option("--md", help="write the Markdown here")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="write the JUnit XML here")] = None,
) -> None:
    """Draw a report again: the page, Markdown for a pull request, JUnit XML for CI. Needs no device.

    Example: `qhal conformance render results/report.json --html report.html --junit junit.xml`
    """
    wanted = {"report.html": html, "report.md": md, "junit.xml": junit}
    found = _whole(path)
    texts = {target: rendering.FORMATS[name](found) for name, target in wanted.items() if target is not None}
    if not texts:
        raise usage("say what to write: --html FILE, --md FILE, --junit FILE")
    try:
        written = rendering.write(texts)
    except OSError as error:
        raise usage(f"cannot write: {error}") from None
    typer.echo(f"written: {' '.join(str(target) for target in written)}")


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="a report.json")],
    b: Annotated[Path, typer.Argument(metavar="B", help="another of the same suite, level and filter")],
    within: Annotated[
        float, typer.Option("--within", min=0.0, help="changes of headroom, rms and bias up to this do not count")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Compare two reports: verdicts, cases that ended otherwise, headroom and statistics. 0 same, 1 they differ.

    Versions, devices and times that differ are shown and do not count.

    Example: `qhal conformance diff before/report.json after/report.json --within 0.05`
    """
    ours, theirs = _whole(a), _whole(b)
    why = comparing.incomparable(ours, theirs)
    if why:
        raise usage(f"{a} and {b} cannot be compared: {why}")
    found = comparing.compare(ours, theirs, within)
    if as_json:
        dump(found)
    else:
        _show(found)
    raise typer.Exit(0 if found["same"] else 1)


def _show(found: dict[str, Any]) -> None:
    console = Console()
    rows = [(name, *pair) for name, pair in found["facts"].items()]
    _table(console, "Facts that differ (they do not count)", ("fact", "A", "B"), rows)
    rows = [("verdict", *found["verdict"])] if found["verdict"] else []
    rows += [(name, *pair) for name, pair in found["profiles"].items()]
    _table(console, "Verdicts", ("of", "A", "B"), rows)
    rows = [(f"{r['operation']} {r['subject']}", r["a"], r["b"]) for r in found["support"]]
    _table(console, "Claims", ("of", "A", "B"), rows)
    rows = [(case["id"], _end(case["a"]), _end(case["b"])) for case in found["cases"]]
    _table(console, "Cases that ended otherwise", ("case", "A", "B"), rows)
    rows = [(f"{r['number']} of {r['id']}", r["a"], r["b"]) for r in found["numbers"]]
    _table(console, "Numbers, largest change first", ("number", "A", "B"), rows)
    for title, key in (("on other inputs", "inputs"), ("only in A", "only_a"), ("only in B", "only_b")):
        if found[key]:
            typer.echo(f"{len(found[key])} cases {title}, first {found[key][0]}")
    changes = len(found["cases"]) + len(found["only_a"]) + len(found["only_b"])
    typer.echo("same results" if found["same"] else f"{changes} cases and {len(found['numbers'])} numbers differ")


def _end(side: dict[str, Any]) -> str:
    return " ".join(part for part in (side["status"], side["kind"], side["class"] and f"({side['class']})") if part)


def _table(console: Console, title: str, header: tuple[str, ...], rows: list[tuple[Any, ...]], limit: int = 30) -> None:
    if not rows:
        return
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in header:
        shown.add_column(name, overflow="fold")
    for row in rows[:limit]:
        shown.add_row(*(escape(_printable(cell)) for cell in row))
    console.print(shown)
    if len(rows) > limit:
        console.print(f"... and {len(rows) - limit} more, see --json")


def _printable(cell: object) -> str:
    """A cell without control sequences: reports come from anywhere."""
    text = f"{cell:.4g}" if isinstance(cell, float) else "-" if cell is None else str(cell)
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
