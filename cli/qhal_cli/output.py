"""How commands print: a table for people, the same content as JSON for programs, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from qhal_schemes.writing import size_text as size

__all__ = ["Json", "console", "emit", "progress", "size", "stderr", "table"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

console = Console(highlight=False, soft_wrap=False)
stderr = Console(stderr=True, highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, markup: bool = False) -> None:
    """Print one table; long cells wrap. markup: cells are rich's markup, not text as it is (`vq1x8[e8p12]`)."""
    shown = Table(title=title, title_justify="left", title_style="bold", show_lines=False, pad_edge=False)
    for name in columns:
        shown.add_column(name, overflow="fold")
    for row in rows:
        shown.add_row(*(str(cell) if markup else escape(str(cell)) for cell in row))
    console.print(shown)


def emit(record: Any) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(record, indent=1, default=str))


def progress() -> Progress:
    """A progress display on stderr, so that stdout stays for the result."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=stderr
    )
