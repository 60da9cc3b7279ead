"""What only moves bytes: quantize, quant_kv, Hadamard; bytes are those read and written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from cuda_rows.bench import Bench, Call, Group, Measured
from qhal.caches import KVCache
from qhal.formats import Format
from qhal.requests import HadamardRequest, KVRequest, QuantizeRequest
from qhal.rotations import Hadamard, kinds, sylvester

D, MS = 8192, (1, 16, 64, 256, 8192)
QUANTIZED = {
    "fp8-row": ("e4m3fn.row*fp32", {"quant_mode": "dynamic_token", "quant_dtype": "float8e4m3"}),
    "int8-row": ("int8.row*fp32", {"quant_mode": "dynamic_token", "quant_dtype": "int8"}),
    "fp8-g128": (
        "e4m3fn.g128*fp32",
        {"quant_mode": "dynamic_group", "quant_dtype": "float8e4m3", "quant_group_size": 128},
    ),
}
ELEMENTS = 64 << 20


def quantize(name: str, bench: Bench, wanted: Sequence[str]) -> Iterator[Measured]:
    """x [M, 8192] bf16 to codes and computed scales."""
    fmt = Format.parse(QUANTIZED[name][0])
    answer = bench.ops.supports(QuantizeRequest(x=torch.bfloat16, format=fmt))
    kernel = answer and answer.graph
    for m in MS:
        row = f"quantize-{name}/m{m}"
        if row not in wanted:
            continue
        xs = [torch.randn(m, D, device=bench.device, dtype=torch.bfloat16) for _ in range(1 if m < 8192 else 3)]
        us, note = bench.ours(answer, lambda xs=xs: [partial(bench.ops.quantize, x, fmt) for x in xs])
        nbytes = int(m * D * (2 + fmt.bits / 8)) + 4 * m
        yield Measured(
            row, us, answer.executes, "", bench.peers({"humming": lambda xs=xs: _process(xs, name)}),
            floor_us=bench.floor(nbytes, 0, "bf16"), bytes=nbytes, note=note if kernel or note else "",
        )  # fmt: skip


def _process(xs: list[Tensor], name: str) -> list[Call]:
    from humming import ops

    return [partial(ops.process_input, x, **QUANTIZED[name][1]) for x in xs]  # type: ignore[arg-type]


def quant_kv(bench: Bench, wanted: Sequence[str]) -> Iterator[Measured]:
    """New rows of 8 x 128 keys and values into pages of 16."""
    for name, text in (("fp8", "e4m3fn.tensor*fp32"), ("fp8-row", "e4m3fn.row*fp32"), ("int8-row", "int8.row*fp32")):
        fmt = Format.parse(text)
        request = KVRequest(kind="mha", k=fmt, v=fmt, heads=8, k_dim=128, v_dim=128, page=16)
        answer = bench.ops.supports(request)
        for tokens in (64, 16384):
            row = f"quant-kv-{name}/t{tokens}"
            if row not in wanted:
                continue
            k, v = (torch.randn(tokens, 8, 128, device=bench.device, dtype=torch.bfloat16) for _ in "kv")
            cache = KVCache.allocate(request, 2048, bench.device)
            slots = torch.randperm(2048 * 16, device=bench.device)[:tokens].int()
            us, note = bench.ours(
                answer,
                lambda k=k, v=v, cache=cache, slots=slots: [partial(bench.ops.quant_kv, k, v, cache, slots)],
            )
            nbytes = int(2 * tokens * 8 * 128 * (2 + fmt.bits / 8))
            yield Measured(
                row, us, answer.executes, "", bench.peers({"flashinfer append": partial(_append, k, v, slots)}),
                {"flashinfer append": "casts nothing: the input is fp8 already"},
                bench.floor(nbytes, 0, "bf16"), nbytes, note=note,
            )  # fmt: skip


def _append(k: Tensor, v: Tensor, slots: Tensor) -> list[Call]:
    import flashinfer

    on, tokens = k.device, len(k)
    k8, v8 = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    planes = tuple(torch.zeros(2048, 16, 8, 128, device=on, dtype=k8.dtype) for _ in "kv")
    pages = torch.arange(2048, device=on, dtype=torch.int32)
    one = torch.zeros(tokens, device=on, dtype=torch.int32)
    indptr, last = torch.tensor([0, 2048], device=on, dtype=torch.int32), torch.tensor([16], device=on).int()
    return [partial(flashinfer.append_paged_kv_cache, k8, v8, one, slots, planes, pages, indptr, last, kv_layout="NHD")]


SIZES = (64, 128, 512, 1024, 4096, 8192, 16384)


def hadamard(bench: Bench, wanted: Sequence[str]) -> Iterator[Measured]:
    """64 Mi elements of bf16 turned in blocks."""
    for n in SIZES:
        row = f"hadamard/n{n}"
        if row not in wanted:
            continue
        chain = (Hadamard(n),)
        answer = bench.ops.supports(HadamardRequest(kinds=kinds(chain), n=n, x=torch.bfloat16))
        x = torch.randn(ELEMENTS // n, n, device=bench.device, dtype=torch.bfloat16)
        us, note = bench.ours(answer, lambda x=x, chain=chain: [partial(bench.ops.hadamard, x, chain)])
        h = (sylvester(n) / n**0.5).to(bench.device, torch.bfloat16)
        peers = {"torch x@H": lambda x=x, h=h: [partial(torch.mm, x, h)]}
        if n <= 512:
            peers["humming"] = lambda x=x, n=n: _turned(x, n)
        nbytes = 4 * ELEMENTS
        yield Measured(
            row, us, answer.executes, "", bench.peers(peers), floor_us=bench.floor(nbytes, 0, "bf16"), bytes=nbytes,
            note=note,
        )  # fmt: skip


def _turned(x: Tensor, n: int) -> list[Call]:
    from humming import ops

    return [partial(ops.process_input, x, hadamard_block_size=n)]


GROUPS = (
    *(Group(tuple(f"quantize-{name}/m{m}" for m in MS), partial(quantize, name)) for name in QUANTIZED),
    Group(tuple(f"quant-kv-{n}/t{t}" for n in ("fp8", "fp8-row", "int8-row") for t in (64, 16384)), quant_kv),
    Group(tuple(f"hadamard/n{n}" for n in SIZES), hadamard),
)
