"""The main job: a real model from its bf16 checkpoint through qhal's int4 to generated text, and what that costs.

    python examples/demo/demo.py [--cache build/demo] [--backend auto] [--json]

1. fetches SmolLM2-135M-Instruct and makes a bf16 Hugging Face checkpoint (model.py)
2. quantizes it with qhal to a standard compressed-tensors checkpoint
3. shows what the new checkpoint holds, and the plan: what the backend will really execute
4. loads it in transformers through qhal_engines.transformers.install(), and generates text
5. measures both checkpoints, each in a process of its own: perplexity, speed, load time, peak memory
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from model import DEFAULT_CACHE, answered, prepare
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import qhal
import qhal_schemes
from qhal_engines.measure import Worker

SKIP = 20_000  # characters of the text before the first window: front matter
DECODE_PROMPT = "The sun rose over the sea and"
ROWS = (
    ("perplexity", "perplexity", "{:.3f}", 1.0),
    ("decode, tokens/s", "decode_tokens_per_s", "{:.1f}", 1.0),
    ("prefill, tokens/s", "prefill_tokens_per_s", "{:.0f}", 1.0),
    ("load, s", "load_s", "{:.2f}", 1.0),
    ("peak memory while loading, MB", "load_peak_bytes", "{:.0f}", 1e-6),
    ("peak memory, MB", "peak_bytes", "{:.0f}", 1e-6),
    ("checkpoint on disk, MB", "disk_bytes", "{:.1f}", 1e-6),
)


def main() -> int:
    """Runs the demo; 0 if every step worked, 1 with one clear error if not."""
    arguments = parse()
    console = Console(stderr=arguments.json, highlight=False)
    return answered(lambda: run(arguments, console), arguments.json)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of downloads and results")
    parser.add_argument("--backend", default="auto", help="as for qhal.select")
    parser.add_argument("--format", default="int4_g32", help="weight format, as for qhal quantize")
    parser.add_argument("--prompt", default="What is the capital of France? Why do people like to visit it?")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--windows", type=int, default=6, help="windows of 512 tokens for the perplexity")
    parser.add_argument("--repeats", type=int, default=3, help="speed measurements of each model, alternating")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more help little on so small a model")
    parser.add_argument("--json", action="store_true", help="print the report as JSON; everything else goes to stderr")
    return parser.parse_args()


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All steps; returns the report."""
    started = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    step(console, 1, "the model")
    files = prepare(arguments.cache)
    prepared = time.perf_counter()
    console.print(f"bf16 checkpoint: {files.checkpoint}", soft_wrap=True)

    step(console, 2, f"quantize to {arguments.format}")
    quantized = arguments.cache / f"SmolLM2-135M-Instruct-{arguments.format}"
    seconds = quantize(files.checkpoint, quantized, arguments.format, console)
    console.print(f"{quantized} in {seconds:.1f} s", soft_wrap=True)

    step(console, 3, "the checkpoint and its plan")
    checkpoint = qhal_schemes.open_checkpoint(quantized)
    for line in inspect(checkpoint):
        console.print(line, markup=False)
    ops = select(arguments.backend, console)
    plan = qhal.resolve(checkpoint, ops, policy="error")
    console.print(plan.explain(), markup=False, soft_wrap=True)

    step(console, 4, "text")
    backend = ops.name if arguments.backend == "auto" else arguments.backend
    with (
        Worker(quantized, backend=backend, threads=arguments.threads) as ours,
        Worker(files.checkpoint, backend=None, threads=arguments.threads) as bf16,
    ):
        measured: dict[str, dict[str, float]] = {"int4": ours.load()}
        answer = speak(ours, arguments, console)
        step(console, 5, "measurements")
        measured["bf16"] = bf16.load()
        workers = {"bf16": bf16, "int4": ours}
        perplexities(workers, measured, files.text, arguments.windows, console)
        decode_speeds(workers, measured, arguments.repeats, console)
        for name, worker in workers.items():
            measured[name]["peak_bytes"] = worker.peak()
    for name, folder in (("bf16", files.checkpoint), ("int4", quantized)):
        measured[name]["disk_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    console.print(table(measured, arguments.format))
    total = time.perf_counter() - prepared
    console.print(f"backend {ops.name}, {arguments.threads} thread(s); all after the downloads took {total:.0f} s")
    return {
        "model": "SmolLM2-135M-Instruct",
        "format": arguments.format,
        "backend": ops.name,
        "threads": arguments.threads,
        "prepare_s": prepared - started,
        "quantize_s": seconds,
        "total_after_downloads_s": total,
        "prompt": arguments.prompt,
        "answer": answer,
        "measured": measured,
        "plan": json.loads(plan.explain("json")),
    }


def step(console: Console, number: int, title: str) -> None:
    """A heading."""
    console.rule(f"[bold]{number}. {title}", align="left")


def quantize(source: Path, out: Path, format: str, console: Console) -> float:
    """Writes the quantized checkpoint anew (an old one may stem from older code); returns seconds."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    with bar(console) as progress:
        task = progress.add_task("quantizing", total=None)

        def advance(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total)

        qhal_schemes.quantize_checkpoint(source, out, format, progress=advance)
    return time.perf_counter() - started


def select(spec: str, console: Console) -> qhal.QuantOps:
    """The backend; what it warns of is shown as a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ops = qhal.select(spec)
    for warning in caught:
        console.print(f"[yellow]note:[/] {warning.message}", soft_wrap=True)
    return ops


def inspect(checkpoint: qhal_schemes.Checkpoint) -> list[str]:
    """A few lines of what `qhal inspect` shows."""
    summary = checkpoint.summary()
    lines = [f"quantized by {summary['method']}, activations {summary['dtype']}"]
    for row in summary["formats"]:
        lines.append(
            f"  {row['modules']} linear layers, {row['weights'] / 1e6:.1f} M weights, {row['bytes'] / 1e6:.1f} MB: "
            f"weight {row['weight']}, input {row['input']}"
        )
    for row in summary["excluded"]:
        lines.append(f"  {len(row['modules'])} linear layers stay plain: {row['rule']}")
    totals = summary["totals"]
    lines.append(
        f"  {totals['tensors']} tensors: {totals['consumed']} of quantized layers, {totals['plain']} plain, "
        f"{totals['extra']} not needed"
    )
    return lines


def speak(worker: Worker, arguments: argparse.Namespace, console: Console) -> str:
    """Streams the answer to the prompt."""
    console.print(f"[bold]> {arguments.prompt}")
    made = worker.generate(
        arguments.prompt,
        tokens=arguments.tokens,
        stop=True,
        on_event=lambda event: console.print(event["text"], end="", markup=False, soft_wrap=True),
    )
    console.print()
    return str(made["text"])


def perplexities(
    workers: dict[str, Worker], measured: dict[str, dict[str, float]], text: Path, windows: int, console: Console
) -> None:
    """Adds perplexity and prefill speed."""
    with bar(console) as progress:
        for name, worker in workers.items():
            task = progress.add_task(f"perplexity, {name}", total=windows)

            def advance(event: dict[str, Any], task: TaskID = task) -> None:
                progress.update(task, completed=event["window"])

            found = worker.perplexity(text, skip=SKIP, windows=windows, on_event=advance)
            measured[name].update(perplexity=found["perplexity"], prefill_tokens_per_s=found["tokens_per_s"])


def decode_speeds(
    workers: dict[str, Worker], measured: dict[str, dict[str, float]], repeats: int, console: Console
) -> None:
    """Adds the median decode speed; the models take turns, so that a busy machine slows both."""
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    with bar(console) as progress:
        task = progress.add_task("decode speed", total=repeats * len(workers))
        for _ in range(repeats):
            for name, worker in workers.items():
                made = worker.generate(DECODE_PROMPT, tokens=32, chat=False)
                speeds[name].append(made["decode_tokens_per_s"])
                progress.advance(task)
    for name, values in speeds.items():
        measured[name]["decode_tokens_per_s"] = statistics.median(values)


def table(measured: dict[str, dict[str, float]], format: str) -> Table:
    """The result: one row per quantity, with the ratio of int4 to bf16."""
    result = Table(title=f"SmolLM2-135M-Instruct on this machine, {format} with qhal against bf16")
    result.add_column("")
    for title in ("bf16", format, "ratio"):
        result.add_column(title, justify="right")
    for title, key, shape, unit in ROWS:
        one, two = measured["bf16"][key], measured["int4"][key]
        result.add_row(title, shape.format(one * unit), shape.format(two * unit), f"{two / one:.2f}")
    return result


@contextlib.contextmanager
def bar(console: Console) -> Iterator[Progress]:
    """A progress bar that disappears when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


if __name__ == "__main__":
    sys.exit(main())
