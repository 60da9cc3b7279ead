"""Running cases where no backend can end, hang or dirty the run: one worker process, replaced when it is lost.

    with isolated.Session("mychip", timeout=30) as session:
        record = session.run(case)

A crash or a missing answer ends that case as an error with one line of reason; the next case meets a fresh worker. What
the backend prints becomes notes of its case. `runner.py` runs the same cases in this process, for debuggers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from qhal.errors import BackendError
from qhal_conformance import messages
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS
from qhal_conformance.outcome import Outcome, Status
from qhal_conformance.runner import Record

TIMEOUTS = {0: 60.0, 1: 300.0}
"""Seconds that a case of a level may take, compilation of its kernels included, before its worker is ended."""
LOADING = 120.0
"""Seconds that importing the suite, probing and loading a backend may take, if the case's own limit is not longer."""
_GRACE = 1.0
_LISTENING = "multiprocessing/connection.py"  # where the worker's own thread waits
_NOTED = 5
CLOSED = 93
"""Exit code of a worker that finds its pipe closed."""
_OUTPUT_KEPT = 1 << 24
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from qhal_conformance.worker import main; main({}, {!r})"
)


def run_cases(
    spec: str,
    cases: Iterable[Case],
    *,
    timeout: float | None = None,
    seen: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Run cases in order on the backend that `qhal.select(spec)` finds; `seen` is called after each.

    timeout: seconds per case, None: by its level (`TIMEOUTS`). BackendError if the backend cannot be loaded.
    """
    records = []
    with Session(spec, timeout=timeout) as session:
        for case in cases:
            record = session.run(case)
            records.append(record)
            seen(record)
    return records


class _Lost(Exception):  # noqa: N818 - an event of the protocol
    """The worker is gone, or did not answer; the text is why."""


class Session:
    """A worker with a backend, for as many cases as there are. Close it, or use it in a `with` block.

    about  what the report says of the backend, its device and environment (`report.about`)
    """

    def __init__(self, spec: str, *, timeout: float | None = None) -> None:
        self.spec, self.timeout = spec, timeout
        self._worker: _Worker | None = None
        self._gone = ""
        self.about = self._start()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker and every process that it started."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def run(self, case: Case) -> Record:
        """One case; a lost worker is its outcome and not an exception."""
        start = time.perf_counter()
        limit = TIMEOUTS[case.level] if self.timeout is None else self.timeout
        try:
            if self._worker is None:
                self._again()
            worker = self._worker
            assert worker is not None
            found = worker.ask({"case": messages.case_to(case)}, limit)
            record = messages.record_from(case, found["record"])
        except _Lost as lost:
            outcome = Outcome(Status.ERROR, reason=str(lost))
            seconds = time.perf_counter() - start
            record = Record(case, outcome, seconds, OPERATIONS[case.operation].sha(case), stuck=True)
        printed = () if self._worker is None else self._worker.printed()
        if record.stuck:
            self.close()
        return replace(record, outcome=replace(record.outcome, notes=(*record.outcome.notes, *printed)))

    def claims(self, cases: Iterable[Case]) -> list[dict[str, Any]]:
        """What the backend claims of cases that will be run (`support.rows`). Empty if it did not survive that.

        Nothing is run yet; the ranks of collectives start.
        """
        if self._worker is None:
            return []
        try:
            asked = {"claims": [messages.case_to(case) for case in cases]}
            rows: list[dict[str, Any]] = self._worker.ask(asked, self.timeout or LOADING)["rows"]
        except _Lost:
            self.close()
            return []
        return rows

    def _start(self) -> dict[str, Any]:
        self._worker = worker = _Worker()
        try:
            found = worker.ask({"spec": self.spec}, max(LOADING, self.timeout or 0.0))
        except _Lost as lost:
            said = "".join(f"; {line}" for line in worker.printed()[-1:])
            self.close()
            raise BackendError(f"backend {self.spec!r} cannot be loaded: {lost}{said}") from None
        except BaseException:
            self.close()
            raise
        if "failed" in found:
            self.close()
            raise BackendError(found["failed"])
        worker.printed()  # what is said while loading belongs to no case
        for text in found["warnings"]:
            warnings.warn(text, stacklevel=3)
        about: dict[str, Any] = found["about"]
        return about

    def _again(self) -> None:
        """A fresh worker; a backend that does not load any more is not tried for every case that is left."""
        if not self._gone:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # said once
                    self._start()
                return
            except BackendError as error:
                self._gone = str(error).splitlines()[0]
        raise _Lost(f"not run: after a crash, {self._gone}")


class _Worker:
    """One process, its pipe, and the file that takes its output."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        self._folder = tempfile.TemporaryDirectory(prefix="qhal-worker-", ignore_cleanup_errors=True)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_APPEND)  # cutting it leaves no hole
        descriptor = theirs.fileno()
        command = [sys.executable, "-u", "-c", _START.format(descriptor, self._folder.name), json.dumps(sys.path)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=(descriptor,),
            start_new_session=True,  # Ctrl-C reaches the runner alone; one signal ends what the worker started
        )
        theirs.close()
        self._end = weakref.finalize(self, _kill, self._process)

    def ask(self, message: dict[str, Any], limit: float) -> dict[str, Any]:
        """The answer to a message. _Lost if the process ends or `limit` seconds pass."""
        deadline = time.monotonic() + limit
        try:
            self._pipe.send_bytes(messages.encode(message))
            while True:
                left = deadline - time.monotonic()
                if self._pipe.poll(min(max(left, 0.0), 0.1)):
                    return messages.decode(self._pipe.recv_bytes())
                if self._process.poll() is not None and not self._pipe.poll(0):
                    break
                if left <= 0:
                    raise _Lost(self._timeout(limit))
                if os.fstat(self._output.fileno()).st_size > _OUTPUT_KEPT:
                    os.ftruncate(self._output.fileno(), 0)
        except (EOFError, OSError, ValueError):
            pass  # the process has ended, or closed the pipe
        raise _Lost(self._ending())

    def _timeout(self, limit: float) -> str:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGABRT)  # the worker writes where it stands
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        return f"timeout after {limit:g} s{self._where()}"

    def _ending(self) -> str:
        try:
            code = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            code = CLOSED
        if code == CLOSED:
            return "the backend closed the pipe of the suite"
        if code >= 0:
            return f"the process of the backend ended with exit code {code}{self._where()}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the process of the backend was ended by {name}{hint}{self._where()}"

    def _where(self) -> str:
        """` at file.py:12 in gemm`, from what the interpreter wrote about a crash; "" if it wrote nothing."""
        frames = re.findall(r'^(Current thread|Thread) .*\n  File "(.*)", line (\d+) in (\S+)', self._read(), re.M)
        frames = [frame for frame in frames if not frame[1].endswith(_LISTENING)]
        frames.sort(key=lambda frame: frame[0] != "Current thread")
        return f" at {Path(frames[0][1]).name}:{frames[0][2]} in {frames[0][3]}" if frames else ""

    def _read(self) -> str:
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), 1 << 16, max(size - (1 << 16), 0)).decode("utf-8", "replace")

    def printed(self) -> tuple[str, ...]:
        """The last lines that were printed since the last call, each as a note."""
        lines = [_shown(line) for line in self._read().splitlines() if line.strip()]
        os.ftruncate(self._output.fileno(), 0)
        crash = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error:")), len(lines))
        return tuple(f"printed: {line}" for line in lines[:crash][-_NOTED:])

    def end(self) -> None:
        """Kill the process and everything it started."""
        self._end()
        self._pipe.close()
        self._output.close()
        self._folder.cleanup()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _shown(line: str) -> str:
    """At most 200 characters, none of which moves a terminal's cursor."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line.rstrip())
    return text if len(text) <= 200 else text[:199] + "…"
