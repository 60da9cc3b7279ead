"""The picture of a checkpoint: one HTML page (`templates/inspect.html`) of layers x modules, coloured by format.

The page fetches nothing and runs no script. Names come from files that nobody vouches for: the template escapes every
text, and styles are made of numbers only.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qhal_schemes import Checkpoint
from qhal_schemes.writing import size_text

_LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\b(experts)\.\d+\.")
PLAIN = -1
"""Stands for the place of a format in the legend where a module is not quantized."""


@dataclass
class Cell:
    """Modules of one kind in one layer: one, or all experts. kinds: place in the legend -> modules."""

    name: str
    kinds: Counter[int] = field(default_factory=Counter)

    @property
    def text(self) -> str:
        """Letters of the formats, the most frequent first."""
        return "".join(letter(k) for k, _ in self.kinds.most_common(3) if k != PLAIN)

    @property
    def style(self) -> str:
        """The background: one colour, or stripes as wide as each format is frequent."""
        if len(self.kinds) == 1:
            return f"background:{_colour(next(iter(self.kinds)))}"
        total, at, stops = self.kinds.total(), 0.0, []
        for kind, count in self.kinds.most_common():
            end = at + 100 * count / total
            stops.append(f"{_colour(kind)} {at:.1f}% {end:.1f}%")
            at = end
        return f"background:linear-gradient(90deg,{','.join(stops)})"


@dataclass
class Grid:
    """The layers under one prefix. rows: layer -> column -> cell; caches: layer -> format of its cache."""

    prefix: str
    columns: dict[str, None] = field(default_factory=dict)
    rows: dict[int, dict[str, Cell]] = field(default_factory=dict)
    caches: dict[int, str] = field(default_factory=dict)


def letter(kind: int) -> str:
    """A, B, ... Z, AA, AB: formats are told apart by more than their colour."""
    text = ""
    while kind >= 0:
        text, kind = chr(ord("A") + kind % 26) + text, kind // 26 - 1
    return text


def page(ckpt: Checkpoint) -> str:
    """The whole page."""
    record = ckpt.summary()
    kinds = {module: i for i, row in enumerate(record["formats"]) for module in row["members"]}
    grids, others = _grids(ckpt, kinds)
    environment = Environment(
        loader=PackageLoader("qhal_cli"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("inspect.html").render(
        record=record,
        legend=[(letter(i), f"background:{_colour(i)}", row) for i, row in enumerate(record["formats"])],
        grids=grids,
        others=others,
        titles=[*(_title(row) for row in record["formats"]), "plain"],
        rules=ckpt.excluded,
        size=size_text,
    )


def _title(row: dict[str, Any]) -> str:
    parts = [row["weight"], f"input {row['input']}", row["around"], row["layout"], row["evidence"]]
    return "; ".join(part for part in parts if part)


def _grids(ckpt: Checkpoint, kinds: dict[str, int]) -> tuple[list[Grid], list[Cell]]:
    """Modules of numbered layers by prefix, and all others."""
    grids: dict[str, Grid] = {}
    others = []
    for module in ckpt.modules():
        kind, match = kinds.get(module, PLAIN), _LAYER.fullmatch(module)
        if match is None or len(match[2]) > 6:  # a number that long counts no layers
            others.append(Cell(module, Counter([kind])))
            continue
        grid, column = grids.setdefault(match[1], Grid(match[1])), _EXPERT.sub(r"\1.*.", match[3])
        row = grid.rows.setdefault(int(match[2]), {})
        grid.columns.setdefault(column)
        row.setdefault(column, Cell(f"{match[1]}.{match[2]}.{column}")).kinds[kind] += 1
    for layer, f in ckpt.kv_formats().items():
        match = _LAYER.fullmatch(ckpt.kv_layers[layer])
        if match is not None and match[1] in grids:
            grids[match[1]].caches[int(match[2])] = str(f)
    return list(grids.values()), others


def _colour(kind: int) -> str:
    """A variable of the page's style sheet: twelve colours, then again from the first."""
    return "var(--plain)" if kind == PLAIN else f"var(--c{kind % 12})"
