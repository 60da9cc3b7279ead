"""The lists of required cases, kept as text beside the code: a change of the suite is a visible change of a list.

A report carries the hash of the list that it was made with; `verify` refuses one that names another list.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from qhal_conformance.cases import Case
from qhal_conformance.operations import catalogue

FOLDER = Path(__file__).parent / "lists"


def lines(level: int) -> list[str]:
    """`profile id` of every required case of a level, sorted; made from the catalogue."""
    return sorted(f"{case.profile} {case.id}" for case in catalogue(level) if case.required)


def path(level: int) -> Path:
    """The file in which the list of a level is kept."""
    return FOLDER / f"level{level}.txt"


def kept(level: int) -> str:
    """The text of a list as it is kept."""
    return path(level).read_text(encoding="utf-8")


def sha(level: int) -> str:
    """sha256 of a list as it is kept."""
    return hashlib.sha256(kept(level).encode()).hexdigest()


def required(level: int) -> dict[str, set[str]]:
    """Required case ids by profile, from the kept list."""
    found: dict[str, set[str]] = {}
    for line in kept(level).splitlines():
        profile, _, name = line.partition(" ")
        found.setdefault(profile, set()).add(name)
    return found


def write(level: int) -> None:
    """Keep the catalogue's list: a deliberate act, seen in the diff."""
    FOLDER.mkdir(exist_ok=True)
    path(level).write_text("\n".join(lines(level)) + "\n", encoding="utf-8")


def belongs(case: Case, level: int) -> bool:
    """Whether a case is on the kept list."""
    return case.id in required(level).get(case.profile, set())


if __name__ == "__main__":
    for each in (0, 1):
        write(each)
