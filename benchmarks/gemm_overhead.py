"""gemm overhead: microseconds that `ops.gemm` of a prepared int4 weight adds to the bare torch call it ends in.

Bar: at most 5 us. The two calls alternate, so that a change of the machine's speed meets both; medians are compared.
Run: python benchmarks/gemm_overhead.py [--json] [--repeat N]; exits 1 if the bar is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
from torch.nn.functional import linear

import qhal
from qhal import Format, GemmRequest, Operand

BAR_US = 5.0
ROWS, N, K = 1, 64, 64


def measure(repeat: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Median microseconds of both calls, their difference and ratio, on [ROWS, K] @ [K, N]."""
    ops = qhal.select("cpu_reference")
    torch.manual_seed(0)
    to = Format.parse("int4.g32*bf16")
    w = ops.quantize(torch.randn(N, K), Operand(to))
    prepared = ops.prepare(w, GemmRequest(w=to, n=N, k=K, x=(Format("bf16"),)))
    x, plain = torch.randn(ROWS, K).to(dtype), w.dequantize(dtype)
    assert torch.equal(ops.gemm(x, prepared), linear(x, plain))
    clock, gemm = time.perf_counter_ns, ops.gemm
    bare, ours = [], []
    with torch.inference_mode():
        for i in range(repeat + repeat // 10):
            a = clock()
            linear(x, plain)
            b = clock()
            gemm(x, prepared)
            c = clock()
            if i >= repeat // 10:  # the first tenth warms up
                bare.append(b - a)
                ours.append(c - b)
    bare_us, ours_us = statistics.median(bare) / 1e3, statistics.median(ours) / 1e3
    return {"bare_us": bare_us, "gemm_us": ours_us, "overhead_us": ours_us - bare_us, "ratio": ours_us / bare_us}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeat", type=int, default=20000, help="repetitions of each call")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.repeat)
    passed = found["overhead_us"] <= BAR_US
    if args.json:
        print(json.dumps({"name": "gemm_overhead", "bar_us": BAR_US, "passed": passed, "repeat": args.repeat, **found}))
    else:
        print(f"bare torch linear  {found['bare_us']:8.2f} us")
        print(f"qhal gemm          {found['gemm_us']:8.2f} us   {found['ratio']:.3f} x")
        print(f"overhead           {found['overhead_us']:8.2f} us   bar {BAR_US} us: {'met' if passed else 'MISSED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
