"""The demo's model in transformers: perplexity, eager decoding and memory, per weight format and per cache format.

Every row is a load of its own, as a user writes it: `install`, then `from_pretrained` with a QhalConfig that quantizes
the bf16 checkpoint on the way in, or with none and a cache format. The baseline is transformers without qhal.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import qhal
from qhal.interface import QuantOps

SKIP = 20_000  # characters before the first window, as in the demo
PROMPT = "The sun rose over the sea and"
TOKENS = 48
WEIGHTS = (  # no fp8_block: 576 columns are no whole blocks of 128, and such a checkpoint is refused
    "int8", "fp8", "fp8_row", "mxfp8", "int4_g32", "uint4_g32", "int3_g32", "uint2_g32", "mxfp4", "nvfp4",
)  # fmt: skip
CACHES = ("bf16", "fp8", "fp8_row", "int8", "int4.g32*fp16", "nvfp4", "mxfp8")
NAMES = ("bf16", *(f"w/{name}" for name in WEIGHTS), *(f"kv/{name}" for name in CACHES))
MIB = 1 << 20


@dataclass
class Measured:
    """One row: model_bytes are parameters, buffers and prepared weights; peak_bytes of tensors on the device."""

    row: str
    perplexity: float | None = None
    decode: float | None = None
    load_s: float | None = None
    model_bytes: int = 0
    peak_bytes: int = 0
    note: str = ""


def run(arguments: argparse.Namespace, console: Console, keep: Callable[[dict[str, Any]], None]) -> Table:
    """Every row measured and shown as it comes; the table of all."""
    ops = qhal.select(arguments.backend)
    wanted = [n for n in NAMES if n == "bf16" or n.startswith(tuple(arguments.rows))]
    table = Table(
        "row", "perplexity", "change %", "decode tokens/s", "load s", "model MiB", "peak MiB", "",
        title=f"{arguments.demo.name}, {arguments.windows} windows of 512 tokens, backend {ops.name}",
    )  # fmt: skip
    for column in table.columns[1:-1]:
        column.justify = "right"
    base: float | None = None
    for name in wanted:
        found = _measured(name, arguments, ops)
        keep(asdict(found))
        base = found.perplexity if name == "bf16" else base
        change = 100 * (found.perplexity / base - 1) if base and found.perplexity else None
        cells = [
            found.row, _number(found.perplexity, ".3f"), _number(change, "+.2f"), _number(found.decode, ".1f"),
            _number(found.load_s, ".1f"), f"{found.model_bytes / MIB:.0f}", f"{found.peak_bytes / MIB:.0f}", found.note,
        ]  # fmt: skip
        table.add_row(*cells)
        console.print("  ".join(cells), soft_wrap=True)
    return table


def _measured(name: str, arguments: argparse.Namespace, ops: QuantOps) -> Measured:
    found = Measured(name)
    try:
        _measure(name, arguments, ops, found)
    except Exception as error:  # one row that breaks must not take the others with it
        found.note = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    gc.collect()
    return found


def _measure(name: str, arguments: argparse.Namespace, ops: QuantOps, found: Measured) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qhal_engines.generation import generate, perplexity
    from qhal_engines.measure import module_bytes
    from qhal_engines.transformers import QhalConfig, install

    kind, _, form = name.partition("/")
    options: dict[str, Any] = {}
    if kind in ("w", "kv"):
        install(arguments.backend, kv_format=form if kind == "kv" else None)
        options["quantization_config"] = QhalConfig(quantize=form) if kind == "w" else QhalConfig()
    device = ops.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.demo, dtype=torch.bfloat16, **options)
    model = model.to(device).eval()
    ops.synchronize()
    found.load_s = time.perf_counter() - began
    found.model_bytes = sum(module_bytes(model))
    tokenizer = AutoTokenizer.from_pretrained(arguments.demo)
    text = Path(arguments.text).read_text(encoding="utf-8")[SKIP:]
    found.perplexity = perplexity(model, tokenizer, text, arguments.windows)
    generate(model, tokenizer, PROMPT, 4, stop_at_end=False)
    speeds = [generate(model, tokenizer, PROMPT, TOKENS, stop_at_end=False).decode_tokens_per_s for _ in range(2)]
    found.decode = max(speeds)
    found.peak_bytes = ops.memory_stats().peak


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
