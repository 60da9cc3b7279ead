"""Whole models: a random one of 7 billion parameters, or the demo's, in every weight format and every cache format.

    python benchmarks/cuda_model.py [--rows PREFIX ...] [--seconds S] [--jobs N] [--gpus N] [--out FILE] [--json]
    python benchmarks/cuda_model.py --demo FOLDER --text FILE

Prints, for every row, how long preparing took, what the weights take, decoded tokens per second with 1, 16 and 64
sequences at 1024 tokens in a captured graph that is planned anew for every token, tokens per second of a prompt of
2048, and how far the last hidden state is from its definition (relative RMS). Ratios are to torch's own bf16 products.
Sizes may be changed; tokens per second of another model than the whole one are marked so. --jobs compiles the kernels
of all rows in that many processes first. --gpus shares the rows out to so many GPUs, each of which measures the
baseline too. --demo measures perplexity and eager decoding in transformers instead. Without a device of the backend
nothing is run.
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
from model_rows.measure import GIB, Runner
from model_rows.rows import BASE, ROWS, Row
from model_rows.shape import Shape
from rich.console import Console
from rich.table import Table

import qhal
from qhal.errors import BackendError, QhalError

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
        if arguments.demo is not None:
            console.print(demo.run(arguments, console, keep))
        else:
            (shared if arguments.gpus > 1 else random_model)(arguments, console, keep)
            if arguments.part is None:
                console.print(_table(report["rows"], arguments))
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
    parser.add_argument("--gpus", type=int, default=1, help="rows are shared out to so many [1]")
    parser.add_argument("--part", type=_part, metavar="I/N", help="every Nth row from the Ith, and no table")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="a bf16 checkpoint, for transformers")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text for its perplexity")
    parser.add_argument("--windows", type=int, default=6, help="windows of 512 tokens of it")
    for size in SIZES:
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, default=size.default)
    parser.add_argument("--batches", nargs="+", type=int, default=list(Shape.batches))
    arguments = parser.parse_args()
    if arguments.demo is not None and arguments.text is None:
        parser.error("--demo needs --text")
    if arguments.gpus > 1 and (arguments.demo is not None or arguments.part is not None):
        parser.error("--gpus shares out the rows of the random model, so it goes with neither --demo nor --part")
    known = demo.NAMES if arguments.demo is not None else [row.name for row in ROWS]
    nothing = [p for p in arguments.rows if not any(name.startswith(p) for name in known)]
    if nothing:
        parser.error(f"--rows {' '.join(nothing)}: no row begins so; --list names those of the random model")
    return arguments


def _shape(arguments: argparse.Namespace) -> Shape:
    return Shape(batches=tuple(arguments.batches), **{f.name: getattr(arguments, f.name) for f in SIZES})


def _facts(backend: str) -> dict[str, Any]:
    return facts() if backend.startswith("cuda") else {"gpu": None, "backend": backend, "torch": torch.__version__}


def random_model(arguments: argparse.Namespace, console: Console, keep: Callable[[dict[str, Any]], None]) -> None:
    """Every row measured and shown as it comes."""
    shape, wanted = _shape(arguments), _wanted(arguments)
    if arguments.jobs:
        warm([row.name for row in wanted], arguments.jobs, console)
    runner = Runner(qhal.select(arguments.backend), shape)
    base: dict[str, Any] | None = None
    start = time.monotonic()
    for i, row in enumerate(wanted):
        began = time.monotonic()
        if arguments.seconds and began - start > arguments.seconds:
            console.print(f"not run, {arguments.seconds} s are over: {' '.join(r.name for r in wanted[i:])}")
            break
        found = asdict(runner.run(row))
        base = found if row is BASE else base
        keep(found)
        took = f"{time.monotonic() - began:5.1f} s"
        speeds = "  ".join(_speeds(found, base, shape.batches))
        console.print(f"{row.name:24} {took}  {speeds}  error {_error(found)}  {found['note']}", soft_wrap=True)


def shared(arguments: argparse.Namespace, console: Console, keep: Callable[[dict[str, Any]], None]) -> None:
    """The rows of `arguments.gpus` processes, a GPU each; the baseline is kept once."""
    count = arguments.gpus
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if arguments.backend == "cuda" and len(devices) < count:
        raise BackendError(f"--gpus {count}: {len(devices)} are visible here; ask for fewer")
    asked = [a for a in sys.argv[1:] if a != "--json"]

    def one(i: int) -> dict[str, Any]:
        command = [sys.executable, __file__, *asked, "--gpus", "1", "--part", f"{i + 1}/{count}", "--json"]
        command += ["--jobs", str(-(-arguments.jobs // count)), "--out", os.devnull]
        environment = os.environ | {"OUT": ""} | ({"CUDA_VISIBLE_DEVICES": devices[i]} if devices else {})
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if not done.stdout:
            raise BackendError(f"the rows of part {i + 1}/{count} ended with code {done.returncode}; it says why above")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    with ThreadPoolExecutor(count) as pool:
        rows = {row["row"]: row for found in pool.map(one, range(count)) for row in found["rows"]}
    for wanted in _wanted(arguments):
        if wanted.name in rows:
            keep(rows[wanted.name])


def _wanted(arguments: argparse.Namespace) -> list[Row]:
    """The baseline, then the rows of this part."""
    named = [row for prefix in arguments.rows for row in ROWS if row.name.startswith(prefix) and row is not BASE]
    first, step = arguments.part or (1, 1)
    return [BASE, *list(dict.fromkeys(named))[first - 1 :: step]]


def _part(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} is no part; 2/4 is the second of four")
    return int(first), int(count)


def _table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> Table:
    shape = _shape(arguments)
    table = Table("row", "bits", "prepare s", "weights GiB", "peak GiB", *(f"decode b{b}" for b in shape.batches),
                  "prefill", "error %", "executes", title=_title(shape, arguments.backend))  # fmt: skip
    for column in table.columns[1:-1]:
        column.justify = "right"
    base = next((row for row in rows if row["row"] == BASE.name), None)
    for row in rows:
        words = row["note"] or (row["executes"] if row["row"].startswith("w/") else row["attention"])[:60]
        sizes = (f"{row['weights'] / GIB:.2f}", f"{row['peak'] / GIB:.2f}")
        prepared = f"{row['seconds'].get('prepare', 0):.1f}"
        speeds = _speeds(row, base, shape.batches)
        table.add_row(row["row"], f"{row['bits']:.2f}", prepared, *sizes, *speeds, _error(row), words)
    return table


def _speeds(row: dict[str, Any], base: dict[str, Any] | None, batches: tuple[int, ...]) -> list[str]:
    """Tokens per second, and how many times as many as the baseline's. Keys of a row that was JSON are text."""

    def of(one: dict[str, Any] | None, batch: int) -> float | None:
        return None if one is None else one["decode"].get(batch, one["decode"].get(str(batch)))

    found = [_ratio(of(row, b), of(base, b)) for b in batches]
    return [*found, _ratio(row["prefill"], None if base is None else base["prefill"])]


def _error(row: dict[str, Any]) -> str:
    return "-" if row["error"] is None else " ".join(f"{100 * e:.2f}" for e in row["error"])


def _title(shape: Shape, backend: str) -> str:
    words = f"{shape.layers} layers of {shape.hidden}, tokens per second (x torch bf16), backend {backend}"
    return words if shape.whole else f"{words}: NOT the model of 7 billion parameters"


def _ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if not base else f"{value:.0f} ({value / base:.2f})"


def warm(names: list[str], jobs: int, console: Console) -> None:
    """Every row with one layer, in so many processes: Triton keeps what it compiles on disk."""
    began = time.monotonic()
    asked = [a for a in sys.argv[1:] if a != "--json"]
    script = [sys.executable, __file__, *asked, "--jobs", "0", "--seconds", "0", "--layers", "1", "--part", "1/1"]

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
