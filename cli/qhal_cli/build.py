"""`qhal build`: a backend's kernels for one checkpoint, compiled before there is a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import qhal
from qhal.errors import NoBackendError
from qhal.requests import Request
from qhal.selection import BackendInfo
from qhal_cli.checkpoints import KVFormatOption
from qhal_cli.output import Folder, Json, console, emit, progress, table
from qhal_engines.kv_plan import plan_with_caches
from qhal_schemes import open_checkpoint


def build(
    checkpoint: Folder,
    backend: Annotated[str, typer.Option("--backend", "-b", help="A backend's name.")],
    arch: Annotated[str, typer.Option(help="The architecture to compile for; no device is needed.")],
    out: Annotated[Path, typer.Option(help="A new folder for the kernels and manifest.json.")],
    world: Annotated[int, typer.Option(min=1, help="Ranks of tensor parallelism.")] = 1,
    kv_format: KVFormatOption = None,
    json: Json = False,
) -> None:
    """Compile what a checkpoint's layers and caches will run, so that a first start need not.

    The backend reads the folder where its variable names it, and checks that it was built for this architecture, this
    compiler and these sources. Sizes that were not foreseen are compiled when they are met.

    Example:
      qhal build CKPT --backend NAME --arch ARCH --out kernels
    """
    ops = qhal.select(backend, arch=arch)
    info = qhal.backends()[backend]
    if not isinstance(info, BackendInfo) or info.build is None:
        raise NoBackendError(f"backend {backend!r} compiles nothing ahead of time; there is nothing to build")
    plan = plan_with_caches(open_checkpoint(checkpoint), ops, "report", kv_format, world=world)
    requests = list(dict.fromkeys(entry.request for entry in plan.entries))
    with progress() as shown:
        task = shown.add_task("build", total=len(requests))

        def seen(request: Request) -> None:
            shown.update(task, advance=1, description=f"build {type(request).__name__}")

        manifest = info.build(arch, requests, out, seen)
    if json:
        emit({"folder": str(out), **manifest})
        return
    entries = manifest.get("requests")
    rows = [
        (str(e["request"]), ", ".join(e["kernels"]) or "-", str(e["note"]))
        for e in (entries if isinstance(entries, list) else [])
    ]
    table(f"Kernels for {arch}", ("request", "kernels", "note"), rows)
    console.print(f"written: {out}", markup=False, soft_wrap=True)
