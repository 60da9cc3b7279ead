"""What Python adds: microseconds of the processor for one eager call, over the launches that it ends in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from cuda_rows.bench import Bench, Call, Group, Measured, codes
from qhal.formats import Format
from qhal.requests import GemmRequest
from qhal.tensors import QTensor

M, N, K = 8, 256, 256


def run(bench: Bench, wanted: Sequence[str]) -> Iterator[Measured]:
    """int8 codes in, so that nothing but the product runs; and the whole of a W4A16 call."""
    device = bench.device
    f = Format.parse("int8.row*fp32")
    request = GemmRequest(w=f, n=N, k=K, x=(f,), out=torch.bfloat16)
    x, w = codes(f, (32, K), device), codes(f, (N, K), device)
    prepared = bench.ops.prepare(w, request)
    assert isinstance(x.scale, torch.Tensor) and isinstance(w.scale, torch.Tensor)
    a, b = x.scale, w.scale.reshape(1, -1)

    def bare(x: QTensor = x) -> torch.Tensor:
        return (torch._int_mm(x.codes, w.codes.T).float() * a * b).to(torch.bfloat16)

    ours, alone = alternate(partial(bench.ops.gemm, x, prepared), bare)
    executes = bench.ops.supports(request).executes
    if "host/int8" in wanted:
        note = f"{ours:.1f} us of {alone:.1f} us for the same torch calls by hand"
        yield Measured("host/int8", ours, executes, value=ours - alone, note=note)
    if "host/w4a16" in wanted:
        f = Format.parse("int4.g128*bf16")
        request = GemmRequest(w=f, n=N, k=K, x=(Format("bf16"),))
        prepared = bench.ops.prepare(codes(f, (N, K), device), request)
        plain = torch.randn(M, K, device=device, dtype=torch.bfloat16)
        dense = torch.randn(N, K, device=device, dtype=torch.bfloat16)
        ours, alone = alternate(
            partial(bench.ops.gemm, plain, prepared), partial(torch.nn.functional.linear, plain, dense)
        )
        executes = bench.ops.supports(request).executes
        yield Measured("host/w4a16", ours, executes, peers={"torch bf16": alone}, note="host time of an eager call")


def alternate(first: Call, second: Call, repeat: int = 400) -> tuple[float, float]:
    """Median host microseconds of both, one after the other, with an empty queue before each."""
    times: tuple[list[int], list[int]] = ([], [])
    clock = time.perf_counter_ns
    for i in range(repeat + 50):
        for call, kept in zip((first, second), times, strict=True):
            torch.cuda.synchronize()
            start = clock()
            call()
            stop = clock()
            if i >= 50:
                kept.append(stop - start)
    return statistics.median(times[0]) / 1e3, statistics.median(times[1]) / 1e3


GROUPS = (Group(("host/int8", "host/w4a16"), run),)
