"""The bars of `bars.json`, held against a written run.

A bar names a row and one of: `at_most` times the best peer of the same arithmetic (or of a looser one, without any),
or `at_most` times the peer `against`, or times the row `against_row`; `share_of_bandwidth` of bytes per second;
`value_at_most`.
`needs` limits an absolute bar to the GPU that it was stated for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent.parent / "bars.json"


def missed(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(row, why) of every bar that is not met or not measured."""
    rows = {r["row"]: r for r in found["rows"]}
    gpu = found["device"].get("gpu") or ""
    misses = []
    for bar in json.loads(FILE.read_text())["bars"]:
        why = _why(bar, rows, gpu)
        if why:
            misses.append((bar["row"], why))
    return misses


def _why(bar: dict[str, Any], rows: dict[str, Any], gpu: str) -> str | None:
    row = rows.get(bar["row"])
    if row is None:
        return "not measured"
    if "value_at_most" in bar:
        return _above(row["value"], bar["value_at_most"], "us")
    if row["us"] is None:
        return row["note"] or "no time"
    if "share_of_bandwidth" in bar:
        if bar["needs"] not in gpu:
            return f"stated for {bar['needs']}, measured on {gpu}"
        rate, least = row["bytes"] / row["us"] * 1e6, bar["share_of_bandwidth"] * bar["bandwidth"]
        return None if rate >= least else f"{rate / 1e12:.2f} TB/s, at least {least / 1e12:.2f}"
    return _against(bar, row, rows)


def _against(bar: dict[str, Any], row: dict[str, Any], rows: dict[str, Any]) -> str | None:
    if "against_row" in bar:
        name, other = bar["against_row"], rows.get(bar["against_row"])
        peer = None if other is None else other["us"]
    elif "against" in bar:
        name, peer = bar["against"], row["peers"].get(bar["against"])
    else:
        name, peer = row["best"] or _looser(row)
    if not isinstance(peer, float):
        return f"{name} was not measured ({peer})" if peer else f"{name} was not measured"
    ratio = row["us"] / peer
    most = bar["at_most"]
    return None if ratio <= most else f"{row['us']:.1f} us, {ratio:.2f} x {name} ({peer:.1f} us), at most {most}"


def _looser(row: dict[str, Any]) -> tuple[str, float | None]:
    """Where no peer has the same arithmetic, the fastest of those with a looser one is what not to be slower than."""
    found = {name: us for name, us in row["peers"].items() if isinstance(us, float) and name in row["looser"]}
    name, us = min(found.items(), key=lambda item: item[1], default=("a peer", None))
    return f"{name}, whose arithmetic is looser," if found else name, us


def _above(value: float | None, most: float, unit: str) -> str | None:
    if value is None:
        return "not measured"
    return None if value <= most else f"{value:.1f} {unit}, at most {most}"
