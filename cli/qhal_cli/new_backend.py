"""`qhal new-backend`: a complete backend in a distribution of its own, for a device that nobody has served yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qhal.errors import BackendError, CheckpointError
from qhal_cli.output import Json, console, emit
from qhal_conformance import kit
from qhal_schemes.writing import AtomicDirectory


def new_backend(
    name: Annotated[str, typer.Argument(help="The backend's name: acme, or my-chip (my_chip in code).")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; new or empty. Default: qhal-NAME.")] = None,
    json: Json = False,
) -> None:
    """Write a backend that works: probe, claims, quantize, gemm, tests, CI. The folder appears complete or not at all.

    It runs on whatever device torch has, or on the processor with NAME_DEVICE=cpu: docs/adding_a_backend.md.

    Examples:
      qhal new-backend acme
      qhal new-backend my-chip --out ~/src/qhal-my-chip
    """
    files = kit.render(name)
    target = Path(kit.distribution(name)) if out is None else out
    try:
        with AtomicDirectory(target) as folder:
            for path, text in files.items():
                file = folder.path / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
    except CheckpointError as error:  # the writer's own words, without the name of what else it writes
        raise BackendError(str(error)) from None
    word = name.replace("-", "_")
    if json:
        emit({"name": word, "distribution": kit.distribution(name), "out": str(target), "files": sorted(files)})
        return
    console.print(
        f"{target}: {len(files)} files, backend {word!r}, package 'qhal_{word}'", markup=False, soft_wrap=True
    )
    for line in (
        f"python -m pip install -e {target}",
        f"{word.upper()}_DEVICE=cpu qhal conformance run --backend {word} --level 0",
    ):
        console.print(f"  next: {line}", markup=False, soft_wrap=True)
