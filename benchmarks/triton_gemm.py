"""Products by the Triton kernels against torch's, on this machine's GPU, replayed from a graph.

    python benchmarks/triton_gemm.py [--full]

us per call, the median of replays of graphs that go round 256 MiB of weights, activation quantization included where
there is one. "torch bf16" multiplies a bf16 weight. Writes triton_gemm.json to $OUT if that is set. Without a GPU
nothing is run; `qhal tune` measures tiles.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from qhal.formats import Format
from qhal.groups import Indexed
from qhal.requests import GemmRequest, GroupedRequest
from qhal.selection import select
from qhal.specs import Operand
from qhal_triton.gemm.weights import random_weight
from qhal_triton.timing import microseconds

N = K = 8192
ROWS = (1, 8, 16, 64, 128, 256, 2048)
FORMATS = (
    ("int4.g128*bf16", ""),
    ("uint4-uint4.g128*bf16", ""),
    ("int4.g32*bf16", ""),
    ("e2m1.g32*e8m0", ""),
    ("e2m1.g16*(e4m3fn.tensor*fp32)", ""),
    ("nf4.g64*fp32", ""),
    ("int8.row*fp32", ""),
    ("e4m3fn.row*fp32", ""),
    ("int4.g128*bf16", "int8.row*fp32"),
    ("uint8-uint8.row*fp32", "uint8-uint8.row*fp32"),
    ("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32"),
    ("e4m3fn.g32*e8m0", "e4m3fn.g32*e8m0"),
)


def copies(bits: float) -> int:
    """Weights that make 256 MiB."""
    return max(2, int((256 << 20) / (N * K * bits / 8)) + 1)


def product(ops: Any, w: str, x: str, m: int) -> float:
    """One format at m rows."""
    fw, fx = Format.parse(w), Format.parse(x or "bf16")
    request = GemmRequest(w=fw, n=N, k=K, x=(fx,), m=(1, 8192))
    random = torch.Generator(device=ops.device).manual_seed(0)
    weights = [
        ops.prepare(random_weight(fw, (N, K), random), request, inputs=(Operand(fx),) if x else ())
        for _ in range(copies(fw.bits) if m <= 256 else 2)
    ]
    rows = torch.randn(m, K, device=ops.device, dtype=torch.bfloat16)
    return microseconds([lambda p=p: ops.gemm(rows, p) for p in weights])


def library(device: torch.device, m: int) -> float:
    """torch's own product of 16-bit numbers."""
    weights = [torch.randn(N, K, device=device, dtype=torch.bfloat16) for _ in range(3)]
    rows = torch.randn(m, K, device=device, dtype=torch.bfloat16)
    return microseconds([lambda w=w: torch.nn.functional.linear(rows, w) for w in weights])


def experts(ops: Any, tokens: int, e: int = 64, top: int = 8) -> float:
    """One grouped product, W4A16, N = 3072, K = 4096, the sort of the pairs included."""
    f = Format.parse("int4.g128*bf16")
    gemm = GemmRequest(w=f, n=3072, k=4096, x=(Format("bf16"),))
    random = torch.Generator(device=ops.device).manual_seed(0)
    prepared = ops.prepare(
        random_weight(f, (e, 3072, 4096), random), GroupedRequest(gemm=gemm, experts=e, groups="indexed", top_k=top)
    )
    rows = torch.randn(tokens, 4096, device=ops.device, dtype=torch.bfloat16)
    g = torch.Generator(device="cpu").manual_seed(0)
    ids = [
        torch.stack([torch.randperm(e, generator=g)[:top] for _ in range(tokens)]).int().to(ops.device)
        for _ in range(8)
    ]
    return microseconds([lambda i=i: ops.grouped_gemm(rows, prepared, Indexed(i)) for i in ids])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every format and row count; compiling takes minutes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("not run: no GPU here", file=sys.stderr)
        return 0
    ops: Any = select("auto")
    rows = ROWS if arguments.full else (1, 16, 64, 256)
    table: dict[str, dict[int, float]] = {"torch bf16": {m: library(ops.device, m) for m in rows}}
    for w, x in FORMATS if arguments.full else FORMATS[::2]:
        table[f"{w} x {x or 'bf16'}"] = {m: product(ops, w, x, m) for m in rows}
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "n": N, "k": K, "us": table}
    print(f"{found['device']}, N = K = {N}, us")
    print(f"{'':52}" + "".join(f"{f'M={m}':>9}" for m in rows))
    for name, times in table.items():
        print(f"{name:52}" + "".join(f"{t:>9.1f}" for t in times.values()))
    found["experts"] = {t: experts(ops, t) for t in ((1, 16, 256, 4096) if arguments.full else (1, 256))}
    print("grouped int4, E = 64, top 8: " + ", ".join(f"T={t} {us:.1f}" for t, us in found["experts"].items()))
    if out := os.environ.get("OUT"):
        Path(out, "triton_gemm.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
