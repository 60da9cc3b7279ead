"""Products by the Triton kernels against torch's, on this machine's GPU, replayed from a graph.

    python benchmarks/triton_gemm.py [--full] [--sweep]

us per call, the median of replays of graphs that go round 256 MiB of weights, activation quantization included where
there is one. "torch bf16" multiplies a bf16 weight. --sweep times every tile of W4A16 for few rows, to tune
`qhal_triton.gemm.config`. Writes triton_gemm.json to $OUT if that is set. Without a GPU nothing is run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from qhal.elements import element
from qhal.formats import Format
from qhal.groups import Indexed
from qhal.requests import GemmRequest, GroupedRequest
from qhal.selection import select
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_triton.gemm import launch
from qhal_triton.gemm.config import Config

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


def codes(f: Format, shape: tuple[int, ...], device: torch.device) -> QTensor:
    """A weight of random codes with scales near 1 / 64, made on the device."""
    n, k = shape[-2:]

    def plane(p: Format, size: tuple[int, ...]) -> Any:
        if not p.plain:
            inner = torch.full(size, 1.0, device=device).to(torch.float8_e4m3fn)
            return QTensor(p, inner, torch.full((1, 1), 2.0**-6, device=device))
        if p.element == "e8m0":
            return torch.full(size, 121, dtype=torch.uint8, device=device)
        if p.element.startswith("uint"):
            return torch.full(size, 7, dtype=torch.uint8, device=device)
        return torch.full(size, 2.0**-6, device=device).to({"bf16": torch.bfloat16}.get(p.element, torch.float32))

    e, block = element(f.element), f.block
    assert block is not None and f.scale is not None
    grid = (*shape[:-2], *block.grid(n, k))
    low, high = (int(e.smallest), int(e.largest)) if e.integer else (0, (1 << e.bits) - 1)
    random = torch.randint(low, min(high, 119) + 1, shape, device=device, dtype=torch.int16)
    stored = (
        random.to(torch.uint8).view(e.storage) if e.storage.itemsize == 1 and not e.integer else random.to(e.storage)
    )
    return QTensor(f, stored, plane(f.scale, grid), None if f.zero is None else plane(f.zero, grid))


def timed(calls: list[Callable[[], Any]], replays: int = 20) -> float:
    """us per call: every call once in one graph, the graph's median time divided by their number."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for call in calls:
            call()
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            kept = [call() for call in calls]
    torch.cuda.current_stream().wait_stream(side)
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / len(calls))
    del kept
    return statistics.median(times)


def copies(bits: float) -> int:
    """Weights that make 256 MiB."""
    return max(2, int((256 << 20) / (N * K * bits / 8)) + 1)


def product(ops: Any, w: str, x: str, m: int) -> float:
    """One format at m rows."""
    fw, fx = Format.parse(w), Format.parse(x or "bf16")
    request = GemmRequest(w=fw, n=N, k=K, x=(fx,), m=(1, 8192))
    weights = [
        ops.prepare(codes(fw, (N, K), ops.device), request, inputs=(Operand(fx),) if x else ())
        for _ in range(copies(fw.bits) if m <= 256 else 2)
    ]
    rows = torch.randn(m, K, device=ops.device, dtype=torch.bfloat16)
    return timed([lambda p=p: ops.gemm(rows, p) for p in weights])


def library(device: torch.device, m: int) -> float:
    """torch's own product of 16-bit numbers."""
    weights = [torch.randn(N, K, device=device, dtype=torch.bfloat16) for _ in range(3)]
    rows = torch.randn(m, K, device=device, dtype=torch.bfloat16)
    return timed([lambda w=w: torch.nn.functional.linear(rows, w) for w in weights])


def experts(ops: Any, tokens: int, e: int = 64, top: int = 8) -> float:
    """One grouped product, W4A16, N = 3072, K = 4096, the sort of the pairs included."""
    f = Format.parse("int4.g128*bf16")
    gemm = GemmRequest(w=f, n=3072, k=4096, x=(Format("bf16"),))
    prepared = ops.prepare(
        codes(f, (e, 3072, 4096), ops.device), GroupedRequest(gemm=gemm, experts=e, groups="indexed", top_k=top)
    )
    rows = torch.randn(tokens, 4096, device=ops.device, dtype=torch.bfloat16)
    g = torch.Generator(device="cpu").manual_seed(0)
    ids = [
        torch.stack([torch.randperm(e, generator=g)[:top] for _ in range(tokens)]).int().to(ops.device)
        for _ in range(8)
    ]
    return timed([lambda i=i: ops.grouped_gemm(rows, prepared, Indexed(i)) for i in ids])


def sweep(ops: Any, m: int) -> list[dict[str, Any]]:
    """Every tile of W4A16 g128 for m rows, the fastest first."""
    found = []
    for bn, parts, warps, stages in itertools.product((64, 128), (1, 2, 4, 8), (4, 8), (2, 3, 4, 5)):
        bm = 16 if m <= 16 else 32 if m <= 32 else 64
        c = Config(bm, bn, parts, warps, stages)
        try:
            with patch.object(launch, "config", lambda *_, c=c, **__: c):
                found.append({"tile": [bm, bn, parts, warps, stages], "us": product(ops, "int4.g128*bf16", "", m)})
        except Exception as fault:  # a tile that does not fit the chip
            found.append({"tile": [bm, bn, parts, warps, stages], "us": float("inf"), "fault": str(fault)[:80]})
    return sorted(found, key=lambda row: float(row["us"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every format and row count; compiling takes minutes")
    parser.add_argument("--sweep", action="store_true")
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
    if arguments.sweep:
        found["sweep"] = {m: sweep(ops, m) for m in (1, 16, 64)}
        for m, tiles in found["sweep"].items():
            shown = ", ".join(f"{t['tile']} {t['us']:.1f}" for t in tiles[:5])
            print(f"M={m} [bm, bn, parts, warps, stages]: {shown}")
    if out := os.environ.get("OUT"):
        Path(out, "triton_gemm.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
