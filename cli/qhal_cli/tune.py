"""`qhal tune`: measure the kernels' tiles for the layers of a checkpoint, so that later loads choose the fastest."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

import qhal
from qhal.errors import UnsupportedError
from qhal_cli.output import Folder, Json, console, emit, progress, table
from qhal_schemes import open_checkpoint


def tune(
    checkpoint: Folder,
    backend: Annotated[str, typer.Option("--backend", "-b", help="auto, a backend's name, or name:index.")] = "auto",
    rows: Annotated[int, typer.Option(min=1, help="The largest row count that matters.")] = 128,
    json: Json = False,
) -> None:
    """Measure on this device which tiles are fastest for every product of a checkpoint, and keep that in a table.

    The table belongs to this GPU, driver, these versions and these kernels; operations read it when they are loaded,
    and nothing is measured while they run. Where the table lies: QHAL_TUNED, else the cache folder. Each format, shape
    and bucket of rows takes seconds on a machine of many cores, which compile side by side, and a minute on one. Only
    formats and sizes are read of the checkpoint. Exits with 1 if nothing was measured.

    Examples:
      qhal tune CKPT --backend auto --rows 64
      QHAL_TUNED=/shared/tuned qhal tune CKPT --json
    """
    ops = qhal.select(backend)
    plan = qhal.resolve(open_checkpoint(checkpoint), ops, "report", m=(1, rows))
    requests = list(dict.fromkeys(e.request for e in plan.entries if e.support))
    found: list[qhal.Tuned] = []
    left: list[str] = []
    with progress() as shown:
        task = shown.add_task("tuning", total=len(requests))
        for request in requests:
            try:
                found += ops.tune(request, seen=lambda problem: shown.update(task, description=f"tuning {problem}"))
            except UnsupportedError as refused:
                left.append(f"{request}: {refused.support.reason}")
            shown.advance(task)
    if json:
        emit({"backend": ops.name, "device": str(ops.device), "tuned": [asdict(t) for t in found], "left": left})
    else:
        _print(found, left)
    if not found:
        raise typer.Exit(1)


def _print(found: list[qhal.Tuned], left: list[str]) -> None:
    lines = [
        (one.problem, one.chosen, f"{one.us:.1f}", len(one.rejected), f"{max(_slower(one), default=0):.1f}")
        for one in found
    ]
    columns = ("problem", "tile", "us", "rejected", "slowest us")
    table("Tiles", columns, lines, numbers=("us", "rejected", "slowest us"))
    for line in left:
        console.print(f"not tuned: {line}")


def _slower(one: qhal.Tuned) -> list[float]:
    return [us for _, us in one.rejected if us is not None]
