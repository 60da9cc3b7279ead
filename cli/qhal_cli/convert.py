"""`qhal convert`: a checkpoint in the files of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qhal_cli.output import Folder, Json, console, emit, print_left, progress, size, table
from qhal_schemes.convert import TARGETS, convert_checkpoint


def convert(
    checkpoint: Folder,
    to: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")],
    out: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    lossy: Annotated[bool, typer.Option("--lossy", help="Write it even if numbers change, and say how far.")] = False,
    json: Json = False,
) -> None:
    """Write a checkpoint in another format: the same numbers, or every loss listed and nothing written.

    Plain float types (bf16, fp16, fp32) hold the effective weight, online rotations multiplied in; its rounding is
    measured. `--lossy` also quantizes again what the target holds in another way, and drops what it cannot say.

    Examples:
      qhal convert awq/ --to compressed-tensors --out ct/
      qhal convert fp8/ --to modelopt --out modelopt/
      qhal convert w8a8/ --to gptq --out w8/ --lossy
      qhal convert int4/ --to bf16 --out bf16/
    """
    if to not in TARGETS:
        raise typer.BadParameter(f"--to {to!r}: choose one of {', '.join(TARGETS)}")
    with progress() as shown:
        task = shown.add_task("converting", total=None)

        def advance(done: int, total: int, name: str) -> None:
            shown.update(task, completed=done, total=total, description=name)

        summary = convert_checkpoint(checkpoint, out, to, lossy=lossy, progress=advance)
    if json:
        emit(summary)
        return
    rows = (
        (c["from"], c["to"], c["modules"], *(("the same", "") if c["exact"] else _error(c))) for c in summary["changes"]
    )
    table("Weights", ("from", "to", "modules", "numbers", "relative rms error"), rows)
    for line in summary["losses"]:
        console.print(f"lost: {line}")
    print_left(summary["left"])
    sizes = f"{size(summary['source_bytes'])} became {size(summary['bytes'])}"
    console.print(f"{out}: {summary['modules']} modules, {'exact' if summary['exact'] else 'with losses'}, {sizes}")


def _error(change: dict[str, float]) -> tuple[str, str]:
    return f"moved by up to {change['max_abs']:.3g}", f"{change['relative_rms']:.2e}"
