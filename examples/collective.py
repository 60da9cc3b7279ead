"""A quantized all-reduce: what it saves, what it costs, and that every rank ends with the same bits.

First four ranks in this process (`simulate`, the definition), then two real processes over gloo.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import qhal
from qhal import Codec, Format
from qhal.collectives import simulate

INT8 = Codec(Format.parse("int8.g32*fp16"))  # groups of 32 columns share an fp16 scale: 8.5 bits instead of 16


def inputs(world: int) -> list[torch.Tensor]:
    """What each rank wants summed, bf16 [8, 256]."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(8, 256, generator=g).bfloat16() for _ in range(world)]


def rank(r: int, world: int, rendezvous: str) -> None:
    """One process of the group; the operation takes any torch.distributed group (None: all ranks)."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=r, world_size=world)
    ops = qhal.select("cpu_reference")
    mine = inputs(world)[r]
    total = ops.comm_quant(mine, "all_reduce", INT8, None)
    assert torch.equal(total, simulate(inputs(world), "all_reduce", INT8)[r])  # the same bits as the definition
    try:  # a rank with another codec: all ranks get the same error, and none waits for ever
        ops.comm_quant(mine, "all_reduce", INT8 if r == 0 else Codec(Format.parse("int4.g32*fp16")), None)
        raise AssertionError("ranks that disagree must not sum")
    except qhal.CommError as error:
        if r == 0:
            print("ranks that disagree:", str(error).splitlines()[0][:100])
    dist.destroy_process_group()


def main() -> None:
    xs = inputs(4)
    results = simulate(xs, "all_reduce", INT8)
    assert all(torch.equal(results[0], other) for other in results)
    exact = torch.stack([x.double() for x in xs]).sum(0)
    step = float(max(x.float().abs().max() for x in xs)) / 127  # the coarsest step of one rank's codes
    error = float((results[0].double() - exact).abs().max())
    print(f"4 ranks, {INT8.format.bits} bits a value: all equal, largest error {error:.4f}, one rank's step {step:.4f}")

    # the parts that travel are the bits of `quantize`: NaN stays visible instead of becoming a number
    xs[2][0, 5] = float("nan")
    spoilt = simulate(xs, "all_reduce", INT8)[0]
    assert bool(torch.isnan(spoilt[0, :32]).all()) and not bool(torch.isnan(spoilt[1:]).any())

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (2, f"{folder}/meet"), nprocs=2)
    print("2 processes over gloo: the bits of the simulation")


if __name__ == "__main__":
    main()
