"""`qhal selftest`: may this backend be used here, for this checkpoint? For installers and engines that start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qhal.layer_formats import KVFormat
from qhal_cli.checkpoints import KVFormatOption
from qhal_cli.output import Json, console, emit, literal, progress, table
from qhal_conformance import selftest as suite
from qhal_conformance.runner import Record
from qhal_engines.kv_plan import cache_requests
from qhal_schemes import open_checkpoint

CODES = {"usable": 0, "unusable": 1, "unproven": 3}
"""Exit codes; 2 is wrong use, as everywhere."""


def selftest(
    backend: Annotated[str, typer.Option("--backend", "-b", help="auto, a backend's name, or name:index.")] = "auto",
    checkpoint: Annotated[
        Path | None, typer.Option("--for", help="A checkpoint folder: only what its layers and caches need.")
    ] = None,
    kv_format: KVFormatOption = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds; what is not reached leaves it unproven.")] = 60,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="For debuggers: no process of its own, a crash or hang is this one's.")
    ] = False,
    json: Json = False,
) -> None:
    """Is this backend right for this checkpoint? usable, unusable or unproven, in a minute at most.

    With --for: every request of its layers and caches, by cases made for their formats and sizes and by those of the
    conformance suite. Without: a little of every operation that the backend claims. Exits with 0 usable, 1 unusable,
    3 unproven. It is no conformance result: `qhal conformance run` gives that. A process of its own loads the backend:
    one that crashes or hangs is unusable, with one line of why.

    Examples:
      qhal selftest --backend cpu_reference --for CKPT
      qhal selftest --budget 20 --json
    """
    with progress() as shown:
        task = shown.add_task("selftest", total=None)

        def seen(record: Record, planned: int) -> None:
            shown.update(task, advance=1, total=planned, description=f"selftest {record.case.operation}")

        asked = {} if checkpoint is None else _asked(checkpoint, kv_format)
        found = suite.selftest(backend, budget=budget, in_process=in_process, seen=seen, **asked)
    if json:
        emit({**found.to_json(), "checkpoint": None if checkpoint is None else str(checkpoint)})
    else:
        _print(found)
    raise typer.Exit(CODES[found.verdict])


def _asked(folder: Path, kv_format: str | None) -> dict[str, Any]:
    """What an engine will ask: the layers, and the caches with the attention over them as `qhal plan` has them."""
    ckpt = open_checkpoint(folder)
    layers = [f for f in ckpt.layer_formats() if not isinstance(f, KVFormat)]
    return {"formats": layers, "also": cache_requests(ckpt, kv_format), "dtype": ckpt.dtype}


def _print(found: suite.Selftest) -> None:
    rows = [(form.name, len(form.layers) or "", f"{form.passed} of {len(form.cases)}") for form in found.forms]
    table("What was asked", ("form", "layers", "cases passed"), rows, ("layers", "cases passed"))
    for text in (*found.wrong, *found.uncovered):
        console.print(f"  {literal(text)}", soft_wrap=True)
    colour = {"usable": "green", "unusable": "red", "unproven": "yellow"}[found.verdict]
    count = f"{len(found.records)} cases in {found.seconds:.0f} s"
    console.print(f"{found.backend}: [{colour}]{found.verdict}[/{colour}] ({count})")
