"""The process in which a backend is loaded and asked. It talks to `isolated.Session` over a pipe of its own.

Whatever the backend prints, and what the interpreter says when it crashes, goes to file descriptors 1 and 2, which
the session reads. Started by the session: `main(descriptor, folder)`; nothing here is for other callers.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import faulthandler
import os
import pickle
import queue
import resource
import sys
import threading
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import qhal
from qhal.interface import QuantOps
from qhal_conformance import comm_ranks, messages, provenance, report, support
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS
from qhal_conformance.outcome import Outcome, Status
from qhal_conformance.runner import Record, raised, run_case
from qhal_conformance.worker_process import CLOSED


def main(descriptor: int, folder: str) -> None:
    """Load the backend that the first message names, then run one case per message until the pipe closes.

    folder  for files of the suite; the session deletes it, however this process ends
    """
    comm_ranks.FOLDER = folder
    os.set_inheritable(descriptor, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is expected here; its picture is nobody's
    output = _Output()
    pipe = _Pipe(descriptor)
    ops: QuantOps | None = None
    while True:
        asked = pipe.receive()
        if ops is None:
            ops, answer = _load(asked["spec"])
        elif "claims" in asked:
            cases = [messages.case_from(case) for case in asked["claims"]]
            answer = {"rows": support.rows(ops, cases)}
            comm_ranks.expect(cases, ops.device.type)
        elif "requests" in asked:
            requests = pickle.loads(base64.b64decode(asked["requests"]))  # written by our own session
            refusals = [support.refused(ops, request) for request in requests]
            answer = {"refusals": refusals, "fusions": sorted(str(name) for name in ops.fusions)}
        else:
            answer = _answer(messages.case_from(asked["case"]), ops)
        output.settle()
        pipe.reply(answer)


def _load(spec: str) -> tuple[QuantOps | None, dict[str, Any]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            ops = qhal.select(spec)
            about = report.about(ops, spec)
        except qhal.QhalError as error:
            return None, {"failed": str(error)}
        except BaseException as error:  # SystemExit and KeyboardInterrupt of a backend are its own failure
            return None, {"failed": f"backend {spec!r} cannot be loaded: {raised(error)}"}
    texts = dict.fromkeys(str(w.message) for w in said if issubclass(w.category, UserWarning))
    return ops, {"about": about, "warnings": list(texts), "made": provenance.kind(ops)}


def _answer(case: Case, ops: QuantOps) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        record = run_case(case, ops)
    except BaseException as error:  # nobody presses Ctrl-C here: this session of processes has no terminal
        outcome = Outcome(Status.ERROR, reason=raised(error))
        sha = OPERATIONS[case.operation].sha(case)
        record = Record(case, outcome, time.perf_counter() - start, sha, stuck=True)
    return {"record": messages.record_to(record)}


class _Pipe:
    """Messages from and to the session. A thread waits for them, so that this process ends when the session does,
    even in the middle of a call that does not return."""

    def __init__(self, descriptor: int) -> None:
        self._connection, self._process = Connection(descriptor), os.getpid()
        self._socket = os.fstat(descriptor).st_ino
        self._asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                self._asked.put(messages.decode(self._connection.recv_bytes()))
        except (EOFError, OSError, ValueError):
            # the session has gone, and nobody reads this code; or the backend closed the pipe before this thread waited
            os._exit(0 if self._is_open() else CLOSED)

    def _is_open(self) -> bool:
        try:
            return os.fstat(self._connection.fileno()).st_ino == self._socket
        except OSError:
            return False

    def receive(self) -> dict[str, Any]:
        """The next message."""
        return self._asked.get()

    def reply(self, answer: dict[str, Any]) -> None:
        """Answer; a copy of this process that the backend forked and let run on ends here, unheard."""
        if os.getpid() != self._process:
            os._exit(0)
        if not self._is_open():
            os._exit(CLOSED)  # or its number was taken by a file of the backend's
        try:
            self._connection.send_bytes(messages.encode(answer))
        except OSError:
            os._exit(CLOSED)


class _Output:
    """Standard output and error as the session gave them: everything flushed, and put back if a backend closed them."""

    def __init__(self) -> None:
        self._kept, self._streams = os.dup(2), (sys.stdout, sys.stderr)
        faulthandler.enable(file=self._kept, all_threads=True)

    def settle(self) -> None:
        """After each case: what was printed is in the file, and the next case can print."""
        sys.stdout, sys.stderr = self._streams
        for stream, number in zip(self._streams, (1, 2), strict=True):
            with contextlib.suppress(OSError, ValueError):  # closed by the backend, or its descriptor
                stream.flush()
            with contextlib.suppress(OSError):  # every descriptor was closed: the pipe as well, and that is the end
                os.dup2(self._kept, number)
            if stream.closed:
                fresh = open(number, "w", buffering=1, errors="replace", closefd=False)  # noqa: SIM115
                setattr(sys, "stdout" if number == 1 else "stderr", fresh)
        self._streams = (sys.stdout, sys.stderr)
        ctypes.CDLL(None).fflush(None)
