"""Golden cases by name: those of QHAL_GOLDEN and those that come with the tests; of one name, the first."""

from __future__ import annotations

import os
from pathlib import Path

SMALL = Path(__file__).parent / "golden"
FULL = Path(os.environ.get("QHAL_GOLDEN", SMALL))
NO_CHECKPOINTS = ("rotations/fht_reference", "rotations/quarot_hadamard_sizes")
"""Fixtures of operators, whose `checkpoint` folders hold no checkpoint."""


def path(case: str) -> Path:
    """The folder of family/case."""
    return FULL / case if (FULL / case).is_dir() else SMALL / case


def cases(*families: str) -> list[str]:
    """Every family/case with a checkpoint, or those of these families in their order."""
    found = {f"{p.parent.parent.name}/{p.parent.name}" for root in (SMALL, FULL) for p in root.glob("*/*/checkpoint")}
    order = families or sorted({case.partition("/")[0] for case in found})
    return [c for name in order for c in sorted(found) if c.startswith(f"{name}/") and c not in NO_CHECKPOINTS]
