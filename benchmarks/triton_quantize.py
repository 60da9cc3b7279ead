"""Quantization, rotations and codebook decoding by the Triton kernels, on this machine's GPU, replayed from a graph.

    python benchmarks/triton_quantize.py [quantize] [hadamard] [vq]

us per call, the median of replays. Large inputs go round 256 MiB; rows of few tokens meet one buffer, so they are
latencies with a warm cache. TB/s counts what is read and written once; "copy" is torch's copy of the same bytes, what
memory allows. torch's own way to the same result is beside it. Writes triton_quantize.json to $OUT if that is set.
Without a GPU nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qhal.codebooks import CodebookSegment, CodebookTensor
from qhal.formats import Format
from qhal.requests import GemmRequest, VQRequest
from qhal.rotations import hadamard_for
from qhal.selection import select
from qhal.specs import Operand
from qhal_triton.timing import microseconds

K = 8192
ROWS = (1, 16, 256, 8192)
FORMATS = (
    "e4m3fn.row*fp32",
    "int8.row*fp32",
    "e4m3fn.g128*fp32",
    "e4m3fn.128x128*fp32",
    "e4m3fn.tensor*fp32",
    "e4m3fn.g32*e8m0",
    "e2m1.g32*e8m0",
    "e2m1.g16*(e4m3fn.tensor*fp32)",
)
ORDERS = (64, 128, 512, 1024, 4096, 8192, 16384, 1536, 6144, 12288, 5120, 7168, 14336)
FEATURES = 64 << 20
Row = dict[str, Any]


def row(name: str, us: float, read: float, peer: Callable[[], float] | None = None) -> Row:
    """One line: us, TB/s of `read` bytes, torch's us."""
    other = None if peer is None else peer()
    rate = read / us / 1e6
    print(f"{name:44}{us:10.1f}{rate:8.2f}{'' if other is None else f'{other:10.1f}'}", flush=True)
    return {"name": name, "us": us, "TB/s": rate, "torch us": other}


def inputs(rows: int, columns: int, device: torch.device) -> list[torch.Tensor]:
    """Enough of them to go round 256 MiB, if they are large."""
    count = 3 if rows * columns >= 1 << 25 else 1
    return [torch.randn(rows, columns, device=device, dtype=torch.bfloat16) for _ in range(count)]


def by_torch(x: torch.Tensor) -> torch.Tensor:
    """fp8 rows, in five operations of torch."""
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn)


def by_matrix(xs: list[torch.Tensor], n: int) -> float:
    """torch's product with the dense matrix, us."""
    h = hadamard_for(n).matrix(n).to(xs[0].device, torch.bfloat16)
    return microseconds([lambda x=x: x @ h for x in xs])


def quantize(ops: Any) -> Iterator[Row]:
    """Every format at every number of rows."""
    for m in ROWS:
        xs = inputs(m, K, ops.device)
        yield row(f"copy [{m}, {K}]", microseconds([lambda x=x: x.clone() for x in xs]), 4 * m * K)
        for name in FORMATS:
            f = Format.parse(name)
            us = microseconds([lambda x=x, f=f: ops.quantize(x, f) for x in xs])
            peer = partial(microseconds, [partial(by_torch, xs[0])]) if name == FORMATS[0] else None
            yield row(f"{name} [{m}, {K}]", us, 3 * m * K, peer)
        static = Operand(Format.parse("e4m3fn.tensor*fp32"), torch.ones(1, device=ops.device))
        us = microseconds([lambda x=x, o=static: ops.quantize(x, o) for x in xs])
        yield row(f"e4m3fn.tensor*fp32 given [{m}, {K}]", us, 3 * m * K)


def hadamard(ops: Any) -> Iterator[Row]:
    """64 Mi features in every order; the quantization in the same pass; one token."""
    for n in ORDERS:
        chain, xs = [hadamard_for(n)], inputs(FEATURES // n, n, ops.device)
        size = xs[0].numel()

        us = microseconds([lambda x=x, c=chain: ops.hadamard(x, c) for x in xs])
        yield row(f"hadamard {n}", us, 4 * size, partial(by_matrix, xs, n) if n <= 1024 else None)
        if n in (128, 4096, 8192):
            to = Operand(Format.parse("e4m3fn.row*fp32"))
            us = microseconds([lambda x=x, c=chain, o=to: ops.hadamard(x, c, quantize=o) for x in xs])
            yield row(f"hadamard {n} to {to.format}", us, 3 * size)
            us = microseconds([lambda x=xs[0][:1], c=chain: ops.hadamard(x, c)])
            yield row(f"hadamard {n}, one row", us, 4 * n)


def vq(ops: Any) -> Iterator[Row]:
    """Weights [8192, 8192] of vectors of 8, decoded and multiplied."""
    g = torch.Generator().manual_seed(0)
    for name, books, entries in (("1 of 65536", 1, 1 << 16), ("2 of 256", 2, 256), ("e8p12", 1, 0)):
        codes = torch.randint(0, entries or 1 << 16, (K, K // 8, books), generator=g, dtype=torch.int32)
        tables = tuple(torch.randn(entries, 1, 8, generator=g).half() if entries else "e8p12" for _ in range(books))
        w = CodebookTensor((K, K), (CodebookSegment(codes, tables),), torch.ones(K))
        made = [ops.prepare(w, VQRequest(w=w.format, n=K, k=K, out=torch.bfloat16)) for _ in range(3)]
        us = microseconds([lambda p=p: ops.vq_decode(p) for p in made])
        yield row(f"vq_decode {name}", us, K * K * (2 + books / 2))
        products = [ops.prepare(w, GemmRequest(w=w.format, n=K, k=K, x=(Format("bf16"),))) for _ in range(8)]
        for m in (1, 8, 256):
            x = torch.randn(m, K, device=ops.device, dtype=torch.bfloat16)
            us = microseconds([lambda p=p, x=x: ops.gemm(x, p) for p in products])
            yield row(f"gemm {name}, {m} rows", us, K * K * books / 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["quantize", "hadamard", "vq"], metavar="PART")
    arguments = parser.parse_args()
    parts = {"quantize": quantize, "hadamard": hadamard, "vq": vq}
    unknown = [p for p in arguments.parts if p not in parts]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; known: {', '.join(parts)}")
    if not torch.cuda.is_available():
        print("not run: no NVIDIA GPU here", file=sys.stderr)
        return 0
    ops = select("cuda")
    print(f"{torch.cuda.get_device_name()}\n{'':44}{'us':>10}{'TB/s':>8}{'torch us':>10}")
    rows = [line for part in arguments.parts for line in parts[part](ops)]
    if os.environ.get("OUT"):
        found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        (Path(os.environ["OUT"]) / "triton_quantize.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
