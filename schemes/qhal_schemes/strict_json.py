"""JSON of a checkpoint, read strictly: no key twice, no deep nesting, no text that cannot be written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qhal.errors import CheckpointError

_DEPTH = 64  # levels; configurations have about ten


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError for anything else, and for a key that occurs twice."""
    if not is_file(path):
        raise CheckpointError(f"{path}: is no regular file")
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as bad:
        raise CheckpointError(f"{path}: no valid JSON: {bad}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text; ValueError for what is not JSON, and for what could break its users later."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"nested more than {_DEPTH} levels deep") from None
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"nested more than {_DEPTH} levels deep")


def is_file(path: Path) -> bool:
    """Whether a path is a regular file, links followed; CheckpointError where that cannot be found out."""
    try:
        return path.is_file()
    except (OSError, ValueError) as bad:
        raise CheckpointError(f"{str(path)[:300]!r}: cannot be read: {getattr(bad, 'strerror', None) or bad}") from None


def _inside(value: Any) -> list[Any]:
    if isinstance(value, str):
        value.encode("utf-8")  # half of a surrogate pair: a UnicodeEncodeError, which is a ValueError
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name[:200]!r} is duplicated")
            seen.add(name)
    return found
