"""What the commands of `qhal conformance` share: options, a progress bar, refusing wrong use, printing JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import qhal
from qhal.errors import QhalError
from qhal.interface import QuantOps
from qhal_conformance.cases import Case
from qhal_conformance.operations import catalogue

Backend = Annotated[str, typer.Option("--backend", "-b", help="a backend's name, or name:index")]
Level = Annotated[int, typer.Option("--level", min=0, max=1, help="0: under a minute on two cores; 1: larger and more")]
Filter = Annotated[
    str, typer.Option("--filter", help="only cases whose id contains this text; such a run has no verdict")
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else")]


def usage(message: str) -> typer.Exit:
    """Wrong use: the message on stderr, and the exit code 2 to raise."""
    Console(stderr=True).print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


def selected(spec: str) -> QuantOps:
    """The backend that was asked for; one that is not usable here is wrong use."""
    try:
        return qhal.select(spec)
    except QhalError as error:
        raise usage(str(error)) from None


def chosen(level: int, only: str) -> list[Case]:
    """The cases whose id contains the filter; none is wrong use."""
    found = [case for case in catalogue(level) if only in case.id]
    if not found:
        raise usage(f"no case of level {level} contains {only!r}; `qhal conformance list` shows all")
    return found


def dump(value: object) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=1))


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr. What it gives advances it by one and says what was done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, advance=1, description=done)
