"""The demo model quantized by ModelSlim's own command, then read, planned and run by qhal: reference and emulated NPU.

    make modelslim-demo          # the two environments first: msmodelslim has one, torch_npu another
    python examples/modelslim/modelslim.py [--recipes w8a8_dynamic ...] [--arch A2 A5] [--json]

For every recipe of `recipes/`:
1. `msmodelslim quant --model_type default --device cpu` quantizes the bf16 model and writes its AscendV1 files
2. qhal says what is in them, and what an NPU of every generation would execute; a downgrade is an error
3. perplexity on the CPU reference, against bf16, over windows of the demo's text; calibration reads other parts of it
4. the same windows through `python -m qhal_npu_emulation model`: torch_npu's operators by their documented formulas,
   each call also put to the wheel's Meta kernel (level L2; nothing ran on an NPU)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import qhal
import qhal_schemes
from qhal_engines.measure import Worker

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "examples" / "demo"))
from demo import SKIP, bar, inspect, step  # noqa: E402
from fetch import DemoError  # noqa: E402
from model import DEFAULT_CACHE, answered, prepare  # noqa: E402

RECIPES = ("w8a8_dynamic", "w8a8_static", "w4a8_dynamic")
PASSAGES, PASSAGE, FIRST = 8, 1500, 200_000
"""Calibration: so many passages of so many characters, from this one on; the windows end long before it."""
LAYER = re.compile(r'AscendV1Saver for "model\.layers\.(\d+)"')


def main() -> int:
    """0 if every step worked and every layer was within its bound, 1 with one clear error if not."""
    arguments = parse()
    console = Console(stderr=arguments.json, highlight=False)
    return answered(lambda: run(arguments, console), arguments.json)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the demo's downloads and results")
    parser.add_argument("--tool", type=Path, default=ROOT / ".venv-modelslim", help="environment of msmodelslim")
    parser.add_argument("--emulation", type=Path, default=ROOT / ".venv-npu", help="environment of the emulated NPU")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--arch", nargs="+", choices=("A2", "A3", "A5"), default=["A2", "A5"], help="emulated chips")
    parser.add_argument("--windows", type=int, default=2, help="windows of 512 tokens for the perplexity")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", action="store_true", help="print the report as JSON; everything else goes to stderr")
    return parser.parse_args()


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All recipes; returns the report."""
    program = installed(arguments.tool, "msmodelslim")
    python = installed(arguments.emulation, "python")
    files = prepare(arguments.cache)
    room = arguments.cache / "modelslim"
    room.mkdir(parents=True, exist_ok=True)
    calibration(files.text, room / "calibration.json")
    step(console, 0, "bf16")
    report: dict[str, Any] = {"bf16": perplexity(files.checkpoint, None, files.text, arguments, console), "recipes": {}}
    console.print(f"perplexity {report['bf16']:.3f}")
    for i, recipe in enumerate(arguments.recipes, 1):
        step(console, i, recipe)
        folder = room / recipe
        seconds = quantize(program, files.checkpoint, recipe, folder, arguments.threads, console)
        console.print(f"{folder} by msmodelslim in {seconds:.0f} s", soft_wrap=True)
        checkpoint = qhal_schemes.open_checkpoint(folder)
        for line in inspect(checkpoint):
            console.print(line, markup=False)
        for arch in arguments.arch:
            plan = qhal.resolve(checkpoint, qhal.select("npu", arch=arch), policy="error")
            console.print(f"{arch}: {planned(plan)}", markup=False, soft_wrap=True)
        reference = perplexity(folder, "cpu_reference", files.text, arguments, console)
        console.print(f"perplexity {reference:.3f} on cpu_reference, {reference / report['bf16']:.4f} of bf16")
        rows = emulate(python, folder, files.text, arguments, console)
        report["recipes"][recipe] = {"quantize_s": seconds, "cpu_reference": reference, "emulated": rows}
    console.print(table(report))
    return report


def installed(environment: Path, program: str) -> Path:
    """bin/`program` of an environment. Raises DemoError with the command that makes it."""
    found = environment / "bin" / program
    if not found.exists():
        raise DemoError(f"{found} is not there; do: make {environment.name}/.installed")
    return found.absolute()  # not resolved: a python that is a link finds its environment by where it lies


def calibration(text: Path, out: Path) -> None:
    """Passages of the text as the JSON list of strings that ModelSlim reads."""
    words = text.read_text(encoding="utf-8")[FIRST:]
    out.write_text(json.dumps([words[i * 2 * PASSAGE :][:PASSAGE] for i in range(PASSAGES)]))


