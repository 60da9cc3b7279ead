"""The support matrix of docs/rocm.md, from the report that levels.py wrote.

    python backends/rocm/matrix.py build/conformance/rocm --page docs/rocm.md [--check]

A row is an operation with a format, as the suite asks them at level 0. A cell says who takes its cases there, and
the levels of evidence: L1 if a tile of every kernel and format of its family compiled for the chip, L2 if every
case passed interpreted. What gfx950 chooses as gfx942 does was interpreted once. Exit code 1: the page says something
else (--check).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_rocm.ops import RocmOps

ARCHS = ("gfx942", "gfx950")
FAMILIES = {"grouped_gemm": "grouped", "quant_kv": "kv", "vq_gemm": "vq", "vq_decode": "vq"}
"""Kernels of an operation, where their folder has another name."""
_MARKS = re.compile(r"(<!-- generated: support -->\n).*?(<!-- end -->)", re.DOTALL)


def table(out: Path) -> str:
    """The rows, from the folder of a run of all levels."""
    report = json.loads((out / "report.json").read_text())["levels"]
    whole = {c["id"]: c["status"] for c in json.loads((out / ARCHS[0] / "report.json").read_text())["cases"]}
    results = {ARCHS[0]: whole, ARCHS[1]: {**whole, **report["L2 interpreted"][ARCHS[1]]["cases"]}}
    spoiled = {tuple(line.split(":")[0].split(".")[0].split(" ")) for line in report["L1 compiles"]["bad"]}
    rows: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in catalogue(0):
        if case.operation != "contract":
            rows[case.operation, case.subject].append(case)
    lines = [f"| operation | format | {' | '.join(ARCHS)} |", f"| --- | --- |{' --- |' * len(ARCHS)}"]
    for (operation, subject), cases in rows.items():
        cells = (_cell(cases, arch, results[arch], spoiled) for arch in ARCHS)
        lines.append(f"| {operation} | `{subject}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(cases: list[Case], arch: str, results: dict[str, str], spoiled: set[tuple[str, ...]]) -> str:
    ops = RocmOps(arch, "meta")
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        request = OPERATIONS[case.operation].request(case)
        kernel = request is not None and ops._path(request) is not None
        found["kernel" if kernel else "portable"][results[case.id]] += 1
    family = FAMILIES.get(cases[0].operation, cases[0].operation)
    words = []
    for who, count in sorted(found.items()):
        levels = ["L1"] * (who == "kernel" and (arch, family) not in spoiled) + ["L2"] * (set(count) == {"pass"})
        passed = f"{count['pass']} of {count.total()}" if set(count) != {"pass"} else str(count.total())
        words.append(f"{who} {passed}: {' '.join(levels) or 'none'}")
    return "; ".join(words)


def main() -> int:
    """See the first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page says something else")
    given = parser.parse_args()
    rows, text = table(given.out), given.page.read_text()
    wanted = _MARKS.sub(lambda found: found[1] + rows + found[2], text)
    if given.check and wanted != text:
        print(f"{given.page}: the support matrix is not that of {given.out}; run this without --check", file=sys.stderr)
        return 1
    if not given.check:
        given.page.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
