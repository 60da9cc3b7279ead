"""A sample of a report, run again: the nearest thing to a proof of origin that needs no trust in the sender.

The digest chooses the cases, so whoever made the report could not know them before it was finished.
"""

from __future__ import annotations

import hashlib
from typing import Any

from qhal.interface import QuantOps
from qhal_conformance.cases import find
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.report import case_entry
from qhal_conformance.runner import run_case


def sample(report: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """`count` executed cases in an order that the digest decides."""
    ran = [c for c in report["cases"] if c["status"] in (Status.PASS.value, Status.FAIL.value, Status.ERROR.value)]
    key = report["digest"]
    return sorted(ran, key=lambda case: hashlib.sha256(f"{key} {case['id']}".encode()).digest())[:count]


def rerun(report: dict[str, Any], ops: QuantOps, count: int) -> tuple[list[str], list[str]]:
    """(ids that were run, complaints). Compared: how a case ended, its class, how much was compared, on which inputs.

    Where the worst element is the same one, its reference and bound are too: they follow from the case and the class.
    Headroom and statistics are not compared: an honest device may sum in another order each time.
    """
    complaints, ids = [], []
    for case in sample(report, count):
        known = find(catalogue(report["level"]), case["id"])
        again = case_entry(run_case(known, ops), report["backend"]["spec"])
        ids.append(case["id"])
        for name in ("status", "kind", "class", "n", "input_sha"):
            if again[name] != case[name]:
                complaints.append(f"{case['id']}: {name} is {again[name]!r} now, the report says {case[name]!r}")
        ours, theirs = again["worst"], case["worst"]
        if ours and theirs and ours["index"] == theirs["index"]:
            for name in ("ref", "bound"):
                if ours[name] != theirs[name]:
                    complaints.append(
                        f"{case['id']}: {name} at {ours['index']} is {ours[name]!r}, not {theirs[name]!r}"
                    )
    return ids, complaints
