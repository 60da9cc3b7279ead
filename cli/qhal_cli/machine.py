"""`qhal devices` and `qhal doctor`: what this machine can run, why not, and what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import typer
from rich.markup import escape

import qhal
from qhal import selection
from qhal.errors import QhalError
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
    variable = os.environ.get(selection.ENVIRONMENT, "").strip()
    answer, ok = judge_environment()
    auto = next((r["name"] for r in records if r["usable"] and r["operations"] and _real(r)), None)
    if json:
        emit({"backends": records, "environment": variable or None, "auto": auto, "ok": ok, "answer": answer})
    else:
        _print(records)
        shown = f"{selection.ENVIRONMENT}={variable}: " if variable else "auto selects: "
        console.print(f"{shown}{answer}", markup=False, soft_wrap=True)
    if not ok:
        raise typer.Exit(1)


def judge_environment() -> tuple[str, bool]:
    """What `qhal.select()` does here, environment included, and whether it succeeds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says why each accelerator is not used
        try:
            ops = qhal.select()
        except QhalError as error:
            return str(error).splitlines()[0] + _what_to_do(error), False
    return f"{ops.name} on {ops.device}", True


def _real(record: dict[str, Any]) -> bool:
    """Whether the first device is one, and no emulator: "auto" takes no other."""
    return bool(record["devices"][0]["evidence"] == "L3")


def _what_to_do(error: QhalError) -> str:
    hints = [line.strip() for line in str(error).splitlines() if line.strip().startswith("do: ")]
    return f"\n  {hints[0]}" if len(hints) == 1 else ""


def _record(name: str, info: BackendInfo | selection.Broken) -> dict[str, Any]:
    state = selection.probe(info)
    record: dict[str, Any] = {"name": name, "usable": isinstance(state, Available)}
    if isinstance(info, BackendInfo):
        record |= {"order": info.order, "interface": list(info.interface)}
    if isinstance(state, Available) and isinstance(info, BackendInfo):
        try:
            record["operations"] = list(selection.operations(selection.load(info, state.devices[0])))
        except QhalError as error:
            return record | {
                "usable": False,
                "operations": [],
                "devices": [],
                "reason": str(error),
                "hint": selection.REPORT,
            }
        record["devices"] = [
            {
                "id": f"{name}:{d.index}",
                "arch": d.arch,
                "memory": d.memory,
                "evidence": d.evidence,
                "facts": dict(d.facts),
            }
            for d in state.devices
        ]
    elif isinstance(state, selection.Unavailable):
        record |= {"operations": [], "devices": [], "reason": state.reason, "hint": state.hint}
    return record


def _print(records: list[dict[str, Any]]) -> None:
    def cells(r: dict[str, Any]) -> tuple[str, str, str]:
        if not r["usable"]:
            return r["name"], "[red]no[/red]", f"{escape(r['reason'])}\n[dim]do: {escape(r['hint'])}[/dim]"
        lines = []
        for d in r["devices"]:
            memory = f", {size(d['memory'])}" if d["memory"] else ""
            facts = ", ".join(f"{k} {v}" for k, v in d["facts"].items())
            lines.append(f"{d['id']} {d['arch']}{memory}" + (f" [dim]{facts}[/dim]" if facts else ""))
        lines.append(f"[dim]executes: {', '.join(r['operations']) or 'nothing in this version'}[/dim]")
        return r["name"], "[green]yes[/green]" if r["operations"] else "[yellow]found[/yellow]", "\n".join(lines)

    columns = ("backend", "usable", "devices, or why not")
    table("Backends, in the order of auto", columns, (cells(r) for r in records), markup=True)


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
        rows = ((c[0], colour[c[1]], escape(c[2]), escape(c[3])) for c in checks)
        table("Doctor", ("check", "status", "found", "what to do"), rows, markup=True)
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
        found = _record(name, info)
        if found["usable"]:
            usable += 1
            executes = ", ".join(found["operations"]) or "nothing in this version"
            yield f"backend {name}", "ok", f"{len(found['devices'])} device(s), executes {executes}", ""
        else:
            broken = isinstance(info, selection.Broken) or found["hint"] == selection.REPORT
            yield f"backend {name}", "fail" if broken else "warn", found["reason"], found["hint"]
    if not usable:
        yield "backends", "fail", "no backend is usable", "make dev, or pip install qhal-cpu-reference"
    yield "schemes", "ok" if known_methods() else "fail", ", ".join(known_methods()), "reinstall qhal-core"
    for package, need in (("transformers", "qhal generate"), ("compressed-tensors", "the interoperability tests")):
        try:
            yield package, "ok", version(package), ""
        except PackageNotFoundError:
            yield package, "warn", "not installed", f"pip install {package} (for {need})"
    free = shutil.disk_usage(tempfile.gettempdir()).free
    status, advice = ("ok", "") if free > 1 << 30 else ("warn", "free some space")
    yield "disk", status, f"{size(free)} free in {tempfile.gettempdir()}", advice
    for name in sorted(n for n in os.environ if n.startswith("QHAL_")):
        answer, ok = judge_environment() if name == selection.ENVIRONMENT else ("", True)
        yield name, "ok" if ok else "fail", os.environ[name], "" if ok else answer
