"""`qhal devices` and `qhal doctor`: what this machine can run, why not, and what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import typer

import qhal
from qhal import selection
from qhal.selection import Available, BackendInfo
from qhal_cli.output import Json, console, emit, size, table
from qhal_schemes import known_methods


def devices(json: Json = False) -> None:
    """Every backend: usable here, or why not and what to do.

    Examples:
      qhal devices
      QHAL_BACKEND=cpu_reference qhal devices --json

    Exits with 1 if QHAL_BACKEND names a backend that is not usable.
    """
    records = [_record(name, info) for name, info in qhal.backends().items()]
    wanted = os.environ.get(selection.ENVIRONMENT)
    name = wanted.partition(":")[0] if wanted else None
    chosen = next((r for r in records if r["name"] == name), None)
    ok = wanted is None or (chosen is not None and chosen["usable"])
    auto = next((r["name"] for r in records if r["usable"] and r["operations"]), None)
    if json:
        emit({"backends": records, "environment": wanted, "auto": auto, "ok": ok})
    else:
        _print(records)
        if wanted is None:
            console.print(f"auto selects: [bold]{auto or 'nothing: no backend is usable'}[/bold]")
        elif chosen is None:
            console.print(f"{selection.ENVIRONMENT}={wanted}: no such backend is installed")
        elif chosen["usable"]:
            console.print(f"{selection.ENVIRONMENT}={wanted}: usable, and selected by auto")
        else:
            console.print(f"{selection.ENVIRONMENT}={wanted}: not usable: {chosen['reason']}\n  do: {chosen['hint']}")
    if not ok:
        raise typer.Exit(1)


def _record(name: str, info: BackendInfo | selection.Broken) -> dict[str, Any]:
    state = selection.probe(info)
    record: dict[str, Any] = {"name": name, "usable": isinstance(state, Available)}
    if isinstance(info, BackendInfo):
        record |= {"order": info.order, "interface": list(info.interface)}
    if isinstance(state, Available) and isinstance(info, BackendInfo):
        record["operations"] = list(selection.operations(info.load(state.devices[0])))
        record["devices"] = [
            {"id": f"{name}:{d.index}", "arch": d.arch, "memory": d.memory, "facts": dict(d.facts)}
            for d in state.devices
        ]
    elif isinstance(state, selection.Unavailable):
        record |= {"operations": [], "devices": [], "reason": state.reason, "hint": state.hint}
    return record


def _print(records: list[dict[str, Any]]) -> None:
    def cells(r: dict[str, Any]) -> tuple[str, str, str]:
        if not r["usable"]:
            return r["name"], "[red]no[/red]", f"{r['reason']}\n[dim]do: {r['hint']}[/dim]"
        lines = []
        for d in r["devices"]:
            memory = f", {size(d['memory'])}" if d["memory"] else ""
            facts = ", ".join(f"{k} {v}" for k, v in d["facts"].items())
            lines.append(f"{d['id']} {d['arch']}{memory}" + (f" [dim]{facts}[/dim]" if facts else ""))
        lines.append(f"[dim]executes: {', '.join(r['operations']) or 'nothing in this version'}[/dim]")
        return r["name"], "[green]yes[/green]" if r["operations"] else "[yellow]found[/yellow]", "\n".join(lines)

    table("Backends, in the order of auto", ("backend", "usable", "devices, or why not"), (cells(r) for r in records))


def doctor(json: Json = False) -> None:
    """Check this installation: versions, packages, backends, schemes, disk, environment. Exits with 1 on a failure.

    Examples:
      qhal doctor
      qhal doctor --json
    """
    checks = list(_checks())
    if json:
        emit([dict(zip(("check", "status", "found", "do"), c, strict=True)) for c in checks])
    else:
        colour = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}
        table("Doctor", ("check", "status", "found", "what to do"), ((c[0], colour[c[1]], c[2], c[3]) for c in checks))
    if any(status == "fail" for _, status, _, _ in checks):
        raise typer.Exit(1)


def _checks() -> Iterator[tuple[str, str, str, str]]:
    yield "python", "ok" if sys.version_info >= (3, 10) else "fail", platform.python_version(), "needs 3.10 or newer"
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    yield "torch", "ok" if release >= (2, 11) else "fail", torch.__version__, "pip install 'torch>=2.11'"
    yield "qhal-core", "ok", f"{version('qhal-core')} at {Path(qhal.__file__).parent}", ""
    yield "interface", "ok", ".".join(map(str, qhal.INTERFACE_VERSION)), ""
    usable = 0
    for name, info in qhal.backends().items():
        state = selection.probe(info)
        if isinstance(state, Available):
            usable += 1
            yield f"backend {name}", "ok", f"{len(state.devices)} device(s)", ""
        else:
            broken = isinstance(info, selection.Broken)
            yield f"backend {name}", "fail" if broken else "warn", state.reason, state.hint
    if not usable:
        yield "backends", "fail", "no backend is usable", "make dev, or pip install qhal-cpu-reference"
    yield "schemes", "ok" if known_methods() else "fail", ", ".join(known_methods()), "reinstall qhal-core"
    for package, need in (("transformers", "qhal generate"), ("compressed-tensors", "the interoperability tests")):
        try:
            yield package, "ok", version(package), ""
        except PackageNotFoundError:
            yield package, "warn", "not installed", f"pip install {package} (for {need})"
    free = shutil.disk_usage(tempfile.gettempdir()).free
    yield "disk", "ok" if free > 1 << 30 else "warn", f"{size(free)} free in {tempfile.gettempdir()}", "free some space"
    for name in sorted(n for n in os.environ if n.startswith("QHAL_")):
        yield name, "ok", os.environ[name], ""
