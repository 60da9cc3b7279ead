"""What a backend claims, as the suite asks it: one row per operation and subject. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qhal.interface import QuantOps
from qhal.requests import Arithmetic, Request, Support
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS
from qhal_conformance.problem import first_line

LEVELS = ("full", "conditional", "not_implemented", "unsupported", "broken")
"""Answers from strong to weak. broken: `supports` raised, or answered something that is no Support."""


def asked(case: Case) -> bool:
    """Whether a case has one request that stands for its subject; a stricter class than usual is another question."""
    return OPERATIONS[case.operation].request(case) is not None and not case.has("exact")


def rows(ops: QuantOps, cases: Iterable[Case]) -> list[dict[str, Any]]:
    """One row per operation and subject: the weakest answer to any of its requests."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases:
        if not asked(case):
            continue
        key = (case.operation, case.subject)
        row = {"operation": case.operation, "subject": case.subject, **_answer(ops, case)}
        if key not in found or LEVELS.index(row["level"]) > LEVELS.index(found[key]["level"]):
            found[key] = row
    return list(found.values())


def refused(ops: QuantOps, request: Request) -> str | None:
    """Why a request will not be executed as it is asked, or None. Whatever `supports` raises is such a reason."""
    try:
        support = ops.supports(request)
    except Exception as error:
        return f"supports must never raise; it raised {type(error).__name__}: {first_line(error)}"
    if not isinstance(support, Support):
        return f"supports returned {type(support).__name__}, must be a Support"
    if not support:
        return f"refused, {support.level}: {support.reason}"
    asked, runs = Arithmetic.of(request), support.arithmetic
    if asked is not None and runs is not None and (asked.x, asked.w) != (runs.x, runs.w):
        return f"a downgrade: asked is {asked}, would run {runs}"
    return None


def _answer(ops: QuantOps, case: Case) -> dict[str, str]:
    request = OPERATIONS[case.operation].request(case)
    assert request is not None
    try:
        answer = ops.supports(request)
        if answer.level not in LEVELS[:-1]:
            raise ValueError(f"level {answer.level!r} is none of {', '.join(LEVELS[:-1])}")
        label = "-" if answer.numerics is None else answer.numerics.label
        return {"level": answer.level, "class": label, "detail": str(answer.executes if answer else answer.reason)}
    except Exception as error:  # untrusted: whatever it raises is what the row says
        return {"level": "broken", "class": "-", "detail": f"{type(error).__name__}: {first_line(error)}"}