def quantize(program: Path, source: Path, recipe: str, out: Path, threads: int, console: Console) -> float:
    """Writes `out` anew with ModelSlim's command; seconds. Raises DemoError with its last words and its log."""
    shutil.rmtree(out, ignore_errors=True)
    started, log = time.perf_counter(), out.with_suffix(".log")
    options = {
        "model_type": "default",
        "model_path": source.resolve(),
        "save_path": out.resolve(),
        "device": "cpu",
        "config_path": HERE / "recipes" / f"{recipe}.yaml",
    }
    command = [str(program), "quant", *(word for k, v in options.items() for word in (f"--{k}", str(v)))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""}
    total = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    with log.open("w") as sink, bar(console) as progress:
        task = progress.add_task("layers by msmodelslim", total=total)
        code = follow(command, environment, out.parent, sink.write, lambda n: progress.update(task, completed=n + 1))
    if code or not (out / "quant_model_description.json").exists():
        raise DemoError(f"msmodelslim ended with {code}: {reason(log.read_text())}\n  all it said: {log}")
    return time.perf_counter() - started


def reason(said: str) -> str:
    """Why the command failed: after the exception it prints a traceback and an invitation to report it."""
    lines = said.strip().splitlines() or ["it said nothing"]
    return next((line.partition("ERROR - ")[2] for line in lines if "Original exception" in line), lines[-1])


def follow(
    command: list[str],
    environment: dict[str, str],
    folder: Path,
    keep: Callable[[str], Any],
    layer: Callable[[int], None],
) -> int:
    """Runs a command of ModelSlim and reads along; its exit code."""
    both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(
        command, env=environment, cwd=folder, stdout=both[0], stderr=both[1], text=True, errors="replace"
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            keep(line)
            if found := LAYER.search(line):
                layer(int(found[1]))
    return int(child.returncode)


def planned(plan: qhal.Plan) -> str:
    """How many layers run through which operator."""
    names: dict[str, int] = {}
    for entry in plan.entries:
        path = (entry.support.executes or "").partition(",")[0]
        names[path] = names.get(path, 0) + len(entry.layers)
    return "; ".join(f"{n} layers {path}" for path, n in names.items())


def perplexity(folder: Path, backend: str | None, text: Path, arguments: argparse.Namespace, console: Console) -> float:
    """Of the first windows of the text, in a process of its own."""
    with Worker(folder, backend=backend, threads=arguments.threads) as worker, bar(console) as progress:
        task = progress.add_task(f"perplexity, {backend or 'bf16'}", total=arguments.windows)
        worker.load()
        found = worker.perplexity(
            text,
            skip=SKIP,
            windows=arguments.windows,
            on_event=lambda event: progress.update(task, completed=event["window"]),
        )
    return found["perplexity"]


def emulate(
    python: Path, folder: Path, text: Path, arguments: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """The rows of `python -m qhal_npu_emulation model`. Raises DemoError if a layer was outside its bound."""
    words = ["model", str(folder), "--text", str(text), "--skip", str(SKIP), "--windows", str(arguments.windows)]
    command = [str(python), "-m", "qhal_npu_emulation", *words, "--json", "--arch", *arguments.arch]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    said = []
    pipes = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with console.status("the emulated NPU") as status, pipes as child:
        assert child.stdout is not None and child.stderr is not None
        for line in child.stderr:  # the few rows on stdout come last, and fit in its pipe
            said.append(line)
            if ": window " in line:
                status.update(line.strip())
        rows = [json.loads(line) for line in child.stdout if line.startswith("{")]
    for row in rows:
        p, logits = row["products"], row["logits"]
        console.print(
            f"{row['arch']} emulated: perplexity {row['perplexity'][row['arch']]:.3f}; {p['within']} of {p['outputs']} "
            f"layers within their bound; logits {logits['distance']:.2g} from cpu_reference, which in float32 is "
            f"{logits['reference_in_float32']:.2g} from itself"
        )
    if child.returncode:
        raise DemoError(f"the emulation ended with {child.returncode}: {''.join(said).strip()[-2000:] or 'see above'}")
    return rows


def table(report: dict[str, Any]) -> Table:
    """Perplexity by recipe and by what ran it."""
    result = Table(title=f"SmolLM2-135M-Instruct by msmodelslim: perplexity, bf16 {report['bf16']:.3f}")
    for name in ("recipe", "reference", "/ bf16", "NPU", "emulated", "/ reference", "in bounds"):
        result.add_column(name, justify="right", no_wrap=True)
    for recipe, found in report["recipes"].items():
        first = [recipe, f"{found['cpu_reference']:.3f}", f"{found['cpu_reference'] / report['bf16']:.4f}"]
        for row in found["emulated"]:
            mine, p = row["perplexity"][row["arch"]], row["products"]
            ratio = f"{mine / row['perplexity']['cpu_reference']:.4f}"
            result.add_row(*first, row["arch"], f"{mine:.3f}", ratio, f"{p['within']}/{p['outputs']}")
            first = ["", "", ""]
    return result


if __name__ == "__main__":
    sys.exit(main())
