"""The check that runs when a backend's class body is executed: does it fit the interface?

Unknown public names (a typo, a method of a newer interface, a helper that belongs behind an underscore) and changed
signatures are one readable InterfaceError, at import, not a wrong call in the middle of a generation.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping

from qhal.errors import InterfaceError


def check_class(cls: type, base: type) -> None:
    """Compare the public names and signatures of `cls` with those of `base`; one InterfaceError lists every fault.

    Classes between the two (mixins too) are checked with it, since their members become the backend's.
    """
    public = {name for name in dir(base) if not name.startswith("_")}
    members = {n: m for part in reversed(cls.__mro__) if part not in base.__mro__ for n, m in vars(part).items()}
    faults: list[str] = []
    for name, member in members.items():
        if name.startswith("_"):
            if name in _PRIVATE:
                faults.append(f"{name}: belongs to the interface and must not be replaced")
            continue
        if name not in public:
            near = difflib.get_close_matches(name, public, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else "; helpers start with an underscore"
            faults.append(f"{name}: no such member{hint}")
            continue
        faults.extend(f"{name}: {fault}" for fault in _signature_faults(getattr(base, name), member))
    faults.extend(_value_faults(cls, members))
    if faults:
        listing = "\n  ".join(faults)
        raise InterfaceError(f"{cls.__module__}.{cls.__qualname__} does not fit {base.__qualname__}:\n  {listing}")


_PRIVATE = ("_refusal",)
COMPOSITES = ("linear", "experts")
"""The operations whose bodies in the interface are their definition."""


def _value_faults(cls: type, members: Mapping[str, object]) -> Iterator[str]:
    """name, interface and fusions have values that selection, plans and the suite rely on."""
    name, version, fusions = (getattr(cls, n) for n in ("name", "interface", "fusions"))
    if not isinstance(name, str) or ("name" in members and not name):
        yield f"name: is {name!r}, must be the backend's name"
    if "interface" not in members:
        yield f"interface: is missing; state the version it was written for, interface = {version}"
    if not (isinstance(version, tuple) and [type(n) for n in version] == [int, int]):
        yield f"interface: is {version!r}, must be (major, minor)"
    if not (isinstance(fusions, frozenset) and fusions <= set(COMPOSITES)):
        yield f"fusions: is {fusions!r}, must be a frozenset of names out of {', '.join(COMPOSITES)}"
        return
    for composite in COMPOSITES:
        if composite in members and composite not in fusions:
            yield f"{composite}: has a body of its own, so it must be declared: fusions = frozenset({{{composite!r}}})"


def _signature_faults(expected: object, found: object) -> Iterator[str]:
    if isinstance(expected, property) or not callable(expected):
        if isinstance(expected, property) and not isinstance(found, property):
            yield f"must be a property, is a {type(found).__name__}"
        elif inspect.isroutine(found):
            yield "must be a value, not a method"
        return
    if not inspect.isfunction(found):
        yield f"must be a method, is a {type(found).__name__}"
        return
    if inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found):
        yield "must be a plain method: calls return their result"
        return
    want = list(inspect.signature(expected).parameters.values())
    have = list(inspect.signature(found).parameters.values())
    if [(p.name, p.kind) for p in want] != [(p.name, p.kind) for p in have]:
        yield f"has the parameters {_names(have)}, must have {_names(want)}"
        return
    for w, h in zip(want, have, strict=True):
        if (w.default is inspect.Parameter.empty) != (h.default is inspect.Parameter.empty) or (
            w.default is not inspect.Parameter.empty and w.default != h.default
        ):
            yield f"parameter {h.name!r} has the default {_default(h)}, must have {_default(w)}"


def _names(parameters: list[inspect.Parameter]) -> str:
    parts, keyword = [], False
    for p in parameters:
        if p.kind is inspect.Parameter.KEYWORD_ONLY and not keyword:
            parts.append("*")
            keyword = True
        parts.append(p.name)
    return f"({', '.join(parts)})"


def _default(p: inspect.Parameter) -> str:
    return "none (required)" if p.default is inspect.Parameter.empty else repr(p.default)
