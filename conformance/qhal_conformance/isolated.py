"""Running cases where no backend can end, hang or dirty the run: one worker process, replaced when it is lost.

    with isolated.Session("mychip", timeout=30) as session:
        record = session.run(case)

A crash or a missing answer ends that case as an error with one line of reason; the next case meets a fresh worker. What
the backend prints becomes notes of its case. `runner.py` runs the same cases in this process, for debuggers.
"""

from __future__ import annotations

import base64
import pickle
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from qhal.errors import BackendError
from qhal.requests import Request
from qhal_conformance import messages
from qhal_conformance.cases import Case
from qhal_conformance.comm_ranks import START_S
from qhal_conformance.operations import OPERATIONS
from qhal_conformance.outcome import Outcome, Status
from qhal_conformance.runner import Record
from qhal_conformance.worker_process import Lost, Silent, WorkerProcess

TIMEOUTS = {0: 60.0, 1: 300.0}
"""Seconds that a case of a level may take, compilation of its kernels included, before its worker is ended."""
LOADING = 120.0
"""Seconds that importing the suite, probing and loading a backend may take, if the case's own limit is not longer."""
HANGS, CRASHES = 3, 30
"""So many in a row, and nothing more is run. A crash costs a start, some seconds, where a hang costs its whole timeout,
and its line tells more: thirty take about as long as three hangs, and pass over the kernels of one operation."""
CUT = "the time is over"
"""The reason of a case that `until` kept from its timeout: it was skipped."""


class NotLoadedError(BackendError):
    """The process in which a backend was to be loaded ended, or said nothing in time."""


class Session:
    """A worker with a backend, for as many cases as there are. Close it, or use it in a `with` block.

    until  the moment of `time.monotonic` at which everything ends; a case that it cuts is skipped, not wrong
    about  what the report says of the backend, its device and environment (`report.about`)
    made   module and name of the class that `qhal.select` gave
    gone   why no case is run any more, "" as long as they are
    """

    def __init__(self, spec: str, *, timeout: float | None = None, until: float = inf) -> None:
        self.spec, self.timeout, self.until = spec, timeout, until
        self.gone = self.made = ""
        self._cut = self._joined = False
        self._worker: WorkerProcess | None = None
        self._unanswered: dict[str, list[str]] = {"hung": [], "ended its process": []}
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
        self._joined = False

    def run(self, case: Case) -> Record:
        """One case; a lost worker is its outcome and not an exception."""
        start = time.perf_counter()
        try:
            if self._worker is None:
                self._again()
            together = case.operation == "comm_quant"
            joining = START_S if together and not self._joined else 0.0  # the ranks' start is not the case's time
            found = self._ask({"case": messages.case_to(case)}, TIMEOUTS[case.level] + joining)
            self._joined |= together
            record = messages.record_from(case, found["record"])
        except Lost as lost:
            cut = isinstance(lost, Silent) and self._cut
            outcome = Outcome(Status.SKIP, reason=CUT) if cut else Outcome(Status.ERROR, reason=str(lost))
            seconds = time.perf_counter() - start
            record = Record(case, outcome, seconds, OPERATIONS[case.operation].sha(case), stuck=True)
            if not cut and not self.gone:
                self._count(case, "hung" if isinstance(lost, Silent) else "ended its process")
        else:
            if record.outcome.executed:  # an answer that asked the device for nothing says nothing about it
                self._unanswered = {how: [] for how in self._unanswered}
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
            rows: list[dict[str, Any]] = self._ask(asked, LOADING)["rows"]
        except Lost:
            self.close()
            return []
        return rows

    def refusals(self, requests: Sequence[Request]) -> tuple[list[str | None], list[str]]:
        """(why each request will not be executed as it is asked, or None; the names of fused composites).

        BackendError if the worker was lost over that.
        """
        asked = {"requests": base64.b64encode(pickle.dumps(list(requests))).decode()}  # read by our own worker
        try:
            if self._worker is None:
                self._again()
            found = self._ask(asked, TIMEOUTS[0])
        except Lost as lost:
            self.close()
            raise BackendError(f"asked what it supports: {lost}") from None
        return found["refusals"], found["fusions"]

    def _ask(self, message: dict[str, Any], usual: float) -> dict[str, Any]:
        assert self._worker is not None
        return self._worker.ask(message, self._limit(usual if self.timeout is None else self.timeout))

    def _limit(self, seconds: float) -> float:
        left = max(self.until - time.monotonic(), 0.0)
        self._cut = left < seconds
        return min(seconds, left)

    def _count(self, case: Case, how: str) -> None:
        """Give up on a backend that has not answered for a while."""
        ids = self._unanswered[how]
        ids.append(case.id)
        if len(ids) == (HANGS if how == "hung" else CRASHES):
            shown = ", ".join(ids) if len(ids) <= HANGS else f"{ids[0]} to {ids[-1]}"
            self.gone = f"not run: the backend {how} in {len(ids)} cases in a row ({shown})"

    def _start(self) -> dict[str, Any]:
        self._worker = worker = WorkerProcess()
        try:
            found = worker.ask({"spec": self.spec}, self._limit(max(LOADING, self.timeout or 0.0)))
        except Lost as lost:
            said = "".join(f"; {line}" for line in worker.printed()[-1:])
            self.close()
            raise NotLoadedError(f"backend {self.spec!r} cannot be loaded: {lost}{said}") from lost
        except BaseException:
            self.close()
            raise
        if "failed" in found:
            self.close()
            raise BackendError(found["failed"])
        worker.printed()  # what is said while loading belongs to no case
        for text in found["warnings"]:
            warnings.warn(text, stacklevel=3)
        self.made = found["made"]
        about: dict[str, Any] = found["about"]
        return about

    def _again(self) -> None:
        """A fresh worker; a backend that does not load any more is not tried for every case that is left."""
        if not self.gone:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # said once
                    self._start()
                return
            except BackendError as error:
                if self._cut and isinstance(error.__cause__, Silent):
                    raise error.__cause__ from None
                self.gone = f"not run: after a crash, {str(error).splitlines()[0]}"
        raise Lost(self.gone)
