"""Quantizing: GB/s of bf16 input, and the memory beside the result while a checkpoint is quantized on the way in.

    python benchmarks/quantize_speed.py [--json] [--rows N] [--columns K] [--threads 1 2] [--repeat N]

Bars: at least 0.5 GB/s for int8 rows and fp8 per token with the most threads; beside what the quantized modules keep,
at most twice the largest module's weight in bf16: its own pages of the mapped file, and as much for temporaries on the
grid of scales. Beside the speeds stands the floor, a clone of the same bytes. Best of several turns that go round the
formats. One thread is measured in processor time, which other programs hardly change, several on the clock.
Exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from load_memory import checkpoint, resident

from qhal import Format
from qhal.encoding import encode
from qhal_schemes import open_checkpoint
from qhal_schemes.quantizing import resolve_format

BAR_GB_S = 0.5
TOKEN = "e4m3fn.row*bf16@arith=bf16"
FORMATS = ("int8", "fp8_row", TOKEN, "fp8", "fp8_block", "int4_g32", "uint4_g32", "mxfp8", "mxfp4", "nvfp4")
HELD = ("int8", "fp8_row", TOKEN)
ONLINE = ("int8", "fp8_row", "int4_g32", "nvfp4")


def speeds(rows: int, columns: int, threads: int, repeat: int) -> dict[str, float]:
    """GB/s by format; "clone" is the floor."""
    torch.set_num_threads(threads)
    x = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16()
    runs: dict[str, Callable[[], object]] = {"clone": x.clone}
    runs |= {name: partial(encode, x, weight_format(name)) for name in FORMATS}
    clock = time.process_time if threads == 1 else time.perf_counter
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(repeat + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:  # the first turn warms up
                best[name] = min(best[name], clock() - start)
    return {name: x.nbytes / seconds / 1e9 for name, seconds in best.items()}


def weight_format(name: str) -> Format:
    return Format.parse(name) if "*" in name else resolve_format(name, torch.bfloat16).weight


def memory(folder: Path, name: str) -> dict[str, int]:
    """Quantize every module of a checkpoint and keep them; bytes. Runs in a fresh process."""
    torch.set_num_threads(1)
    ckpt = open_checkpoint(folder, quantize=name)
    modules = ckpt.modules(quantized=True)
    ckpt.spec(min(modules, key=lambda m: ckpt.format(m).n * ckpt.format(m).k))
    before = resident("VmRSS")
    weights = [ckpt.spec(module).weight for module in modules]
    extra = resident("VmHWM") - before - sum(w.nbytes for w in weights)
    return {"extra": extra, "largest": max(ckpt.format(m).n * ckpt.format(m).k for m in modules) * 2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the checkpoint for the memory")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(memory(Path(options.child[0]), options.child[1])))
        return 0
    speed = {n: speeds(options.rows, options.columns, n, options.repeat) for n in options.threads}
    bars: dict[str, Any] = {
        f"{name}, {max(speed)} threads": {
            "value": speed[max(speed)][name],
            "holds": speed[max(speed)][name] >= BAR_GB_S,
        }
        for name in HELD
    }
    folder = checkpoint(None, options.layers)
    for name in ONLINE:
        command = [sys.executable, __file__, "--child", str(folder), name]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        bars[f"memory, {name}"] = {**found, "holds": found["extra"] <= 2 * found["largest"]}
    if options.json:
        print(json.dumps({"gb_per_s": speed, "bars": bars}, indent=2))
    else:
        report(speed, bars)
    return 0 if all(bar["holds"] for bar in bars.values()) else 1


def report(speed: dict[int, dict[str, float]], bars: dict[str, Any]) -> None:
    print(f"{'GB/s of bf16 input':30}" + "".join(f"{f'{n} threads':>12}" for n in speed))
    for name in ("clone", *FORMATS):
        print(f"{name:30}" + "".join(f"{found[name]:12.2f}" for found in speed.values()))
    print()
    for name, bar in bars.items():
        if "extra" in bar:
            text = f"{bar['extra'] / 1e6:.1f} MB beside the result, bar {2 * bar['largest'] / 1e6:.1f} MB"
        else:
            text = f"{bar['value']:.2f} GB/s, bar {BAR_GB_S}"
        print(f"{'ok' if bar['holds'] else 'MISSED':7}{name}: {text}")


if __name__ == "__main__":
    sys.exit(main())
