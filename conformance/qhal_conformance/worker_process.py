"""The process of `worker.py` as its session sees it: asked over a pipe, overheard, ended with all that it started."""

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
import weakref
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from qhal_conformance import messages

CLOSED = 93
"""Exit code of a worker that finds its pipe closed."""
_GRACE = 1.0
_LISTENING = "multiprocessing/connection.py"  # where the worker's own thread waits
_NOTED = 5
_OUTPUT_KEPT = 1 << 24
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from qhal_conformance.worker import main; main({}, {!r})"
)


class Lost(Exception):  # noqa: N818 - an event of the protocol
    """The worker is gone, or did not answer; the text is why."""


class Silent(Lost):
    """It did not answer in time."""


class WorkerProcess:
    """One process, its pipe, and the file that takes its output. A fresh one loads no backend yet."""

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
        """The answer to a message. Lost if the process ends or `limit` seconds pass."""
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
                    raise Silent(self._timeout(limit))
                if os.fstat(self._output.fileno()).st_size > _OUTPUT_KEPT:
                    os.ftruncate(self._output.fileno(), 0)
        except (EOFError, OSError, ValueError):
            pass  # the process has ended, or closed the pipe
        raise Lost(self._ending())

    def _timeout(self, limit: float) -> str:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGABRT)  # the worker writes where it stands
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        return f"timeout after {limit:.3g} s{self._where()}"

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
