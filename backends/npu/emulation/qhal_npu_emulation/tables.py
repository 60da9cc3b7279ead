"""The tables of docs/npu.md, from a report and from the operator table: written, or checked against what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qhal_npu import attention_table
from qhal_npu.table import DEMANDS, OPERATORS

PAGE = Path(__file__).parents[4] / "docs" / "npu.md"


def main(report: Path, *, check: bool) -> int:
    """0 if the page says what the report says (or now does), 1 if not."""
    found = json.loads(report.read_text())
    text = PAGE.read_text()
    fresh = text
    for name, rows in tables(found).items():
        if check and name == "modelslim" and all(row in text.splitlines() for row in rows):
            continue  # the cases of this repository alone are fewer than the page's
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        if not pattern.search(fresh):
            print(f"{PAGE.name} has no place for the table {name!r}")
            return 1
        fresh = pattern.sub(lambda m, rows=rows: m[1] + "\n" + "\n".join(rows) + "\n\n" + m[2], fresh)  # type: ignore[misc]
    if fresh == text:
        return 0
    if check:
        print(f"{PAGE} does not say what {report} says; run: python -m qhal_npu_emulation tables")
        return 1
    PAGE.write_text(fresh)
    return 0


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
    """Every generated table by the name of its place."""
    return {
        "operators": _operators(),
        "demands": _table(("demand", "says"), [(f"`{k}`", v) for k, v in DEMANDS.items()]),
        "attention": _attention(),
        "attention demands": _table(("demand", "says"), [(f"`{k}`", v) for k, v in attention_table.DEMANDS.items()]),
        "at the call": _table(("demand", "says"), [(f"`{k}`", v) for k, v in attention_table.AT_THE_CALL.items()]),
        "levels": _levels(found),
        "profiles": _profiles(found),
        "wrong calls": _wrong(found),
        "modelslim": _modelslim(found),
    }


def _operators() -> list[str]:
    head = ("kind", "operator", "on", "operands", "scales and bias", "weight", "aclnn", "source")
    rows = [
        (o.kind, f"`{o.op}`", " ".join(o.on), f"{o.x} x {o.w}", o.scales, o.layout, ", ".join(o.aclnn), o.source)
        for o in OPERATORS
    ]
    return _table(head, rows)


def _attention() -> list[str]:
    head = ("kind", "operator", "on", "q, keys and values", "scales", "takes", "aclnn", "source")
    rows = []
    for line in attention_table.FUSED:
        shapes = f"{line.layout}: {line.shapes}"
        scales = f"antiquant mode {line.mode}: {line.scales}" if line.blocks else line.scales
        caches = f"int8 by {', '.join(line.blocks)}" if line.blocks else ""
        caches = caches or ("any format" if line.rows == "gathered" else "16 bits")
        takes = ", ".join([caches, *line.options])
        entries = {name: [a for a in line.on if line.aclnn[a] == name] for name in dict.fromkeys(line.aclnn.values())}
        aclnn = ", ".join(f"{name} ({' '.join(on)})" for name, on in entries.items() if on)
        rows.append((line.kind, f"`{line.op}`", " ".join(line.on), shapes, scales, takes, aclnn, line.source))
    return _table(head, rows)


def _levels(found: dict[str, Any]) -> list[str]:
    rows = [(v["level"], v["of"], f"{v['held']} of {v['asked']}", v["what"]) for v in found["levels"]]
    return _table(("level", "of", "hold", "what"), [*rows, ("L3 device", "", "0", found["L3 device"])])


def _profiles(found: dict[str, Any]) -> list[str]:
    archs = list(found["required"])
    names = list(found["required"][archs[0]])
    shown = {(a, n): "whole" if p == r else f"{p} of {r}" for a in archs for n, (p, r) in found["required"][a].items()}
    return _table(("profile", *archs), [(n, *(shown[a, n] for a in archs)) for n in names])


def _wrong(found: dict[str, Any]) -> list[str]:
    rows = [(w["call"], w["level"] if w["refused"] else "nobody", w["said"].replace("|", "/")) for w in found["wrong"]]
    return _table(("call", "refused by", "what it says"), rows)


def _modelslim(found: dict[str, Any]) -> list[str]:
    rows = []
    for r in found["modelslim"]:
        plan = ", ".join(f"{n} {word}" for word, n in r["plan"].items())
        held = [f"{r[c]['within']} of {r[c]['outputs']}" if r[c]["outputs"] else "" for c in ("fp32", "bf16")]
        rule = f"{r['rule']:.2g}" if r["rule"] else ""
        rows.append((r["case"], r["arch"], plan, *held, rule))
    return _table(("case", "on", "layers in the plan", "fp32 within", "bf16 within", "distance by another rule"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, tuple("---" for _ in head), *rows)]
