"""`python -m qhal_triton.page CELLS.json ... > docs/kernels.md`: the compile matrices as a page.

Each file is what `python -m qhal_triton.compile --json` wrote: one Triton, some chips. Nothing is compiled here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_HEAD = """# Kernels, compiled

Level L1: every kernel of `qhal-triton`, for each format it takes, compiled for chips that were not there. It shows that
the compilers accept it, that it fits, and which matrix instructions it becomes; not that it is right, nor fast.
Generated from the cells of `make compile-full` (every tile), or of `make conformance-rocm` and `make cuda-offline` (one
for each kernel and format, as CI compiles): `python -m qhal_triton.page CELLS.json ...`; do not edit.

A cell has registers per thread (AMD: accumulation registers included), kilobytes of shared memory per program, and the
matrix instruction; a spill would be named. "-": on this chip no kernel takes the format. Of 8-bit floats `gfx942` has
the fnuz flavours, `gfx950` and `gfx1201` have OCP's, `sm_80` none. Operands that a chip's instructions do not take are
decoded to 16 bits, exactly, and the cell shows the 16-bit instruction; those of NVIDIA and of gfx1201 take no fp32
operands, whose cells show none.
"""


def page(files: Sequence[Path]) -> str:
    """The whole page."""
    parts = [_HEAD]
    for file in files:
        report = json.loads(file.read_text())
        parts.append("\n".join(_section(report)))
    return "\n".join(parts)


def _section(report: dict[str, Any]) -> Iterator[str]:
    archs, cells = report["archs"], report["cells"]
    good = sum(not cell["problems"] for cell in cells)
    yield f"## {', '.join(archs)}: Triton {report['triton']}\n"
    which = "every tile" if report["full"] else "one tile for every kernel and format"
    yield f"{good} of {len(cells)} cells hold ({which}).\n"
    families: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for cell in cells:
        family, _, tile = cell["name"].partition(".")
        families.setdefault(family, {}).setdefault(tile, {})[cell["arch"]] = cell
    for family, tiles in families.items():
        yield f"| {family} | {' | '.join(archs)} |"
        yield "| --- |" + " --- |" * len(archs)
        for tile, found in tiles.items():
            yield f"| `{tile}` | {' | '.join(_cell(found.get(arch)) for arch in archs)} |"
        yield ""


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if cell["problems"]:
        return f"**{'; '.join(cell['problems'])}**".replace("|", "/")
    shared = f"{-(-cell['shared'] // 1024)} K"
    used = "".join(f", `{_short(name)}`" for name in sorted(cell["instructions"], key=len)[:1])
    spilled = f", {cell['spills']} spilled" if cell["spills"] else ""
    return f"{cell['registers']}, {shared}{spilled}{used}"


def _short(name: str) -> str:
    return name.removeprefix("v_").removeprefix("wgmma.mma_async.").replace("tcgen05.mma.kind::", "tcgen05 ")


if __name__ == "__main__":
    sys.stdout.write(page([Path(name) for name in sys.argv[1:]]))
