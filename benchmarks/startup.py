"""Start-up cost: `import qhal` after torch (bar 50 ms), and `resolve` on 10,000 linears (bar 1 s).

    python benchmarks/startup.py [--json]

Exits with 1 if a bar is missed. Import times are medians over fresh processes; the floor is an empty statement.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

import qhal
from qhal import Format, LinearFormat

IMPORT_BAR_MS = 50.0
RESOLVE_BAR_S = 1.0
LINEARS = 10_000


class Model:
    """Ten thousand linears of many shapes and four formats, as a checkpoint would describe them."""

    dtype = torch.bfloat16

    def layer_formats(self) -> list[LinearFormat]:
        weights = [Format.parse(n) for n in ("int4_g128", "e4m3fn.row*bf16", "mxfp4", "uint4-uint4.g128*bf16")]
        inputs = [None, Format.parse("e4m3fn.row*fp32"), Format.parse("mxfp8"), None]
        return [
            LinearFormat(f"model.layers.{i // 7}.m{i % 7}", 128 * (1 + i % 50), 4096, weights[i % 4], inputs[i % 4])
            for i in range(LINEARS)
        ]


def import_ms(runs: int) -> float:
    """Median milliseconds of `import qhal` in a process that has imported torch, byte code cached as pip leaves it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    script = "import torch, time; t = time.perf_counter(); import qhal; print(time.perf_counter() - t)"
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
            ).stdout
        )
        for _ in range(runs + 1)
    ]
    return 1e3 * statistics.median(seconds[1:])  # the first run may have compiled


def resolve_s(runs: int) -> tuple[float, int]:
    """Median seconds of `resolve`, and how many distinct plan entries came out."""
    ops, model = qhal.select("cpu_reference"), Model()
    seconds, entries = [], 0
    for _ in range(runs):
        start = time.perf_counter()
        entries = len(qhal.resolve(model, ops, policy="report").entries)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), entries


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--runs", type=int, default=5)
    options = arguments.parse_args()
    imported = import_ms(options.runs)
    resolved, entries = resolve_s(options.runs)
    rows = [
        {"what": "import qhal after torch, ms", "value": imported, "bar": IMPORT_BAR_MS},
        {"what": f"resolve {LINEARS} linears ({entries} entries), s", "value": resolved, "bar": RESOLVE_BAR_S},
    ]
    for row in rows:
        row["ratio"] = row["value"] / row["bar"]  # type: ignore[operator]
        row["ok"] = row["value"] <= row["bar"]  # type: ignore[operator]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            state = "ok" if row["ok"] else "MISSED"
            print(f"{row['what']:48} {row['value']:8.3f}   bar {row['bar']:6.1f}   ratio {row['ratio']:.2f}   {state}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
