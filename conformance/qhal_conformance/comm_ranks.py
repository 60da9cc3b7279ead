"""The ranks of a collective: processes that stay alive between cases, one group over them, one message per line.

A rank makes the backend again by its name (`qhal.select`), on an accelerator the device of the rank's number, and joins
the group that torch has for that device (gloo on a processor). Planted faults are wrapped around it by the name of
their class. A rank that dies or hangs ends the case, not the run: all ranks are ended and started again.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qhal.interface import QuantOps
from qhal_conformance.cases import Case
from qhal_conformance.outcome import Outcome, Status
from qhal_conformance.wrapping import Wrapped

FOLDER: str | None = None
"""Where ranks keep their files, None: the system's place. A worker, which may be ended before it tidies up, sets it."""
START_S = 120.0
ANSWER_S = 60.0
"""How long ranks may take to start and to answer; the group's own timeout is shorter (`comm_worker.py`)."""

Answer = dict[str, Any]


class Lost(Exception):  # noqa: N818 - a rank is lost
    """A rank died or did not answer."""


class Ranks:
    """`world` processes, which start while the caller goes on; close() ends them."""

    def __init__(self, world: int, device: str) -> None:
        self.world, self.device = world, device
        self._ready = False
        self._folder = tempfile.TemporaryDirectory(prefix="qhal-ranks-", dir=FOLDER)
        command = [sys.executable, "-m", "qhal_conformance.comm_worker"]
        store = Path(self._folder.name) / "store"
        self._errors = [Path(self._folder.name) / f"rank{r}.txt" for r in range(world)]
        self._processes, self._lines = [], []
        for r in range(world):
            with self._errors[r].open("wb") as errors:
                process = subprocess.Popen(
                    [*command, str(r), str(world), str(store), device],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                )  # fmt: skip
            lines: queue.Queue[str] = queue.Queue()
            threading.Thread(target=_pump, args=(process, lines), daemon=True).start()
            self._processes.append(process)
            self._lines.append(lines)

    def ask(self, world: int, message: Answer) -> list[Answer]:
        """The same message to the first `world` ranks, and their answers. Lost if one is missing."""
        if not self._ready:
            self._collect(self.world, START_S)
            self._ready = True
        for process in self._processes[:world]:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()
            except OSError:
                continue  # it died: its answer is missing
        return self._collect(world, ANSWER_S)

    def _collect(self, world: int, seconds: float) -> list[Answer]:
        """A line of each of the first `world` ranks; Lost as soon as one has ended, whoever else is waited for."""
        found: dict[int, Answer] = {}
        deadline = time.monotonic() + seconds
        while len(found) < world:
            for rank in (r for r in range(world) if r not in found):
                try:
                    line = self._lines[rank].get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if not line:
                    code = self._processes[rank].wait()
                    said = self._errors[rank].read_text(errors="replace").strip().splitlines()
                    why = f": {said[-1][:200]}" if said else ""
                    raise Lost(f"rank {rank} of {world} ended with code {code}{why}")
                found[rank] = json.loads(line)
            silent = [rank for rank in range(world) if rank not in found]
            if silent and time.monotonic() > deadline:
                raise Lost(f"rank {silent[0]} of {world} did not answer within {seconds:.0f} s")
        return [found[rank] for rank in range(world)]

    def close(self) -> None:
        """End every rank."""
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # a rank that died leaves an unread line
                        stream.close()
        self._folder.cleanup()


def _pump(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.put(line)
    except ValueError:
        pass  # closed under us: the ranks are being ended
    lines.put("")


_POLL_S = 0.02
_running: list[Ranks] = []


def _ranks(world: int, device: str) -> Ranks:
    """The running ranks, if they are enough; else new ones."""
    if _running and (_running[0].world < world or _running[0].device != device):
        end()
    if not _running:
        _running.append(Ranks(world, device))
    return _running[0]


@atexit.register
def end() -> None:
    """End the ranks, if there are any."""
    while _running:
        _running.pop().close()


def expect(cases: Iterable[Case], device: str) -> None:
    """Start the ranks that these cases will ask: importing takes them seconds, in which other cases run."""
    asked = (case.size("w") for case in cases if case.operation == "comm_quant")
    most = _devices(device)
    world = max((w for w in asked if most is None or w <= most), default=0)
    if world:
        _ranks(world, device)


def _devices(kind: str) -> int | None:
    """How many ranks find a device of that type; None: any number, or torch does not know."""
    found = torch.accelerator.current_accelerator()
    return None if found is None or found.type != kind else torch.accelerator.device_count()


def recipe(ops: QuantOps) -> dict[str, Any]:
    """How a rank makes these operations again. A wrapper that leaves comm_quant alone is left out."""
    wraps = []
    while isinstance(ops, Wrapped):
        kind = type(ops)
        if kind.comm_quant is not Wrapped.comm_quant:
            wraps.append(f"{kind.__module__}:{kind.__qualname__}")
        ops = ops._inner
    return {"backend": ops.name, "wraps": wraps[::-1]}


def ask(ops: QuantOps, case: Case) -> list[Answer] | Outcome:
    """What every rank answers to a case; an outcome where it could not be asked."""
    world, most = case.size("w"), _devices(ops.device.type)
    if most is not None and world > most:
        return Outcome(Status.SKIP, reason=f"{world} ranks need {world} devices; this machine has {most}")
    try:
        ranks = _ranks(max(world, min(most or 2, 2)), ops.device.type)
        made = ranks.ask(world, {"make": recipe(ops)})
        missing = [(r, a["missing"]) for r, a in enumerate(made) if "missing" in a]
        if missing:
            rank, why = missing[0]
            if rank and "missing" not in made[0]:
                return Outcome(Status.SKIP, reason=f"{world} ranks need {world} devices; rank {rank}: {why}")
            return Outcome(Status.ERROR, reason=f"rank {rank} cannot make the backend: {why}")
        answers = ranks.ask(world, {"run": asdict(case)})
    except Lost as lost:
        end()
        return Outcome(Status.ERROR, reason=str(lost))
    if any("error" in a for a in answers):
        end()  # ranks that were left in the middle of a collective are of no more use
    return answers
