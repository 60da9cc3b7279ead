"""The registry: which checkpoint formats are installed, by the value of quant_method, loaded on first use.

A format is one entry point of the group `qhal.schemes`, in this distribution or in any other one.
"""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points

from qhal.errors import CheckpointError
from qhal_schemes.base import Scheme

GROUP = "qhal.schemes"


def known_methods() -> tuple[str, ...]:
    """Every quant_method that can be read, sorted; nothing is imported."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def load_scheme(method: str) -> Scheme:
    """The scheme of a quant_method; CheckpointError if it is unknown, claimed twice or broken."""
    points = {_target(p): p for p in entry_points(group=GROUP) if p.name == method}
    if not points:
        known = known_methods()
        near = difflib.get_close_matches(method[:80], known, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise CheckpointError(
            f"unknown quant_method {method[:80]!r}; known: {', '.join(known) or 'none'}{hint} "
            f"(another format is a package with an entry point in {GROUP!r})"
        )
    if len(points) > 1:
        raise CheckpointError(
            f"quant_method {method!r} is claimed by {' and '.join(sorted(points))}; uninstall one of them"
        )
    target, point = next(iter(points.items()))
    try:
        scheme = point.load()
    except Exception as bad:
        raise CheckpointError(f"quant_method {method!r}: {target} cannot be loaded: {bad}") from bad
    if not isinstance(scheme, Scheme):
        raise CheckpointError(f"quant_method {method!r}: {target} is no scheme: it has no `open(config, index)`")
    return scheme


def _target(point: EntryPoint) -> str:
    """Distribution and object; one distribution seen twice (an editable install on the path) is one claim."""
    dist = point.dist.name if point.dist is not None else "?"
    return f"{dist} ({point.value})"
