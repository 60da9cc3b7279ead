"""How `selftest` asks a backend: in a process of its own that it may crash or hang, or in this one, as an object."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import qhal
from qhal.errors import BackendError
from qhal.interface import QuantOps
from qhal.requests import Request
from qhal_conformance import comm_ranks, provenance, support
from qhal_conformance.cases import Case
from qhal_conformance.isolated import CUT, TIMEOUTS, Session
from qhal_conformance.runner import Record, run_case

Refusals = tuple[dict[Request, str | None], list[str]]
"""Why each request will not be executed as it is asked, or None; the names of the fused composites."""


class Asked(Protocol):
    """A backend, until the time is over."""

    @property
    def name(self) -> str:
        """As it calls itself."""

    @property
    def spec(self) -> str:
        """As `qhal.select` takes it."""

    @property
    def gone(self) -> str:
        """Why it runs no more cases, "" as long as it does."""

    def refusals(self, requests: Sequence[Request]) -> Refusals:
        """What it says of requests; BackendError if it does not survive that."""

    def run(self, case: Case) -> Record | None:
        """One case. None: the time is over, or it is gone."""

    def __enter__(self) -> Asked: ...

    def __exit__(self, *error: object) -> None: ...


class Apart:
    """In a worker. Everything ends at `until`; a case may take `share` seconds at most."""

    def __init__(self, backend: QuantOps | str, until: float, share: float) -> None:
        spec = backend if isinstance(backend, str) else _spec(backend)
        self._session = Session(spec, timeout=min(share, TIMEOUTS[0]), until=until)
        about = self._session.about["backend"]
        self.name, self.spec = about["name"], about["spec"]
        if not isinstance(backend, str) and self._session.made != provenance.kind(backend):
            self._session.close()
            raise BackendError(_stranger(backend, f"there it is a {self._session.made}"))
        self._session.spec = self.spec  # "auto" is decided once

    @property
    def gone(self) -> str:
        """Why no case is run any more."""
        return self._session.gone

    def refusals(self, requests: Sequence[Request]) -> Refusals:
        """As the worker answers."""
        reasons, fusions = self._session.refusals(requests)
        return dict(zip(requests, reasons, strict=True)), fusions

    def run(self, case: Case) -> Record | None:
        """In the worker; a case that the end of the time cuts was not run."""
        if self.gone or time.monotonic() >= self._session.until:
            return None
        record = self._session.run(case)
        return None if record.outcome.reason in (CUT, self.gone or CUT) else record

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()


class Here:
    """In this process: whatever the backend does to it is done."""

    gone = ""

    def __init__(self, backend: QuantOps | str, until: float) -> None:
        self._ops = qhal.select(backend) if isinstance(backend, str) else backend
        self._until = until
        self.name = self._ops.name
        self.spec = provenance.resolved(self._ops, backend if isinstance(backend, str) else _named(self._ops))

    def refusals(self, requests: Sequence[Request]) -> Refusals:
        """As the object answers."""
        return {r: support.refused(self._ops, r) for r in requests}, sorted(self._ops.fusions)

    def run(self, case: Case) -> Record | None:
        """Whole, if it has begun."""
        return None if time.monotonic() > self._until else run_case(case, self._ops)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        comm_ranks.end()


def _named(ops: QuantOps) -> str:
    return ops.name if ops.device.index is None else f"{ops.name}:{ops.device.index}"


def _spec(ops: QuantOps) -> str:
    if ops.name not in qhal.backends():
        raise BackendError(_stranger(ops, "no installed backend has that name"))
    return _named(ops)


def _stranger(ops: QuantOps, why: str) -> str:
    return (
        f"a {type(ops).__qualname__} named {ops.name!r} cannot be made again in a process of its own: {why}.\n"
        "  do: give what qhal.select made, or its name; or in_process=True, which asks this very object"
    )
