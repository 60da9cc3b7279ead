"""One quantized file, two runtimes in one run: transformers + compressed-tensors against transformers + qhal.

    python benchmarks/demo_vs_peer.py [FOLDER] [--text FILE] [--backend auto] [--repeats 7] [--json]

FOLDER is any checkpoint both can read; the default is the demo's (`make demo` makes it). Every runtime is a process of
its own; decode speed is measured in turns (A B, B A, ...), and the ratios are medians of the ratios of the turns. The
bar is on the clock, so run it on an idle machine; tokens per second of processor time, which other programs hardly
change, stand beside it. Bars: perplexity equal to four digits, decode ratio at least 1, and peak memory while loading
at most 1.25 times what the loaded model keeps plus its largest module.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from qhal.errors import QhalError
from qhal_engines.measure import Worker

CACHE = Path(__file__).resolve().parents[1] / "build" / "demo"
PROMPT = "The sun rose over the sea and"
PEER, OURS = "compressed-tensors", "qhal"
SPEEDS = ("decode_tokens_per_s", "decode_tokens_per_cpu_s")
ROWS = (
    ("perplexity", "perplexity", "{:.4f}", 1.0),
    ("decode, tokens/s (median)", "decode_tokens_per_s", "{:.2f}", 1.0),
    ("decode, tokens/CPU s (median)", "decode_tokens_per_cpu_s", "{:.2f}", 1.0),
    ("prefill, tokens/s", "prefill_tokens_per_s", "{:.0f}", 1.0),
    ("load, s", "load_s", "{:.2f}", 1.0),
    ("load and first forward, s", "ready_s", "{:.2f}", 1.0),
    ("memory before loading, MB", "before_bytes", "{:.0f}", 1e-6),
    ("peak while loading, MB", "load_peak_bytes", "{:.0f}", 1e-6),
    ("resident after loading, MB", "after_bytes", "{:.0f}", 1e-6),
    ("the model's tensors, MB", "model_bytes", "{:.0f}", 1e-6),
    ("peak with first forward, MB", "first_forward_peak_bytes", "{:.0f}", 1e-6),
    ("peak at the end, MB", "peak_bytes", "{:.0f}", 1e-6),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=CACHE / "SmolLM2-135M-Instruct-int4_g32")
    parser.add_argument("--text", type=Path, default=CACHE / "newton-opticks.txt")
    parser.add_argument("--skip", type=int, default=20_000, help="characters of the text before the first window")
    parser.add_argument("--windows", type=int, default=6, help="windows of 512 tokens")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of one decode measurement")
    parser.add_argument("--repeats", type=int, default=7, help="turns of the decode measurement")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    parser.add_argument("--dense", action="store_true", help="the peer decompresses while loading (dequantize=True)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for path in (arguments.folder, arguments.text):
        if not path.exists():
            print(f"error: {path} does not exist\n  do: run `make demo` first, or name another", file=sys.stderr)
            return 2
    console = Console(stderr=arguments.json, highlight=False)
    try:
        report = measure(arguments, console)
    except QhalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        console.print(table(report))
        for name, (value, passed) in report["bars"].items():
            console.print(f"{'pass' if passed else 'FAIL'}  {name}: {value}")
    return 0 if all(passed for _, passed in report["bars"].values()) else 1


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    folder, threads = arguments.folder, arguments.threads
    options = {"dequantize": True} if arguments.dense else None
    results: dict[str, dict[str, float]] = {}
    with (
        Worker(folder, backend=None, threads=threads, options=options) as peer,
        Worker(folder, backend=arguments.backend, threads=threads) as ours,
    ):
        workers = {PEER: peer, OURS: ours}
        for name, worker in workers.items():
            results[name] = worker.load()
            results[name]["ready_s"] = results[name]["load_s"] + results[name]["first_forward_s"]
        for name, worker in track(workers.items(), "perplexity", console=console, transient=True):
            found = worker.perplexity(arguments.text, skip=arguments.skip, windows=arguments.windows)
            results[name].update(perplexity=found["perplexity"], prefill_tokens_per_s=found["tokens_per_s"])
        turns: dict[str, dict[str, list[float]]] = {name: {key: [] for key in SPEEDS} for name in workers}
        texts: dict[str, str] = {}
        for turn in track(range(arguments.repeats + 1), "decode", console=console, transient=True):
            for name in (PEER, OURS) if turn % 2 == 0 else (OURS, PEER):
                made = workers[name].generate(PROMPT, tokens=arguments.tokens, chat=False)
                texts[name] = made["text"]
                if turn:  # the first turn warms up
                    for key in SPEEDS:
                        turns[name][key].append(made[key])
        for name, worker in workers.items():
            results[name].update({key: statistics.median(turns[name][key]) for key in SPEEDS})
            results[name]["peak_bytes"] = worker.peak()
        device = ours.device()
    ratios = {key: [b / a for a, b in zip(turns[PEER][key], turns[OURS][key], strict=True)] for key in SPEEDS}
    spread = {
        key: {"median": statistics.median(found), "low": min(found), "high": max(found)}
        for key, found in ratios.items()
    }
    return {
        "folder": str(folder),
        "peer": "dequantize=True" if arguments.dense else "default",
        "threads": threads,
        "results": results,
        "decode_turns": turns,
        "decode_ratio": spread,
        "device": device,
        "same_text": texts[PEER] == texts[OURS],
        "bars": bars(results, spread[SPEEDS[0]]["median"]),
    }


def bars(results: dict[str, dict[str, float]], ratio: float) -> dict[str, tuple[str, bool]]:
    """What was measured, and whether the bar is reached."""
    one, two = results[PEER]["perplexity"], results[OURS]["perplexity"]
    ours = results[OURS]
    grown = ours["load_peak_bytes"] - ours["before_bytes"]
    allowed = 1.25 * ours["model_bytes"] + ours["largest_bytes"]
    return {
        "perplexity equal to four digits": (f"{one:.4g} and {two:.4g}", f"{one:.4g}" == f"{two:.4g}"),
        "decode at least as fast": (f"ratio {ratio:.3f}", ratio >= 1.0),
        "peak memory while loading": (f"{grown / 1e6:.0f} MB, allowed {allowed / 1e6:.0f} MB", grown <= allowed),
    }


def table(report: dict[str, Any]) -> Table:
    results, peer = report["results"], f"{PEER} ({report['peer']})"
    spread = report["decode_ratio"]
    low_high = [f"{spread[key]['low']:.2f} to {spread[key]['high']:.2f}" for key in SPEEDS]
    same = "the same" if report["same_text"] else "different"
    caption = f"decode ratios of the turns: {low_high[0]}, CPU {low_high[1]}; greedy text: {same}"
    result = Table(title=f"transformers, {report['folder']}", caption=caption)
    result.add_column("")
    for title in (peer, OURS, "ratio"):
        result.add_column(title, justify="right")
    for title, key, shape, unit in ROWS:
        one, two = results[PEER][key], results[OURS][key]
        ratio = spread[key]["median"] if key in spread else two / one
        result.add_row(title, shape.format(one * unit), shape.format(two * unit), f"{ratio:.3f}")
    return result


if __name__ == "__main__":
    sys.exit(main())
