"""One rank of the gloo tests: `comm_worker.py RANK WORLD FILE`. Prints every CommError as JSON, for comparison."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from qhal import Codec, CommError, Format, FormatError, QTensor, UnsupportedError
from qhal.collectives import part_rows, simulate
from qhal.tensors import same_bits
from qhal_cpu_reference.ops import CpuReference

INT8 = Codec(Format.parse("int8.g32*fp16"))
CODECS = (
    INT8,
    Codec(Format.parse("int8.row*fp32"), requantize=False),
    Codec(Format.parse("int6.g32*fp16@domain=signed"), order="parity", planes=(4, 2)),
    Codec(Format.parse("int4.row*bf16"), accumulate="fp16"),
    Codec(Format.parse("e4m3fn.g128*fp32")),
    Codec(Format.parse("mxfp4"), accumulate="bf16"),
    Codec(Format.parse("mxfp8"), order="parity"),
    Codec(Format.parse("nvfp4")),
    Codec(Format.parse("bf16")),
)
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")


def inputs(world: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(world)]


def equal(a: object, b: object) -> bool:
    return a.equal(b) if isinstance(a, QTensor) else same_bits(a, b)  # type: ignore[arg-type]


def agreeing(ops: CpuReference, rank: int, world: int) -> None:
    for i, codec in enumerate(CODECS):
        for collective in COLLECTIVES:
            for shape, dtype in (((world + 1, 70), torch.bfloat16), ((2 * world, 64), torch.float32)):
                xs = inputs(world, shape, dtype, i)
                want = simulate(xs, collective, codec)[rank]
                out = torch.empty_like(want)
                got = ops.comm_quant(xs[rank], collective, codec, None, out=out)
                assert got is out and equal(got, want), (collective, str(codec))
    for collective in COLLECTIVES:
        for shape in ((0, 64), (3, 0), (1, 32)):
            xs = inputs(world, shape, torch.float16, 0)
            assert equal(ops.comm_quant(xs[rank], collective, INT8, None), simulate(xs, collective, INT8)[rank])
    xs = inputs(world, (2, 3, 32), torch.bfloat16, 5)
    assert equal(ops.comm_quant(xs[rank], "all_reduce", INT8, None), simulate(xs, "all_reduce", INT8)[rank])
    own = Codec(INT8.format, quantize_own=False)
    for collective in ("all_reduce", "reduce_scatter", "all_to_all"):
        xs = inputs(world, (world, 32), torch.bfloat16, 6)
        assert equal(ops.comm_quant(xs[rank], collective, own, None), simulate(xs, collective, own)[rank])


def uneven(ops: CpuReference, rank: int, world: int) -> None:
    matrix = [[(r + 2 * c) % 3 for c in range(world)] for r in range(world)]
    rows = {
        "all_to_all": (matrix, [sum(row) for row in matrix]),
        "reduce_scatter": ([[*range(world)]] * world, [sum(range(world))] * world),
        "all_gather": ([[*range(1, world + 1)]] * world, [*range(1, world + 1)]),
    }
    for collective, (splits, counts) in rows.items():
        xs = [inputs(1, (n, 64), torch.bfloat16, r)[0] for r, n in enumerate(counts)]
        for decode in (True, False) if collective != "reduce_scatter" else (True,):
            want = simulate(xs, collective, INT8, splits, decode=decode)[rank]
            got = ops.comm_quant(xs[rank], collective, INT8, None, splits=splits[rank], decode=decode)
            assert type(got) is type(want) and equal(got, want), collective


def under_way(ops: CpuReference, rank: int, world: int) -> None:
    """Two at once; x may be overwritten as soon as the call returns."""
    a, b = inputs(world, (4, 64), torch.float32, 1), inputs(world, (5, 64), torch.float32, 2)
    plain = Codec(Format.parse("fp32"), quantize_own=False)
    wants = simulate(a, "all_reduce", plain)[rank], simulate(b, "all_to_all", INT8)[rank]
    first = ops.comm_quant(a[rank], "all_reduce", plain, None, async_op=True)
    second = ops.comm_quant(b[rank], "all_to_all", INT8, None, async_op=True)
    a[rank].zero_()
    b[rank].zero_()
    assert equal(first.wait(), wants[0]) and equal(second.wait(), wants[1]) and first.wait() is first.wait()


def misused(ops: CpuReference) -> None:
    """Wrong in the same way on every rank: each gets its own clear error, and the group is as good as new."""
    x, calls = torch.ones(4, 64), []
    calls.append((FormatError, "out is", lambda: ops.comm_quant(x, "all_reduce", INT8, None, out=torch.ones(4, 63))))
    calls.append(
        (FormatError, "leave it out", lambda: ops.comm_quant(x, "all_gather", INT8, None, decode=False, out=x))
    )
    calls.append(
        (UnsupportedError, "spikes", lambda: ops.comm_quant(x, "all_to_all", Codec(INT8.format, spikes=2), None))
    )
    calls.append((CommError, "group is a str", lambda: ops.comm_quant(x, "all_reduce", INT8, "world")))
    for kind, words, call in calls:
        try:
            call()
        except kind as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{words}: accepted")


def disagreeing(ops: CpuReference, rank: int, world: int) -> None:
    last = rank == world - 1
    x, other = torch.ones(5, 64), Codec(Format.parse("int8.g64*fp16"))
    calls = {
        "codec": lambda: ops.comm_quant(x, "all_reduce", other if last else INT8, None),
        "option": lambda: ops.comm_quant(x, "all_reduce", Codec(INT8.format, requantize=False) if last else INT8, None),
        "rule": lambda: ops.comm_quant(
            x, "all_gather", Codec(Format.parse("int8.g32*fp16@scale=rcp")) if last else INT8, None
        ),
        "version": lambda: ops.comm_quant(x, "all_reduce", Codec(INT8.format, version=2) if last else INT8, None),
        "shape": lambda: ops.comm_quant(x[:3] if last else x, "all_gather", INT8, None),
        "dtype": lambda: ops.comm_quant(x.half() if last else x, "all_to_all", INT8, None),
        "collective": lambda: ops.comm_quant(x, "all_gather" if last else "all_reduce", INT8, None),
        "splits": lambda: ops.comm_quant(
            x, "reduce_scatter", INT8, None, splits=part_rows(5, world)[:: -1 if last else 1]
        ),
        "some split": lambda: ops.comm_quant(x, "all_to_all", INT8, None, splits=part_rows(5, world) if last else None),
        "one refuses": lambda: ops.comm_quant(x.double() if last else x, "reduce_scatter", INT8, None),
        "columns": lambda: ops.comm_quant(
            x[:, :32] if last else x, "all_to_all", INT8, None, splits=part_rows(5, world)
        ),
    }
    for name, call in calls.items():
        try:
            call()
        except CommError as error:
            print(json.dumps([name, str(error)]), flush=True)
        else:
            raise AssertionError(f"{name}: rank {rank} did not notice")
    misused(ops)
    assert equal(ops.comm_quant(x, "all_reduce", INT8, None), simulate([x] * world, "all_reduce", INT8)[rank])


def parted(ops: CpuReference, rank: int, world: int) -> None:
    """Groups that are not the world."""
    members = [world - 1, *range(0, world - 1, 2)]
    group = dist.new_group(members)
    xs = inputs(world, (3, 64), torch.bfloat16, 3)
    if rank in members:
        mine = sorted(members)
        want = simulate([xs[r] for r in mine], "all_reduce", INT8)[mine.index(rank)]
        assert equal(ops.comm_quant(xs[rank], "all_reduce", INT8, group), want)
        return
    try:
        ops.comm_quant(xs[rank], "all_reduce", INT8, group)
    except CommError as error:
        assert "not in the group" in str(error)
    else:
        raise AssertionError("a rank outside the group took part")


def lost(ops: CpuReference, rank: int, world: int) -> None:
    """The last rank first answers late, then dies; nobody waits for ever."""
    late, gone = (dist.new_group(timeout=timedelta(seconds=3)) for _ in range(2))
    last = rank == world - 1
    for group in (late, gone):
        dist.barrier(group)
        if last and group is gone:
            print(json.dumps(["gone", ""]), flush=True)
            os._exit(0)
        if last:
            time.sleep(5)
            continue
        began = time.monotonic()
        try:
            ops.comm_quant(torch.ones(4, 64), "all_reduce", INT8, group)
        except CommError as error:
            assert "died" in str(error) and "timeout" in str(error) and time.monotonic() - began < 30
        else:
            raise AssertionError("a lost rank was not missed")
        if group is late:
            time.sleep(max(0.0, began + 5 - time.monotonic()))


def main() -> None:
    rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    ops = CpuReference()
    agreeing(ops, rank, world)
    uneven(ops, rank, world)
    under_way(ops, rank, world)
    if world > 1:
        disagreeing(ops, rank, world)
        parted(ops, rank, world)
    print(json.dumps(["done", ""]), flush=True)
    if world == 2:
        lost(ops, rank, world)
    os._exit(0)  # peers may be gone: no orderly shutdown


if __name__ == "__main__":
    main()
