"""Interface versions: which backends fit, and what a backend of an older one cannot have known.

From 1.0 on the interface is append-only. Signatures stay as they are. A minor version may add methods (their bodies
refuse), fields of requests (their defaults mean what was meant before; `metadata={"since": (major, minor)}` says when
they came) and words of formats and rules. A backend refuses words that it does not know. Fields that it does not know
it cannot see, so a request that uses one is refused before the backend is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import lru_cache, wraps
from typing import Any

from qhal.requests import Request, Support

Version = tuple[int, int]
FIRST: Version = (1, 0)
"""The first interface that later ones keep."""


def mismatch(ours: Version, theirs: Version) -> str:
    """Why a backend written for interface `theirs` does not fit interface `ours`, or "".

    Accepted are this major version up to this minor one, and the major version before, back to 1.0.
    """
    if FIRST <= theirs <= ours and theirs[0] >= ours[0] - 1:
        return ""
    return f"it was written for interface {_text(theirs)}, this is qhal {_text(ours)}"


def since(request: Any) -> Version:
    """The interface version whose fields a request uses: those with the values that they start with are not used."""
    found = FIRST
    kind: Any = type(request)
    for name, version, start in _added(kind):
        if getattr(request, name) != start:
            found = max(found, version)
    for name in _nested(kind):
        found = max(found, since(getattr(request, name)))
    return found


def known_fields_only(supports: Callable[[Any, Request], Support]) -> Callable[[Any, Request], Support]:
    """A backend's `supports`, asked only about requests whose every used field its interface version has."""

    @wraps(supports)
    def asked(self: Any, request: Request) -> Support:
        needed = since(request)
        if needed <= self.interface:
            return supports(self, request)
        return Support(
            "not_implemented",
            f"the request uses fields of interface {_text(needed)}, this backend was written for "
            f"{_text(self.interface)}; install a newer one",
        )

    return asked


@lru_cache(maxsize=64)
def _added(kind: type) -> tuple[tuple[str, Version, object], ...]:
    """(name, version, default) of the fields that came after 1.0."""
    if not is_dataclass(kind):
        return ()
    return tuple((f.name, f.metadata["since"], f.default) for f in fields(kind) if "since" in f.metadata)


@lru_cache(maxsize=64)
def _nested(kind: type) -> tuple[str, ...]:
    """Fields that hold a request themselves: the product of a GroupedRequest, the cache of an AttentionRequest."""
    return tuple(f.name for f in fields(kind) if f.name in ("gemm", "kv")) if is_dataclass(kind) else ()


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
