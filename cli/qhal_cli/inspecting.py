"""`qhal inspect`: what a checkpoint is, as tables, as JSON, or as one HTML page with a picture (`picture.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qhal_cli.output import Folder, Json, console, emit, literal, size, table
from qhal_cli.picture import page
from qhal_schemes import open_checkpoint
from qhal_schemes.writing import AtomicFile, apart

Html = Annotated[Path | None, typer.Option(help="Also write one HTML page: layers x modules, coloured by format.")]


def inspect(checkpoint: Folder, html: Html = None, json: Json = False) -> None:
    """What is quantized how, what is excluded by which rule, and where every tensor went. Reads no weights.

    Examples:
      qhal inspect path/to/checkpoint
      qhal inspect path/to/checkpoint --json | jq .totals
      qhal inspect path/to/checkpoint --html picture.html
    """
    ckpt = open_checkpoint(checkpoint)
    record = ckpt.summary()
    if html is not None:
        apart(html, checkpoint)
        text = page(ckpt).encode("utf-8", "backslashreplace")
        with AtomicFile(html, needed=len(text)) as file:
            file.path.write_bytes(text)
    if json:
        emit(record)
        return
    _print(record)
    if html is not None:
        console.print(f"picture: {literal(html)}", soft_wrap=True)


def _print(record: dict[str, Any]) -> None:
    total = record["totals"]
    title = f"[bold]{literal(record['path'])}[/bold]: {literal(record['method'])}, activations {record['dtype']}"
    console.print(title, soft_wrap=True)
    if record["formats"]:
        texts = [key for key in ("weight", "input", "layout", "around") if any(r[key] for r in record["formats"])]
        rows = (
            (
                *(r[key] for key in texts),
                f"{r['bits_per_weight']:.2f}",
                r["modules"],
                size(r["bytes"]),
                r["evidence"],
            )
            for r in record["formats"]
        )
        numbers = ("bits", "modules", "size")
        table("Quantized modules", (*texts, *numbers, "evidence"), rows, numbers)
    if record["excluded"]:
        plain = ((r["rule"], len(r["modules"]), r["modules"][0]) for r in record["excluded"])
        table("Plain modules", ("rule", "modules", "first"), plain, ("modules",))
    for count in sorted({r["experts"] for r in record["experts"]}):
        prefixes = [r["prefix"] for r in record["experts"] if r["experts"] == count]
        many = f" and {len(prefixes) - 1} more up to {literal(prefixes[-1])}" if len(prefixes) > 1 else ""
        console.print(f"experts: {count} in {literal(prefixes[0])}{many}")
    for r in record["kv"]:
        console.print(f"cache: {literal(r['format'])} in {r['layers']} layers, {r['evidence']}")
    if record["extra"]:
        extra = ((r["tensor"], r["why"]) for r in record["extra"])
        table("Tensors that nothing uses", ("tensor", "why"), extra)
    console.print(
        f"{total['tensors']} tensors, {size(total['bytes'])}: {total['consumed']} in quantized modules, "
        f"{total['plain']} plain, {total['extra']} unused"
    )
