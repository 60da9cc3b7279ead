"""What would run of real checkpoints on AMD GPUs, planned with none of them here.

    python backends/rocm/plans.py GOLDEN_FOLDER ... [--page docs/rocm.md]

native     a kernel whose matrix instructions take the codes as they are: int8, fp8
in 16 bits a kernel that decodes codes in registers and multiplies 16-bit floats; where both operands are quantized,
           exactly: a chip's instructions do not take them, or their scales are too close
exact      a kernel that multiplies nothing
portable   the portable operation in float64: right, and slow
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import qhal
from qhal.plan import PlanEntry
from qhal.requests import GemmRequest, GroupedRequest
from qhal_engines.kv_plan import plan_with_caches
from qhal_rocm.ops import RocmOps
from qhal_schemes import open_checkpoint
from qhal_triton.gemm.paths import plan as product_plan

ARCHS = ("gfx942", "gfx950")
_NO_CHECKPOINTS = ("rotations/fht_reference", "rotations/quarot_hadamard_sizes")
"""Fixtures of operators among the golden cases."""


def checkpoints(root: Path) -> Iterator[tuple[str, Path]]:
    """(family/case, folder) of every checkpoint below a folder of golden cases."""
    for folder in sorted(root.glob("*/*/checkpoint")):
        name = f"{folder.parent.parent.name}/{folder.parent.name}"
        if name not in _NO_CHECKPOINTS:
            yield name, folder


def planned(folder: Path, arch: str) -> qhal.Plan:
    """The plan on a chip that is not here, whatever it refuses."""
    return plan_with_caches(open_checkpoint(folder), qhal.select("rocm", arch=arch), "report")


def kind(entry: PlanEntry, ops: RocmOps) -> str:
    """native, in 16 bits, exact, portable or refused."""
    if entry.status == "refused":
        return f"refused: {entry.support.reason}"
    if ops._path(entry.request) is None:
        return "portable"
    request = entry.request.gemm if isinstance(entry.request, GroupedRequest) else entry.request
    if not isinstance(request, GemmRequest):
        return "exact"
    made = product_plan(request, ops._target)
    types = {"16 bits"} if made is None else {s.type if s.type in ("int8", "fp8") else "16 bits" for s in made.specs}
    return " and ".join(f"native {t}" if t != "16 bits" else "in 16 bits" for t in sorted(types))


def row(case: str, folder: Path) -> str:
    """One line of the table."""
    cells = []
    for arch in ARCHS:
        ops = RocmOps(arch, "meta")
        count = Counter(kind(entry, ops) for entry in planned(folder, arch).entries)
        cells.append(", ".join(f"{number} {what}" for what, number in sorted(count.items())))
    return f"| `{case}` | {' | '.join(cells)} |"


def main() -> None:
    """See the first lines. With --page the table is written between the page's marks, else printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="+", type=Path, metavar="GOLDEN_FOLDER")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    lines = [f"| checkpoint | {' | '.join(ARCHS)} |", f"| --- |{' --- |' * len(ARCHS)}"]
    found = {case: folder for root in given.roots for case, folder in checkpoints(root)}
    lines += [row(case, folder) for case, folder in sorted(found.items())]
    if given.page is None:
        print("\n".join(lines))
        return
    marks = re.compile(r"(<!-- generated: plans -->\n).*?(<!-- end -->)", re.DOTALL)
    text = given.page.read_text()
    table = "\n".join(lines) + "\n"
    given.page.write_text(marks.sub(lambda found: found[1] + table + found[2], text))


if __name__ == "__main__":
    main()
