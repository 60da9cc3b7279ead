"""`qhal conformance`: run, list, show, repro, support, mutants; `report_commands.py` has the others.

Exit codes: 0 it is so, 1 what was asked failed, 2 wrong use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qhal.errors import QhalError
from qhal.interface import QuantOps
from qhal_conformance import describe, rendering, report, report_commands, table, workers
from qhal_conformance import support as claims
from qhal_conformance.cases import Case
from qhal_conformance.covering import named
from qhal_conformance.operations import catalogue
from qhal_conformance.options import AsJson, Backend, Filter, Level, chosen, dump, progress, selected, usage
from qhal_conformance.proof_commands import add_to
from qhal_conformance.runner import Record, run_case, run_cases

app = typer.Typer(
    name="conformance",
    help="Does a backend compute what a quantized checkpoint means? Cases, computed tolerances, reports.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command()
def run(
    backend: Backend = "cpu_reference",
    level: Level = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for report.json, report.md, report.html and junit.xml")
    ] = None,
    only: Filter = "",
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=0.1, help="seconds that one case may take; 60 at level 0, 300 above by default"),
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="for debuggers: no process of its own, no timeout, output where it is")
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", min=1, max=64, help="processes that share the cases; each loads the backend and compiles"
        ),
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Run the cases of a level and judge the backend, in a process that it may crash, hang or fill.

    Example: `qhal conformance run --backend cpu_reference --level 0 --out results`
    """
    if in_process and jobs > 1:
        raise usage(f"--in-process is one process, --jobs {jobs} asks for more; leave one of them out")
    cases = chosen(level, only)
    console = Console(stderr=as_json)
    start = time.perf_counter()
    with progress(backend, len(cases)) as advance:

        def seen(record: Record) -> None:
            advance(f"{backend} {record.case.operation}")

        about, records = _ran(backend, cases, timeout, jobs, in_process, seen)
    found = report.build(about, backend, records, level, only, time.perf_counter() - start)
    if out is not None:
        try:
            written = rendering.save(found, out)
        except OSError as error:
            raise usage(f"cannot write to {out}: {error}") from None
    if as_json:
        dump(found)
    else:
        table.show(found, console)
        if out is not None:
            console.print(f"written: {' '.join(str(path) for path in written)}", highlight=False, soft_wrap=True)
    bad = found["counts"]["fail"] + found["counts"]["error"]
    raise typer.Exit(1 if found["verdict"] in ("fail", "error") or bad else 0)


def _ran(
    backend: str,
    cases: list[Case],
    timeout: float | None,
    jobs: int,
    in_process: bool,
    seen: Callable[[Record], None],
) -> tuple[QuantOps | dict[str, Any], list[Record]]:
    """What the report says of the backend, and the records of its cases."""
    if in_process:
        ops = selected(backend)
        return ops, run_cases(ops, cases, seen)
    try:
        return workers.run_cases(backend, cases, timeout=timeout, jobs=jobs, seen=seen)
    except QhalError as error:
        raise usage(str(error)) from None


@app.command("list")
def list_cases(level: Level = 0, only: Filter = "", as_json: AsJson = False) -> None:
    """List the cases of a level.

    Example: `qhal conformance list --filter onehot`
    """
    cases = chosen(level, only)
    if as_json:
        dump([{"id": c.id, "profile": c.profile, "required": c.required, "level": c.level} for c in cases])
        return
    for case in cases:
        typer.echo(f"{case.profile:12} {'required' if case.required else 'optional'} {case.id}")
    typer.echo(f"{len(cases)} cases")


@app.command()
def show(case_id: Annotated[str, typer.Argument(metavar="ID")], as_json: AsJson = False) -> None:
    """Describe one case: its request, inputs, data set and how its result is judged.

    Example: `qhal conformance show 'gemm/int4.g32*bf16/m256_n96_k256/bf16/onehot/0'`
    """
    found = describe.describe(_find(case_id))
    if as_json:
        dump(found)
        return
    for key, value in found.items():
        typer.echo(f"{key:10} {value}")


@app.command()
def repro(
    case_id: Annotated[str, typer.Argument(metavar="ID")], backend: Backend = "cpu_reference", as_json: AsJson = False
) -> None:
    """Run one case, also one that `qhal selftest` made, and say everything about it.

    The last number of the id is a seed and may be changed.

    Example: `qhal conformance repro 'gemm/int4.g32*bf16/m256_n96_k256/bf16/onehot/0' --backend cpu_reference`
    """
    case = _find(case_id)
    ops = selected(backend)
    record = run_case(case, ops)
    found = report.case_entry(record, backend)
    if as_json:
        dump(found)
    else:
        for key, value in {**describe.describe(case), **found}.items():
            typer.echo(f"{key:10} {value}")
    raise typer.Exit(1 if found["status"] in ("fail", "error") else 0)


@app.command()
def support(backend: Backend = "cpu_reference", level: Level = 0, as_json: AsJson = False) -> None:
    """What the backend says that it executes: one row per distinct request of the suite. Nothing is run.

    Example: `qhal conformance support --backend cpu_reference --json`
    """
    ops = selected(backend)
    rows = claims.rows(ops, catalogue(level))
    if as_json:
        dump(rows)
        return
    shown = Table(box=box.SIMPLE_HEAD)
    for name in ("operation", "subject", "support", "class", "what runs, or why not"):
        shown.add_column(name, overflow="fold")
    for row in rows:
        shown.add_row(*(escape(str(row[k])) for k in ("operation", "subject", "level", "class", "detail")))
    Console().print(shown)


for _command in (report_commands.verify, report_commands.render, report_commands.diff):
    app.command()(_command)


@app.command()
def mutants(
    backend: Backend = "cpu_reference",
    level: Level = 0,
    only: Annotated[str, typer.Option("--filter", help="only mutants whose name, group or profile contains this")] = "",
    as_json: AsJson = False,
) -> None:
    """Plant faults around a backend and see that the suite notices each; a survivor is a hole in the suite.

    Example: `qhal conformance mutants --filter scale --json`
    """
    from qhal_conformance.mutants import MUTANTS, Fate, hunt

    ops = selected(backend)
    chosen = [m for m in MUTANTS if only in m.name or only in m.group or only in m.profile]
    if not chosen:
        raise usage(f"no mutant's name, group or profile contains {only!r}")
    with progress("mutants", len(chosen)) as advance:

        def seen(fate: Fate) -> None:
            advance(fate.name)

        found = hunt(ops, chosen, level, seen)
    if as_json:
        dump(found)
    else:
        shown = Table(box=box.SIMPLE_HEAD)
        for name in ("mutant", "profile", "fault", "killed by"):
            shown.add_column(name, overflow="fold")
        for fate in found["mutants"]:
            by = f"{fate['how']}: {fate['case']}" if fate["killed"] else f"[red]survived {fate['cases']} cases[/red]"
            shown.add_row(
                fate["name"], fate["profile"], escape(fate["fault"]), by if not fate["killed"] else escape(by)
            )
        Console().print(shown)
        typer.echo(f"killed {found['killed']} of {found['total']}")
    raise typer.Exit(0 if found["killed"] == found["total"] else 1)


add_to(app)


def _find(case_id: str) -> Case:
    try:
        return named(case_id)
    except QhalError as error:
        raise usage(str(error)) from None
