"""Two reports side by side: two devices, two backends, or one of them before and after a change."""

from __future__ import annotations

from typing import Any

NUMBERS = ("headroom", "rms", "bias")
_FACTS = ("backend", "device", "environment", "evidence", "suite")


def incomparable(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Why the two do not answer the same questions, naming both sides; "" if they do."""
    for what, path in (
        ("suite version", ("suite", "version")),
        ("level", ("level",)),
        ("list of required cases", ("suite", "mustpass")),
        ("filter", ("filter",)),
    ):
        ours, theirs = a, b
        for key in path:
            ours, theirs = ours[key], theirs[key]
        if ours != theirs:
            return f"another {what}: {ours!r} and {theirs!r}"
    return ""


def compare(a: dict[str, Any], b: dict[str, Any], within: float = 0.0) -> dict[str, Any]:
    """What differs. `same` speaks of results alone: verdicts, cases and their numbers; `facts` tells what else differs.

    within: changes of headroom, rms and bias up to this do not count
    """
    ours, theirs = ({case["id"]: case for case in report["cases"]} for report in (a, b))
    both = [name for name in ours if name in theirs]
    found: dict[str, Any] = {
        "facts": _facts(a, b),
        "verdict": _pair(a["verdict"], b["verdict"]),
        "profiles": {
            name: pair
            for name in sorted({*a["profiles"], *b["profiles"]})
            if (pair := _pair(*(r["profiles"].get(name, {}).get("verdict", "missing") for r in (a, b))))
        },
        "support": _support(a, b),
        "cases": [change for name in both if (change := _ended(ours[name], theirs[name]))],
        "inputs": [name for name in both if ours[name]["input_sha"] != theirs[name]["input_sha"]],
        "numbers": [change for name in both for change in _numbers(ours[name], theirs[name], within)],
        "only_a": [name for name in ours if name not in theirs],
        "only_b": [name for name in theirs if name not in ours],
    }
    found["numbers"].sort(key=lambda change: -abs(_float(change["b"]) - _float(change["a"])))
    found["same"] = not any(value for name, value in found.items() if name != "facts")
    return found


def _pair(a: Any, b: Any) -> list[Any] | None:
    return None if a == b else [a, b]


def _facts(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    """Versions, files, devices and settings that differ, by dotted name."""
    flat = [_flat({name: report[name] for name in _FACTS}) for report in (a, b)]
    names = dict.fromkeys([*flat[0], *flat[1]])
    return {name: pair for name in names if (pair := _pair(flat[0].get(name), flat[1].get(name)))}


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return found


def _support(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    sides = [{(row["operation"], row["subject"]): row["level"] for row in report["support"]} for report in (a, b)]
    return [
        {"operation": key[0], "subject": key[1], "a": sides[0].get(key), "b": sides[1].get(key)}
        for key in dict.fromkeys([*sides[0], *sides[1]])
        if sides[0].get(key) != sides[1].get(key)
    ]


def _ended(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any] | None:
    """A case that ended otherwise, or was judged in another class."""
    if all(a[name] == b[name] for name in ("status", "kind", "class")):
        return None
    sides = [{name: case[name] for name in ("status", "kind", "class", "reason")} for case in (a, b)]
    return {"id": a["id"], "a": sides[0], "b": sides[1]}


def _numbers(a: dict[str, Any], b: dict[str, Any], within: float) -> list[dict[str, Any]]:
    found = []
    for name in NUMBERS:
        x, y = a[name], b[name]
        if x == y or (x is not None and y is not None and abs(_float(x) - _float(y)) <= within):
            continue
        found.append({"id": a["id"], "number": name, "a": x, "b": y})
    return found


def _float(value: float | str | None) -> float:
    return 0.0 if value is None else float(value)
