"""The report's JSON Schema (`report.schema.json`), and a check that needs no library.

The keywords that the schema uses and no others; tests compare the check with `jsonschema` on spoiled reports.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from sys import float_info
from typing import Any

MAX = float_info.max
PATH = Path(__file__).parent / "report.schema.json"

_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and -MAX <= v <= MAX,
}


@cache
def schema() -> dict[str, Any]:
    """The schema as it is published."""
    found = json.loads(PATH.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def faults(report: object, limit: int = 20) -> list[str]:
    """Where a report does not fit the schema, `place: what is wrong` each; at most `limit`."""
    found: list[str] = []
    _check(report, schema(), "report", found, limit)
    return found[:limit]


def _check(value: Any, rule: dict[str, Any], place: str, found: list[str], limit: int) -> None:
    if len(found) >= limit:
        return
    if "$ref" in rule:
        _check(value, schema()["$defs"][rule["$ref"].rpartition("/")[2]], place, found, limit)
    types = rule.get("type")
    names = [types] if isinstance(types, str) else types
    if names and not any(_TYPES[name](value) for name in names):
        found.append(f"{place}: {_shown(value)} is no {' or '.join(names)}")
        return
    allowed = [rule["const"]] if "const" in rule else rule.get("enum")
    if allowed is not None and not any(_same(value, choice) for choice in allowed):
        found.append(f"{place}: {_shown(value)} is none of {', '.join(_shown(c) for c in allowed)}")
    if "anyOf" in rule:
        tries: list[list[str]] = [[] for _ in rule["anyOf"]]
        for complaints, choice in zip(tries, rule["anyOf"], strict=True):
            _check(value, choice, place, complaints, limit)
        if all(tries):
            nearest = max(tries, key=_depth)
            found.extend(nearest)
    if isinstance(value, str):
        if len(value) < rule.get("minLength", 0):
            found.append(f"{place}: is empty")
        pattern = re.sub(r"\$$", r"\\Z", rule.get("pattern", ""))  # Python's $ lets a last newline through
        if not re.search(pattern, value):
            found.append(f"{place}: {_shown(value)} does not match {rule['pattern']}")
    elif isinstance(value, int | float) and value < rule.get("minimum", value):
        found.append(f"{place}: {value} is below {rule['minimum']}")
    elif isinstance(value, list):
        if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value)):
            found.append(f"{place}: has {len(value)} entries, must have {rule['minItems']}")
        for i, item in enumerate(value if "items" in rule else ()):
            _check(item, rule["items"], f"{place}[{i}]", found, limit)
    elif isinstance(value, dict):
        _check_object(value, rule, place, found, limit)


def _check_object(value: dict[str, Any], rule: dict[str, Any], place: str, found: list[str], limit: int) -> None:
    found.extend(f"{place}: lacks {name!r}" for name in rule.get("required", ()) if name not in value)
    known, other = rule.get("properties", {}), rule.get("additionalProperties", True)
    for name, item in value.items():
        if name in known:
            _check(item, known[name], f"{place}.{name}", found, limit)
        elif other is False:
            found.append(f"{place}: has the unknown field {_shown(name)}")
        elif isinstance(other, dict):
            _check(item, other, f"{place}.{name}", found, limit)


def _depth(complaints: list[str]) -> int:
    """How far inside an alternative stopped to fit."""
    return complaints[0].partition(": ")[0].count(".")


def _same(a: object, b: object) -> bool:
    """Equality that keeps 1, 1.0 and true apart."""
    return type(a) is type(b) and a == b


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
