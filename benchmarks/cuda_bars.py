"""Bars of the NVIDIA backend: every row runs through `ops` in a captured graph beside the best libraries, one process.

    python benchmarks/cuda_bars.py [--rows PREFIX ...] [--list] [--out FILE] [--without PEER ...]
    python benchmarks/cuda_bars.py --check FILE

Prints our time, the best peer of the same arithmetic, the ratio, and the share of the floor; --out (default
$OUT/bench.json if OUT is set) writes all of it as JSON. Without a GPU nothing is run. --check needs none: it holds a
written file against `bars.json`, prints MISSED rows and exits 0 only if there is none.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cuda_rows import GROUPS, Bench, Measured
from cuda_rows.bars import missed

PACKAGES = ("torch", "triton", "flashinfer-python", "humming-kernels")
_STATED = 80


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[""], metavar="PREFIX", help="rows whose name begins so")
    parser.add_argument("--list", action="store_true", help="the names of all rows")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="PEER", help="peers whose name begins so: not measured"
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--check", type=Path, metavar="FILE", help="judge a written file; needs no GPU")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(row for group in GROUPS for row in group.rows))
        return 0
    if arguments.check is not None:
        return check(arguments.check)
    if not torch.cuda.is_available():
        print("not run: no NVIDIA GPU here; --check FILE judges a written run, --list names the rows", file=sys.stderr)
        return 0
    out = arguments.out or (Path(os.environ["OUT"]) / "bench.json" if os.environ.get("OUT") else None)
    rows = measure(arguments.rows, arguments.without)
    result = {"device": facts(), "rows": [asdict(r) | {"best": r.best()} for r in rows]}
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {out}")
    return 0


def facts() -> dict[str, Any]:
    """GPU, driver, versions, commit and kernels that the figures belong to."""
    import pynvml

    from qhal_triton.tuning import sources

    pynvml.nvmlInit()
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    found |= {"driver": str(pynvml.nvmlSystemGetDriverVersion()), "kernels": sources(), "commit": commit()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Of the folder that this file is in, with a "+" where its files are others; None outside of a repository."""

    def git(*words: str) -> str:
        asked = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None


def measure(prefixes: list[str], without: list[str]) -> list[Measured]:
    """The rows whose names begin with one of these, printed as they come."""
    import qhal

    bench = Bench(qhal.select("cuda"), without)
    rows: list[Measured] = []
    heading = f"{'row':34}{'us':>9}{'best peer':>24}{'us':>9}{'ratio':>7}{'floor %':>8}"
    groups = {g: w for g in GROUPS if (w := [row for row in g.rows if row.startswith(tuple(prefixes))])}
    began = time.monotonic()
    bench.compile(list(groups))
    print(f"{bench.gpu}, peers compiled in {time.monotonic() - began:.0f} s\n{heading}", flush=True)
    for group, wanted in groups.items():
        began = time.monotonic()
        try:
            for row in group.run(bench, wanted):
                rows.append(row)
                print(shown(row), flush=True)
        except Exception as error:  # one group that breaks must not take the others with it; its rows are missing then
            print(f"{wanted[0]}: the group broke: {type(error).__name__}: {error}", flush=True)
        gc.collect()
        if torch.cuda.memory_reserved() > torch.cuda.get_device_properties(0).total_memory // 2:
            torch.cuda.empty_cache()
        print(f"  ({time.monotonic() - began:.0f} s)", flush=True)
    return rows


def shown(r: Measured) -> str:
    """One line; reasons in short below it."""
    best, us = r.best(), f"{r.us:9.1f}" if r.us is not None else f"{'-':>9}"
    line = f"{r.row:34}{us}"
    if best is not None:
        ratio = f"{r.us / best[1]:7.2f}" if r.us else f"{'-':>7}"
        line += f"{best[0]:>24}{best[1]:9.1f}{ratio}"
    else:
        line += f"{'no peer':>24}{'-':>9}{'-':>7}"
    line += f"{100 * r.floor_us / r.us:8.0f}" if r.us and r.floor_us else f"{'-':>8}"
    line += f"  {r.note[:_STATED]}" if r.note else ""
    for name, peer in r.peers.items():
        if name in r.looser and isinstance(peer, float):
            line += f"\n    {name} {peer:.1f} us, not judged: {r.looser[name]}"
        elif not isinstance(peer, float):
            line += f"\n    {name}: {peer[:160]}"
    return line


def check(path: Path) -> int:
    """0 only if every bar is there and holds."""
    found = json.loads(path.read_text())
    misses = missed(found)
    for row, why in misses:
        print(f"MISSED {row}: {why}")
    print("every bar holds" if not misses else f"{len(misses)} bars missed ({found['device'].get('gpu')})")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
