"""How commands print: a table for people, the same content as JSON for programs, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from qhal_schemes.writing import size_text as size

__all__ = ["Folder", "Json", "console", "emit", "literal", "print_left", "progress", "size", "stderr", "table"]

Folder = Annotated[Path, typer.Argument(help="A checkpoint folder: config.json and safetensors.")]

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

console = Console(highlight=False, soft_wrap=False)
stderr = Console(stderr=True, highlight=False)


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Sequence[str] = (),
    *,
    markup: bool = False,
) -> None:
    """Print one table; long cells wrap, but in the columns of numbers.

    markup: cells are rich's markup, not text as it is (`vq1x8[e8p12]`)
    """
    shown = Table(title=title, title_justify="left", title_style="bold", show_lines=False, pad_edge=False)
    for name in columns:
        number = name in numbers
        shown.add_column(name, overflow="fold", no_wrap=number, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*(str(cell) if markup else literal(cell) for cell in row))
    console.print(shown)


def literal(text: object) -> str:
    """A text of a file as a cell that shows it as it is: no markup of ours, no control sequence of the terminal."""
    return escape("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text)))


def print_left(names: Sequence[str]) -> None:
    """What of the source is not in the folder that was written."""
    for name in names:
        console.print(f"left behind: {literal(name)}")


def emit(record: Any) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(record, indent=1, default=str))


def progress() -> Progress:
    """A progress display on stderr, so that stdout stays for the result."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=stderr
    )
