"""`qhal conformance honest`, `peers`, `by-data`: how we know that the suite's own rules are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
import typer

from qhal_conformance.options import AsJson, Backend, dump, progress, selected

Every = Annotated[int, typer.Option("--every", min=1, help="take one case in this many: a smaller part")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("honest")(honest)
    app.command("peers")(peers)
    app.command("by-data")(by_data)


def honest(
    backend: Backend = "cpu_reference",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="how many sets of numbers per case")] = 2,
    every: Every = 1,
    as_json: AsJson = False,
) -> None:
    """Run honest variants of every operation: sums in many orders, aligned products, 16-bit weights, tiled softmax.

    None may be rejected in its own class. Example: `qhal conformance honest --seeds 1 --every 20 --json`
    """
    from qhal_conformance.honest import chosen, sweep
    from qhal_conformance.operations import catalogue

    ops, cases = selected(backend), chosen(catalogue(0))[::every]
    with _bar("honest", len(cases)) as advance:
        total = sweep(ops, cases, range(seeds), done=advance)
    if as_json:
        dump(total)
    else:
        typer.echo("| variant | class | checks | largest error / bound |\n| --- | --- | --- | --- |")
        for name, v in total["variants"].items():
            typer.echo(f"| {name} | {v['class']} | {v['checks']} | {v['headroom']:.3f} |")
        for alarm in total["alarms"]:
            typer.echo(f"false alarm: {alarm['variant']} on {alarm['case']}: {alarm['reason']}")
        typer.echo(f"{len(total['alarms'])} false alarms in {total['checks']} checks")
    raise typer.Exit(1 if total["alarms"] or not total["checks"] else 0)


def peers(backend: Backend = "cpu_reference", every: Every = 1, as_json: AsJson = False) -> None:
    """Other suites' rules beside this one's, on the same faults and the same honest products; a Markdown table.

    Example: `qhal conformance peers --every 20 --json`
    """
    from qhal_conformance.honest import chosen
    from qhal_conformance.operations import catalogue
    from qhal_conformance.peers import compare_rules, numeric, table

    ops, mutants = selected(backend), numeric()[::every]
    cases = [c for c in chosen(catalogue(0)) if c.operation == "gemm" and c.size("m")][::every]
    with _bar("peers", len(mutants) + len(cases)) as advance:
        found = compare_rules(ops, mutants, cases, lambda name: advance())
    if as_json:
        dump(found)
    else:
        typer.echo(table(found))
    ours = found["rules"]["qhal"]
    raise typer.Exit(1 if ours["alarms"] or ours["survivors"] else 0)


def by_data(backend: Backend = "cpu_reference", every: Every = 1, as_json: AsJson = False) -> None:
    """Which data set kills which planted fault, and which faults it alone kills; a Markdown table.

    Fails if a set kills no fault alone, unless a part is taken. Example: `qhal conformance by-data --every 20 --json`
    """
    from qhal_conformance.by_data import matrix, table
    from qhal_conformance.mutants import MUTANTS

    mutants = MUTANTS[::every]
    with _bar("by data", len(mutants)) as advance:
        found = matrix(selected(backend), mutants, 0, lambda name: advance())
    if as_json:
        dump(found)
    else:
        typer.echo(table(found))
    raise typer.Exit(1 if found["needless"] and every == 1 else 0)


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; what it gives advances it. One thread: the products are small, threads only wait."""
    torch.set_num_threads(1)
    with progress(what, total) as advance:
        yield lambda: advance(what)
