"""What Python adds: microseconds of the processor for one eager call, over the bare launches that it ends in.

Bare: the memory of the result, the library's product where there is one, and each kernel of ours as Triton's users
launch a compiled one by hand, `binary[grid](*arguments)`, with the arguments of our call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from cuda_rows.bench import Bench, Call, Group, Measured, codes
from qhal.caches import KVCache, Limits
from qhal.formats import Format
from qhal.groups import Indexed
from qhal.requests import AttentionRequest, GemmRequest, GroupedRequest, HadamardRequest, KVRequest, QuantizeRequest
from qhal.rotations import Hadamard, kinds
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_triton.launching import Launcher

M, N, K = 32, 256, 256
HEADS, KEY_HEADS, DIM, PAGE, PAGES = 32, 8, 128, 16, 64
HALF = torch.bfloat16

Row = tuple[Call, str, Call | None]
"""Our call, what executes it, and the library's product in it."""


def _int8(bench: Bench) -> Row:
    call, executes, _, _ = _eight(bench, "int8.row*fp32")
    return call, executes, None


def _fp8(bench: Bench) -> Row:
    call, executes, a, w = _eight(bench, "e4m3fn.row*fp32")
    one = torch.ones((), device=bench.device)
    bare = partial(torch._scaled_mm, a, w.T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False)
    return call, executes, bare


def _eight(bench: Bench, name: str) -> tuple[Call, str, Tensor, Tensor]:
    """Codes in, so that nothing but the product runs."""
    f = Format.parse(name)
    request = GemmRequest(w=f, n=N, k=K, x=(f,), out=HALF)
    x, w = codes(f, (M, K), bench.device), codes(f, (N, K), bench.device)
    call = partial(bench.ops.gemm, x, bench.ops.prepare(w, request))
    return call, bench.ops.supports(request).executes, x.codes, w.codes


def _w4a16(bench: Bench) -> Row:
    f = Format.parse("int4.g128*bf16")
    request = GemmRequest(w=f, n=N, k=K, x=(Format("bf16"),))
    prepared = bench.ops.prepare(codes(f, (N, K), bench.device), request)
    return partial(bench.ops.gemm, _random(bench, 8, K), prepared), bench.ops.supports(request).executes, None


def _quantize(bench: Bench) -> Row:
    f = Format.parse("int8.row*fp32")
    answer = bench.ops.supports(QuantizeRequest(x=HALF, format=f))
    return partial(bench.ops.quantize, _random(bench, M, K), Operand(f)), answer.executes, None


def _grouped(bench: Bench) -> Row:
    f = Format.parse("int4.g128*bf16")
    gemm = GemmRequest(w=f, n=N, k=K, x=(Format("bf16"),))
    request = GroupedRequest(gemm=gemm, experts=8, groups="indexed", top_k=2)
    prepared = bench.ops.prepare(codes(f, (8, N, K), bench.device), request)
    ids = torch.arange(16, dtype=torch.int32, device=bench.device).remainder(8).reshape(8, 2)
    call = partial(bench.ops.grouped_gemm, _random(bench, 8, K), prepared, Indexed(ids, None))
    return call, bench.ops.supports(request).executes, None


def _cache(bench: Bench) -> tuple[AttentionRequest, KVCache]:
    f = Format.parse("e4m3fn.tensor*fp32")
    kv = KVRequest(kind="mha", k=f, v=f, heads=KEY_HEADS, k_dim=DIM, v_dim=DIM, page=PAGE)
    plain = Format("bf16")
    request = AttentionRequest(kv=kv, heads=HEADS, scale=DIM**-0.5, phase="decode", q=plain, p=plain, out=HALF)
    layout, planes = bench.ops.kv_planes(kv, attention=[request])
    return request, KVCache.allocate(kv, PAGES, bench.device, planes=planes, layout=layout)


def _quant_kv(bench: Bench) -> Row:
    request, cache = _cache(bench)
    k, v = (_random(bench, 8, KEY_HEADS, DIM) for _ in range(2))
    slots = torch.arange(8, device=bench.device)
    return partial(bench.ops.quant_kv, k, v, cache, slots), bench.ops.supports(request.kv).executes, None


def _attention(bench: Bench) -> Row:
    request, cache = _cache(bench)
    batch = bench.ops.attention_batch(request, Limits(8, 8, PAGES))
    ones, pages = torch.ones(8, dtype=torch.int32), torch.zeros(8, 4, dtype=torch.int32)
    batch.plan(ones, 64 * ones, pages.to(bench.device))
    q = _random(bench, 8, HEADS, DIM)
    return partial(bench.ops.attention, q, cache, batch), bench.ops.supports(request).executes, None


def _hadamard(bench: Bench) -> Row:
    chain = [Hadamard(4096)]
    answer = bench.ops.supports(HadamardRequest(kinds=kinds(chain), n=4096, x=HALF))
    return partial(bench.ops.hadamard, _random(bench, 8, 4096), chain), answer.executes, None


ROWS: dict[str, Callable[[Bench], Row]] = {
    "host/int8": _int8,
    "host/fp8": _fp8,
    "host/w4a16": _w4a16,
    "host/quantize": _quantize,
    "host/grouped": _grouped,
    "host/quant_kv": _quant_kv,
    "host/attention": _attention,
    "host/hadamard": _hadamard,
}


def run(bench: Bench, wanted: Sequence[str]) -> Iterator[Measured]:
    """The difference of both is the row's value."""
    for name in wanted:
        call, executes, library = ROWS[name](bench)
        launches, results = launched(call)

        def bare(
            results: list[Tensor] = results,
            library: Call | None = library,
            launches: list[tuple[Any, list[Any]]] = launches,
        ) -> None:
            for t in results:
                torch.empty_like(t)
            if library is not None:
                library()
            for start, arguments in launches:
                start(*arguments)

        ours, alone = alternate(call, bare)
        note = f"{ours:.1f} us of the processor, {alone:.1f} us for {len(launches)} bare launches"
        note += " and the library's product" * (library is not None)
        yield Measured(name, ours, executes, value=ours - alone, note=note)


def launched(call: Call) -> tuple[list[tuple[Any, list[Any]]], list[Tensor]]:
    """Our kernels in a call, as Triton launches them by hand, with their arguments; and the tensors of the result."""
    seen: list[tuple[Any, list[Any]]] = []
    usual = Launcher.__call__

    def kept(self: Launcher, grid: Any, tensors: Any, numbers: Any) -> None:
        binary = self.ordinary(grid, tensors, numbers)
        seen.append((binary[grid], list(self.arguments(tensors, numbers).values())))

    usual_results = call()  # what a first call sorts, chooses and compiles stays outside
    with patch.object(Launcher, "__call__", kept):
        call()
    assert Launcher.__call__ is usual
    if isinstance(usual_results, QTensor):
        return seen, list(usual_results.planes().values())
    return seen, [] if usual_results is None else [usual_results]


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


def _random(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=HALF)


GROUPS = (Group(tuple(ROWS), run),)
