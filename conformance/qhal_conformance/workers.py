"""Cases shared out among workers that run side by side, each with the backend loaded; records in the cases' order.

Neighbouring cases of one operation and format stay together, because a worker remembers what they share. Collectives
run in the first worker only: it has the ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import groupby
from threading import Event, Lock
from typing import Any

from qhal_conformance.cases import Case
from qhal_conformance.isolated import Session
from qhal_conformance.runner import Record

_SHARE = 8
"""Cases that a worker takes at a time, at most."""


def run_cases(
    spec: str,
    cases: Sequence[Case],
    *,
    timeout: float | None = None,
    jobs: int = 1,
    seen: Callable[[Record], None] = lambda record: None,
) -> tuple[dict[str, Any], list[Record]]:
    """What the report says of the backend that `qhal.select(spec)` finds, with its claims; and a record of every case.

    timeout  seconds per case, None: by its level (`isolated.TIMEOUTS`)
    jobs     workers; they share the device and the processor, so a case may take longer
    seen     called after each case, by one thread at a time

    BackendError if the backend cannot be loaded.
    """
    with Session(spec, timeout=timeout) as first:
        about = first.about | {"support": first.claims(cases)}
        if jobs == 1:
            return about, [_one(first, case, seen) for case in cases]
        return about, _Sharing(first, cases, jobs, seen).records()


def _one(session: Session, case: Case, seen: Callable[[Record], None]) -> Record:
    record = session.run(case)
    seen(record)
    return record


class _Sharing:
    def __init__(self, first: Session, cases: Sequence[Case], jobs: int, seen: Callable[[Record], None]) -> None:
        self._sessions = [first]
        self._cases, self._jobs, self._seen = cases, jobs, seen
        self._found: dict[int, Record] = {}
        self._ended, self._lock = Event(), Lock()
        together: list[list[int]] = []
        rest: list[list[int]] = []
        for _, group in groupby(range(len(cases)), lambda i: (cases[i].operation, cases[i].subject)):
            places = list(group)
            shares = [places[at : at + _SHARE] for at in range(0, len(places), _SHARE)]
            (together if cases[places[0]].operation == "comm_quant" else rest).extend(shares)
        self._together, self._rest = deque(together), deque(rest)

    def records(self) -> list[Record]:
        with ThreadPoolExecutor(self._jobs) as pool:
            parts = [pool.submit(self._work, number) for number in range(self._jobs)]
            try:
                for part in wait(parts, return_when=FIRST_EXCEPTION).done:
                    part.result()
            except BaseException:  # a backend that does not load again, or Ctrl-C: the other workers end too
                self._ended.set()
                with self._lock:
                    sessions = list(self._sessions)
                for session in sessions:
                    session.close()
                raise
        return [self._found[i] for i in range(len(self._cases))]

    def _work(self, number: int) -> None:
        if number == 0:
            self._empty(self._sessions[0], self._together)
            self._empty(self._sessions[0], self._rest)
            return
        first = self._sessions[0]
        if not self._rest:
            return
        with Session(first.spec, timeout=first.timeout) as session:
            with self._lock:
                self._sessions.append(session)
            self._empty(session, self._rest)

    def _empty(self, session: Session, shares: deque[list[int]]) -> None:
        while not self._ended.is_set():
            try:
                share = shares.popleft()
            except IndexError:
                return
            for i in share:
                if self._ended.is_set():
                    return
                record = session.run(self._cases[i])
                with self._lock:
                    self._found[i] = record
                    self._seen(record)
