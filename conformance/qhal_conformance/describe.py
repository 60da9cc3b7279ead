"""What a case asks, in words and numbers: for `show` and `repro`."""

from __future__ import annotations

from qhal.requests import minimum_class
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS

_STORAGE = {
    "contiguous": "rows one after the other",
    "offset": "the buffer starts one element late, so wide loads are not aligned",
    "strided": "rows three elements further apart than needed, NaN between them",
}


def describe(case: Case) -> dict[str, str]:
    """Field by field, in the order in which a person asks."""
    operation = OPERATIONS[case.operation]
    request = operation.request(case)
    data = operation.data.get(case.data, "")
    found = {
        "case": case.id,
        "operation": f"{case.operation}: {operation.meaning}",
        "request": "several, made in the course of the case" if request is None else str(request),
        "sizes": ", ".join(f"{letter}={size}" for letter, size in case.shape) or "-",
        "data": f"{case.data}: {data}" if data else case.data,
        "storage": _STORAGE[case.storage],
        "options": ", ".join(case.options) or "-",
        "profile": f"{case.profile} ({'required' if case.required else 'optional'}, level {case.level})",
        "inputs": f"sha256 {operation.sha(case)}",
    }
    if request is not None:
        found["judged as"] = f"{minimum_class(request).label} or stricter; the backend's own class decides the bound"
    return found
