"""Cases and records as JSON, and back: what travels between a session and its worker. Floats keep every bit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from qhal_conformance.cases import Case
from qhal_conformance.outcome import FailKind, Outcome, Status, Worst
from qhal_conformance.runner import Record


def encode(value: dict[str, Any]) -> bytes:
    """One message. NaN and Inf are written by their names; Python's shortest decimals give every float back."""
    return json.dumps(value).encode()


def decode(data: bytes) -> dict[str, Any]:
    """One message; ValueError if it is none."""
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError(f"a message is an object, not {type(found).__name__}")
    return found


def case_to(case: Case) -> dict[str, Any]:
    """A case field by field: reseeded ones and those of no catalogue travel too."""
    return asdict(case)


def case_from(found: dict[str, Any]) -> Case:
    """The same case."""
    return Case(**{name: _tuples(value) for name, value in found.items()})


def record_to(record: Record) -> dict[str, Any]:
    """A record without its case: whoever asked knows it."""
    outcome = asdict(record.outcome)
    outcome["status"] = record.outcome.status.value
    outcome["kind"] = None if record.outcome.kind is None else record.outcome.kind.value
    return {
        "outcome": outcome,
        "seconds": record.seconds,
        "inputs_sha": record.inputs_sha,
        "asked": record.asked,
        "stuck": record.stuck,
    }


def record_from(case: Case, found: dict[str, Any]) -> Record:
    """The same record."""
    fields = {name: _tuples(value) for name, value in found["outcome"].items()}
    fields["status"] = Status(fields["status"])
    fields["kind"] = None if fields["kind"] is None else FailKind(fields["kind"])
    if fields["worst"] is not None:
        fields["worst"] = Worst(**{name: _tuples(value) for name, value in fields["worst"].items()})
    return Record(case, Outcome(**fields), found["seconds"], found["inputs_sha"], found["asked"], found["stuck"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
