"""grouped_gemm: experts N = 3072, K = 4096, top-8 random routing, int4 weights in groups of 128."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cuda_rows import humming_peer
from cuda_rows.bench import Bench, Call, Group, Measured, codes
from cuda_rows.gemm import _LOOSER
from qhal.formats import Format
from qhal.groups import Offsets
from qhal.requests import GemmRequest, GroupedRequest

N, K, TOP = 3072, 4096, 8
W, X = Format.parse("int4.g128*bf16"), Format.parse("bf16")
EXPERTS, TOKENS = (64, 128), (1, 16, 256, 4096)


def run(experts: int, bench: Bench, wanted: Sequence[str]) -> Iterator[Measured]:
    """All experts once; a single token changes its experts from call to call, so that the cache is cold."""
    device = bench.device
    gemm = GemmRequest(w=W, n=N, k=K, x=(X,), m=(1, TOKENS[-1] * TOP), graph=True)
    request = GroupedRequest(gemm=gemm, experts=experts, groups="offsets", top_k=TOP)
    answer = bench.ops.supports(request)
    w = codes(W, (experts, N, K), device)
    prepared = bench.ops.prepare(w, request) if answer and answer.graph else None
    del w
    for tokens in TOKENS:
        row = f"grouped-w4a16/e{experts}/t{tokens}"
        if row not in wanted:
            continue
        routed = [_routing(experts, tokens, turn, device) for turn in range(8 if tokens == 1 else 1)]
        x = torch.randn(tokens * TOP, K, device=device, dtype=torch.bfloat16)
        us, note = bench.ours(
            answer,
            lambda x=x, routed=routed: [partial(bench.ops.grouped_gemm, x, prepared, Offsets(o)) for o, _ in routed],
        )
        touched = sum(count for _, count in routed) / len(routed)
        peers = {
            "torch bf16": lambda x=x, routed=routed: _torch(experts, x, [o for o, _ in routed]),
            "humming": lambda x=x, routed=routed: _humming(experts, x, [o for o, _ in routed]),
        }
        nbytes = int(touched * N * K * W.bits / 8)
        yield Measured(
            row, us, answer.executes, answer.numerics.label if answer.numerics is not None else "",
            bench.peers(peers), dict(_LOOSER),
            bench.floor(nbytes + tokens * TOP * 2 * (N + K), 2.0 * tokens * TOP * N * K, "bf16"), nbytes, note=note,
        )  # fmt: skip
    _MADE.clear()
    _made.cache_clear()


def _routing(experts: int, tokens: int, turn: int, device: torch.device) -> tuple[Tensor, int]:
    """int32 [E + 1] offsets of top-8 of random scores, and how many experts have rows."""
    chance = torch.Generator().manual_seed(turn + 8 * tokens)
    if tokens == 1:
        ids = (torch.arange(TOP) + turn * TOP) % experts
    else:
        ids = torch.rand(tokens, experts, generator=chance).topk(TOP).indices.reshape(-1)
    counts = torch.bincount(ids, minlength=experts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    return offsets.to(device), int((counts > 0).sum())


_MADE: dict[str, Any] = {}


def _torch(experts: int, x: Tensor, offsets: list[Tensor]) -> list[Call]:
    if "bf16" not in _MADE:
        _MADE["bf16"] = torch.randn(experts, N, K, device=x.device, dtype=torch.bfloat16)
    dense = _MADE["bf16"]
    return [partial(torch._grouped_mm, x, dense.transpose(1, 2), offs=o[1:].contiguous()) for o in offsets]


@cache
def _made(experts: int) -> Any:
    weight = {"dtype": "uint4", "group_size": 128}
    return humming_peer.made(weight, None, N, K, [t * TOP for t in TOKENS], experts)


def _humming(experts: int, x: Tensor, offsets: list[Tensor]) -> list[Call]:
    config, tensors, compute, tuning = _made(experts)
    how = {"compute_config": compute, "tuning_config": tuning, **tensors}
    locks = torch.zeros(2048, dtype=torch.int32, device=x.device)
    from humming.forward import humming_forward

    return [partial(humming_forward, config, x, expert_layout=o.long(), locks=locks, **how) for o in offsets]


GROUPS = tuple(
    Group(tuple(f"grouped-w4a16/e{e}/t{t}" for t in TOKENS), partial(run, e), {"humming": partial(_made, e)})
    for e in EXPERTS
)
