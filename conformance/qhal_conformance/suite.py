"""The suite as a test module: `from qhal_conformance.suite import *` in one file of a vendor's tests.

One test per case, called by the case's id. The plugin (`-p qhal_conformance.plugin`) says which backend and which
cases, and adds the verdict when the last test has run.
"""

from __future__ import annotations

import pytest

from qhal.interface import QuantOps
from qhal_conformance import plugin
from qhal_conformance.cases import Case
from qhal_conformance.outcome import Status

__all__ = ["test_case"]


def test_case(qhal_case: Case, qhal_ops: QuantOps, request: pytest.FixtureRequest) -> None:
    """One question to the backend. What it refuses, as it must, is skipped with its reason: data, never a pass."""
    entry = plugin.ask(request, qhal_case, qhal_ops)
    if entry["status"] in (Status.FAIL.value, Status.ERROR.value):
        pytest.fail(plugin.words(entry), pytrace=False)
    if entry["status"] in (Status.UNSUPPORTED.value, Status.SKIP.value):
        needed = f" (required by {entry['profile']})" if entry["required"] else ""
        pytest.skip(f"{entry['status']}{needed}: {entry['reason']}")
