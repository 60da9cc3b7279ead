"""NamedTables: matrices that formats name instead of storing: Hadamard tables, structured codebooks.

A project may register its own at any time, also after a backend has answered "no such table". Whoever caches answers
keeps `revision()` in the key of the cache.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from itertools import count

from torch import Tensor

_changes = count(1)
_revision = 0


def revision() -> int:
    """A number that changes whenever a table is registered or removed, in any registry of this process."""
    return _revision


class NamedTables(UserDict[str, Callable[[], Tensor]]):
    """Name -> function that gives the table. Functions build on first use and cache; nothing is built here."""

    def __setitem__(self, name: str, build: Callable[[], Tensor]) -> None:
        super().__setitem__(name, build)
        _changed()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        _changed()


def _changed() -> None:
    global _revision
    _revision = next(_changes)
