"""Whole models: a random one of 7 billion parameters, or the demo's, in every weight format and every cache format.

    python benchmarks/cuda_model.py [--rows PREFIX ...] [--seconds S] [--jobs N] [--out FILE] [--json] [--list]
    python benchmarks/cuda_model.py --demo FOLDER --text FILE

Prints, for every row, how long preparing took, what the weights take, decoded tokens per second with 1, 16 and 64
sequences at 1024 tokens in a captured graph that is planned anew for every token, tokens per second of a prompt of
2048, and how far the last hidden state is from its definition (relative RMS). Ratios are to torch's own bf16 products.
Sizes may be changed; tokens per second of another model than the whole one are marked so. --jobs compiles the kernels
of all rows in that many processes first. --demo measures perplexity and eager decoding in transformers instead.
Without a device of the backend nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a few small kernels: no pool of processes for them
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from cuda_bars import facts
from model_rows import demo
from model_rows.measure import GIB, Measured, Runner
from model_rows.rows import BASE, ROWS
from model_rows.shape import Shape
from rich.console import Console
from rich.table import Table

import qhal
from qhal.errors import QhalError

SIZES = [f for f in fields(Shape) if f.type == "int"]


def main() -> int:
    arguments = parse()
    console = Console(stderr=arguments.json, highlight=False, width=None if sys.stdout.isatty() else 180)
    if arguments.list:
        print("\n".join(row.name for row in ROWS))
        return 0
    if arguments.backend == "cuda" and not torch.cuda.is_available():
        print("not run: no NVIDIA GPU here; --backend cpu_reference with small sizes runs the same", file=sys.stderr)
        return 0
    out = arguments.out or (Path(os.environ["OUT"]) / "model.json" if os.environ.get("OUT") else None)
    report: dict[str, Any] = {"device": _facts(arguments.backend), "rows": []}
    if arguments.demo is None:
        report["shape"] = asdict(_shape(arguments))

    def keep(row: dict[str, Any]) -> None:
        """Written after every row, so that a run that ends early leaves what it measured."""
        report["rows"].append(row)
        if out is not None:
            out.write_text(json.dumps(report, indent=1) + "\n")

    try:
        console.print(demo.run(arguments, console, keep) if arguments.demo else random_model(arguments, console, keep))
    except QhalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if out is not None:
        console.print(f"written: {out}")
    if arguments.json:
        print(json.dumps(report, indent=1))
    failed = [row["row"] for row in report["rows"] if row["note"]]
    for name in failed:
        console.print(f"not whole: {name}")
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[""], metavar="PREFIX", help="rows whose name begins so, in order")
    parser.add_argument("--seconds", type=int, default=0, help="no row begins later, compiling aside [0: no limit]")
    parser.add_argument("--list", action="store_true", help="the names of all rows")
    parser.add_argument("--backend", default="cuda", help="as for qhal.select")
    parser.add_argument("--out", type=Path, help="where the JSON goes [$OUT/model.json if OUT is set]")
    parser.add_argument("--json", action="store_true", help="print the JSON; everything else goes to stderr")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile first [0: none]")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="a bf16 checkpoint, for transformers")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text for its perplexity")
    parser.add_argument("--windows", type=int, default=6, help="windows of 512 tokens of it")
    for size in SIZES:
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, default=size.default)
    parser.add_argument("--batches", nargs="+", type=int, default=list(Shape.batches))
    arguments = parser.parse_args()
    if arguments.demo is not None and arguments.text is None:
        parser.error("--demo needs --text")
    known = demo.NAMES if arguments.demo is not None else [row.name for row in ROWS]
    nothing = [p for p in arguments.rows if not any(name.startswith(p) for name in known)]
    if nothing:
        parser.error(f"--rows {' '.join(nothing)}: no row begins so; --list names those of the random model")
    return arguments


def _shape(arguments: argparse.Namespace) -> Shape:
    return Shape(batches=tuple(arguments.batches), **{f.name: getattr(arguments, f.name) for f in SIZES})


def _facts(backend: str) -> dict[str, Any]:
    return facts() if backend.startswith("cuda") else {"gpu": None, "backend": backend, "torch": torch.__version__}


def random_model(arguments: argparse.Namespace, console: Console, keep: Callable[[dict[str, Any]], None]) -> Table:
    """Every row measured and shown as it comes; the table of all."""
    shape = _shape(arguments)
    named = [row for prefix in arguments.rows for row in ROWS if row.name.startswith(prefix)]
    wanted = list(dict.fromkeys([BASE, *named]))
    if arguments.jobs:
        warm([row.name for row in wanted], arguments.jobs, console)
    runner = Runner(qhal.select(arguments.backend), shape)
    table = Table("row", "bits", "prepare s", "weights GiB", "peak GiB", *(f"decode b{b}" for b in shape.batches),
                  "prefill", "error %", "executes", title=_title(shape, runner.ops.name))  # fmt: skip
    for column in table.columns[1:-1]:
        column.justify = "right"
    base, start = Measured(""), time.monotonic()
    for i, row in enumerate(wanted):
        began = time.monotonic()
        if arguments.seconds and began - start > arguments.seconds:
            console.print(f"not run, {arguments.seconds} s are over: {' '.join(r.name for r in wanted[i:])}")
            break
        found = runner.run(row)
        base = found if row is BASE else base
        keep(asdict(found))
        speeds = [_ratio(found.decode.get(b), base.decode.get(b)) for b in shape.batches]
        speeds.append(_ratio(found.prefill, base.prefill))
        error = "-" if found.error is None else " ".join(f"{100 * e:.2f}" for e in found.error)
        words = found.note or (found.executes if row.kv == "bf16" else found.attention)[:60]
        sizes = (f"{found.weights / GIB:.2f}", f"{found.peak / GIB:.2f}")
        table.add_row(
            row.name, f"{found.bits:.2f}", f"{found.seconds.get('prepare', 0):.1f}", *sizes, *speeds, error, words
        )
        took = f"{time.monotonic() - began:5.1f} s"
        console.print(f"{row.name:24} {took}  {'  '.join(speeds)}  error {error}  {found.note}", soft_wrap=True)
    return table


def _title(shape: Shape, backend: str) -> str:
    words = f"{shape.layers} layers of {shape.hidden}, tokens per second (x torch bf16), backend {backend}"
    return words if shape.whole else f"{words}: NOT the model of 7 billion parameters"


def _ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if not base else f"{value:.0f} ({value / base:.2f})"


def warm(names: list[str], jobs: int, console: Console) -> None:
    """Every row with one layer, in so many processes: Triton keeps what it compiles on disk."""
    began = time.monotonic()
    asked = [a for a in sys.argv[1:] if a != "--json"]
    script = [sys.executable, __file__, *asked, *["--jobs", "0", "--seconds", "0", "--layers", "1"]]

    def one(some: list[str]) -> None:
        command = [*script, "--out", os.devnull, "--rows", *some]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OUT": ""})
        if done.returncode:
            console.print(f"compiling {' '.join(some)}: {(done.stdout + done.stderr)[-300:]}", soft_wrap=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [names[i::jobs] for i in range(min(jobs, len(names)))]))
    console.print(f"compiled in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
