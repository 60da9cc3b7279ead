"""The check that runs when a backend's class body is executed: does it fit the interface?

Unknown public names (a typo, a method of a newer interface, a helper that belongs behind an underscore) and changed
signatures are one readable InterfaceError, at import, not a wrong call in the middle of a generation.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator

from qhal.errors import InterfaceError


def check_class(cls: type, base: type) -> None:
    """Compare the public names and signatures of `cls` with those of `base`; one InterfaceError lists every fault."""
    public = {name for name in dir(base) if not name.startswith("_")}
    faults: list[str] = []
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if name not in public:
            near = difflib.get_close_matches(name, public, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else "; helpers start with an underscore"
            faults.append(f"{name}: no such member{hint}")
            continue
        faults.extend(f"{name}: {fault}" for fault in _signature_faults(getattr(base, name), member))
    if faults:
        listing = "\n  ".join(faults)
        raise InterfaceError(f"{cls.__module__}.{cls.__qualname__} does not fit {base.__qualname__}:\n  {listing}")


def _signature_faults(expected: object, found: object) -> Iterator[str]:
    if isinstance(expected, property) or not callable(expected):
        if callable(found) and not isinstance(found, property | type):
            yield "must be a property or a value, not a method"
        return
    if not inspect.isfunction(found):
        yield f"must be a method, is a {type(found).__name__}"
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
