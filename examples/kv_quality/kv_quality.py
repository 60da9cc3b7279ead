"""What every cache format costs in perplexity: one bf16 model, one text, the cache through quant_kv and attention.

    python examples/kv_quality/kv_quality.py [--cache build/demo] [--out docs/quality] [--json]

Model, text and windows are the demo's (SmolLM2-135M-Instruct, Newton's Opticks). Only the cache differs from row to
row; weights and activations stay bf16. Formats whose static scales are "calibrated" take them from the largest
magnitudes of K and V over 512 tokens of the same text before the first window.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from chart import chart
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import qhal
import qhal_schemes
from qhal.caches import canonical_planes
from qhal.elements import element
from qhal.formats import Format
from qhal.layer_formats import KVFormat
from qhal.specs import KVSpec, Operand
from qhal_engines import EngineWarning
from qhal_engines.generation import perplexity
from qhal_engines.kv_attach import attach, detach, model_attention
from qhal_engines.kv_plan import CacheLayer, cache_layers, resolve_with_caches
from qhal_schemes.kv_words import parse_kv

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "demo"))
from model import DEFAULT_CACHE, answered, prepare  # noqa: E402

SKIP = 20_000  # characters before the first window, as in the demo; calibration reads the end of them
CALIBRATION = 512
CALIBRATED = ("fp8_head", "int8.head*fp32", "int8.col*fp32")
FORMATS = (
    "bf16",
    "fp8",
    "fp8_head",
    "fp8_row",
    "fp8_e5m2",
    "mxfp8",
    "int8",
    "int8.head*fp32",
    "int8.col*fp32",
    "int4",
    "int4.g32*fp16",
    "uint4",
    "uint4-fp16.g32*fp16@domain=minmax",
    "mxfp4",
    "nvfp4",
    "int4,bf16",
    "bf16,int4",
    "int8,int4",
)


@dataclass(frozen=True)
class Row:
    """One cache format. bits: per element of K and V, all paged planes counted; bytes_per_token: of all layers."""

    asked: str
    k: str
    v: str
    scales: str
    bits: float
    bytes_per_token: int
    perplexity: float
    delta: float
    seconds: float


def main() -> int:
    """Measures, writes the table and the picture; 0 if every format ran, 1 with one clear error if not."""
    arguments = parse()
    console = Console(stderr=True, highlight=False)
    return answered(lambda: run(arguments, console), arguments.json)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the demo's downloads")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality", help="folder of kv-formats.md and .svg")
    parser.add_argument("--backend", default="cpu_reference", help="as for qhal.select")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="cache formats; the first is the baseline")
    parser.add_argument("--windows", type=int, default=6, help="windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", action="store_true", help="print the report as JSON too")
    return parser.parse_args()


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every format; returns the report after writing it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    ran = commit()
    ops = qhal.select(arguments.backend)
    files = prepare(arguments.cache)
    checkpoint = qhal_schemes.open_checkpoint(files.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(files.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(files.checkpoint).to(ops.device).eval()
    text = files.text.read_text(encoding="utf-8")
    scales = Calibration(
        model, tokenizer(text[:SKIP], add_special_tokens=False, verbose=False).input_ids[-CALIBRATION:]
    )
    rows: list[Row] = []
    with bar(console) as progress:
        task = progress.add_task("", total=(len(arguments.formats) + 1) * arguments.windows)

        def measure(name: str) -> tuple[float, float]:
            progress.update(task, description=name)
            started = time.perf_counter()
            found = perplexity(
                model, tokenizer, text[SKIP:], arguments.windows, on_window=lambda *_: progress.advance(task)
            )
            return found, time.perf_counter() - started

        own, _ = measure("transformers")
        for name in arguments.formats:
            caches, specs, said = layers(name, checkpoint, model, scales)
            resolve_with_caches(checkpoint, ops, "error", caches)
            attach(model, ops, caches, specs, model.dtype)
            found, seconds = measure(name)
            detach(model)
            base = rows[0].perplexity if rows else found
            rows.append(Row(name, *described(caches[0]), said, *sizes(caches), found, found - base, seconds))
    report = {
        "model": "SmolLM2-135M-Instruct, bf16 weights and activations",
        "text": f"{files.text.name}, from character {SKIP}",
        "windows": arguments.windows,
        "tokens": arguments.windows * 511,
        "backend": f"{ops.name} on {ops.device}, {arguments.threads} thread(s)",
        "level": "L2" if ops.device.type == "cpu" else "L3",
        "commit": ran,
        "transformers_perplexity": own,
        "rows": [asdict(row) for row in rows],
    }
    write(report, rows, arguments.out)
    console.print(f"wrote {arguments.out / 'kv-formats.md'} and kv-formats.svg")
    return report


class Calibration:
    """Static scales from the largest magnitudes of every (layer, head, feature) of K and V over some tokens."""

    def __init__(self, model: Any, ids: list[int]) -> None:
        with torch.inference_mode():
            made = model(torch.tensor([ids], device=model.device), use_cache=True)
        held = getattr(made, "cache", None) or made.past_key_values  # the name since transformers 5.24, and before
        self._largest = [
            {"k": layer.keys[0].abs().amax(1).float(), "v": layer.values[0].abs().amax(1).float()}  # [G, D]
            for layer in held.layers
        ]

    def operand(self, fmt: Format, layer: int, part: str) -> Operand:
        """The format with scale = amax / largest code, over the tensor, the head or the feature."""
        amax = self._largest[layer][part]
        kind = "" if fmt.block is None else fmt.block.kind
        grids = {"tensor": amax.amax().reshape(1), "head": amax.amax(1), "col": amax.flatten()}
        return Operand(fmt, grids[kind].clamp(min=1e-6) / element(fmt.element).largest)


def layers(
    name: str, checkpoint: qhal_schemes.Checkpoint, model: Any, scales: Calibration
) -> tuple[list[CacheLayer], dict[int, KVSpec], str]:
    """The caches of every layer, their specs, and where scales come from."""
    attention = model_attention(model)
    if name in CALIBRATED:
        k, v = parse_kv(name)
        caches = [
            CacheLayer(a, KVFormat("mha", k, v, None, None, a.kv_heads, a.k_dim, a.v_dim, a.name)) for a in attention
        ]
        specs = {}
        for cache in caches:
            layer, f = cache.attention.layer, cache.format
            parts = (scales.operand(k, layer, "k"), scales.operand(v, layer, "v"))
            specs[layer] = KVSpec(*parts, heads=f.heads, k_dim=f.k_dim, v_dim=f.v_dim, name=f.name)
        return caches, specs, "calibrated"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        caches = cache_layers(checkpoint, name, attention)
    ones = any(isinstance(w.message, EngineWarning) for w in caught)
    plain = all(f.plain for f in parse_kv(name))
    return caches, {c.attention.layer: c.read(checkpoint) for c in caches}, "1" if ones else "" if plain else "computed"


def described(cache: CacheLayer) -> tuple[str, str]:
    """The full names of the formats of K and V."""
    return str(cache.format.k), str(cache.format.v)


def sizes(caches: list[CacheLayer]) -> tuple[float, int]:
    """(bits per element, bytes per token of all layers) of the paged planes."""
    total = elements = 0
    for request in (cache.request for cache in caches):
        total += sum(p.nbytes(1) for p in canonical_planes(request) if p.paged) // request.page
        elements += request.heads * (request.k_dim + request.v_dim)
    return 8 * total / elements, total


def write(report: dict[str, Any], rows: list[Row], out: Path) -> None:
    """kv-formats.md and kv-formats.svg."""
    base = rows[0]
    lines = [
        "# Perplexity by cache format",
        "",
        "Made by `make kv-quality` (`examples/kv_quality/`); only the format of the key-value cache differs.",
        "",
        f"* model: {report['model']}; text: {report['text']}",
        f"* {report['windows']} windows of 512 tokens, {report['tokens']} predictions, the same for every row",
        f"* {report['backend']}, level {report['level']}, commit {report['commit']}",
        f"* transformers with its own bf16 cache and attention: {report['transformers_perplexity']:.3f}",
        "",
        "| format | K | V | static scales | bits per element | bytes per token | perplexity | change |",
        "|---|---|---|---|--:|--:|--:|--:|",
    ]
    for r in rows:
        change = "" if r is base else f"{r.delta:+.3f} ({r.delta / base.perplexity:+.2%})"
        scales = r.scales if r.scales in ("1", "calibrated") else "-"
        lines.append(
            f"| `{r.asked}` | `{r.k}` | `{r.v}` | {scales} | {r.bits:.2f} | {r.bytes_per_token} | {r.perplexity:.3f} "
            f"| {change} |"
        )
    lines += ["", "![increase of perplexity by cache format](kv-formats.svg)", "", *NOTES, ""]
    out.mkdir(parents=True, exist_ok=True)
    (out / "kv-formats.md").write_text("\n".join(lines), encoding="utf-8")
    points = [(r.asked, r.bits, 100 * r.delta / base.perplexity) for r in rows if r is not base]
    (out / "kv-formats.svg").write_text(chart(points, "bf16", base.perplexity), encoding="utf-8")


NOTES = (
    "A row block is one (token, head) vector of 64 features, so `g64` would be `row` here. Bits per element count",
    "codes and paged scales; static scales are a few bytes per layer. One small model and one text: no claim about",
    "others.",
)


def commit() -> str:
    """The commit that ran, with a + if files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "--short", "HEAD") or "unknown"
    return name + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


@contextlib.contextmanager
def bar(console: Console) -> Iterator[Progress]:
    """A progress bar that disappears when it is done."""
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total} windows"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        yield progress


if __name__ == "__main__":
    sys.exit(main())
