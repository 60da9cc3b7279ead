"""The calls that a request stands for, with operands of no meaning: what is compiled ahead of time.

Rows come in the buckets for which tiles differ, each once as a multiple of 16 and once not: Triton compiles both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qhal.caches import KVCache, Limits
from qhal.elements import element
from qhal.formats import Format
from qhal.groups import Groups, Indexed, Masked, Offsets
from qhal.requests import AttentionRequest, GemmRequest, GroupedRequest, KVRequest, QuantizeRequest, Request
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_triton.gemm.weights import random_weight
from qhal_triton.ops import TritonOps

ROWS = (1, 2, 16, 24, 32, 48, 64, 72, 128, 136, 256, 264, 512, 1000, 1024, 2048)
SEQUENCES = (1, 2, 16, 24, 64)
TABLE_PAGES = 64


def calls(ops: TritonOps, request: Request) -> bool:
    """Makes them; False where nothing here knows how."""
    if isinstance(request, GemmRequest):
        return _gemm(ops, request)
    if isinstance(request, GroupedRequest):
        return _grouped(ops, request)
    if isinstance(request, QuantizeRequest):
        return _quantize(ops, request)
    if isinstance(request, KVRequest):
        return _kv(ops, request)
    return isinstance(request, AttentionRequest) and _attention(ops, request)


def _gemm(ops: TritonOps, r: GemmRequest) -> bool:
    w = _weight(r)
    if w is None or r.operand is not None:
        return False
    bias = torch.zeros(r.n) if r.bias else None
    prepared = ops.prepare(w, replace(r, graph=False), inputs=_inputs(r), bias=bias)
    for rows in _rows(r.m):
        ops.gemm(torch.zeros(rows, r.k, dtype=_dtype(r)), prepared)
    return True


def _grouped(ops: TritonOps, r: GroupedRequest) -> bool:
    one = _weight(r.gemm)
    if one is None or r.gemm.operand is not None:
        return False
    stacked = one.expand(r.experts, -1, -1) if isinstance(one, Tensor) else QTensor.stack([one] * r.experts)
    request = replace(r, gemm=replace(r.gemm, graph=False))
    bias = torch.zeros(r.experts, r.gemm.n) if r.gemm.bias else None
    prepared = ops.prepare(stacked, request, inputs=_inputs(r.gemm), bias=bias)
    for rows in _rows(r.gemm.m):
        x, groups = _experts(r, rows)
        ops.grouped_gemm(x, prepared, groups)
    return True


def _experts(r: GroupedRequest, rows: int) -> tuple[Tensor, Groups]:
    kind, k = _dtype(r.gemm), r.gemm.k
    if r.groups == "masked":
        return torch.zeros(r.experts, rows, k, dtype=kind), Masked(torch.full((r.experts,), rows, dtype=torch.int32))
    if r.groups == "offsets":
        ends = (torch.arange(r.experts + 1) * rows // r.experts).to(torch.int32)
        return torch.zeros(rows, k, dtype=kind), Offsets(ends)
    ids = torch.arange(rows * r.top_k).reshape(rows, r.top_k).remainder(r.experts).to(torch.int32)
    return torch.zeros(rows, k, dtype=kind), Indexed(ids, None)


def _quantize(ops: TritonOps, r: QuantizeRequest) -> bool:
    operand = Operand(r.format, scale=torch.ones(1) if r.static else None)
    for rows in ROWS:
        ops.quantize(torch.zeros(rows, 4096, dtype=r.x), operand)
    return True


def _kv(ops: TritonOps, r: KVRequest) -> bool:
    layout, planes = ops.kv_planes(r)
    cache = KVCache.allocate(r, 2, "cpu", planes=planes, layout=layout)
    for rows in ROWS:
        k, v = (torch.zeros(rows, r.heads, d, dtype=torch.bfloat16) for d in (r.k_dim, r.v_dim))
        ops.quant_kv(k, v, cache, torch.full((rows,), -1, dtype=torch.int64))
    return True


def _attention(ops: TritonOps, r: AttentionRequest) -> bool:
    if r.tree:
        return False
    request = replace(r, graph=False)
    layout, planes = ops.kv_planes(r.kv, attention=[request])
    cache = KVCache.allocate(r.kv, TABLE_PAGES, "cpu", planes=planes, layout=layout)
    width = r.kv.k_dim + r.kv.v_dim if r.kv.kind == "mla" else r.kv.k_dim
    sinks = torch.zeros(r.heads) if r.sinks else None
    for sequences, new in _steps(r):
        batch = ops.attention_batch(request, Limits(sequences, sequences * new, TABLE_PAGES))
        lens = torch.full((sequences,), new, dtype=torch.int32)
        table = torch.zeros(sequences, TABLE_PAGES, dtype=torch.int32)
        batch.plan(lens, torch.full_like(lens, max(new, TABLE_PAGES * r.kv.page)), table)
        q = torch.zeros(sequences * new, r.heads, width, dtype=r.out)
        ops.attention(q, cache, batch, sinks=sinks)
    return True


def _steps(r: AttentionRequest) -> Iterator[tuple[int, int]]:
    """(sequences, new tokens of each)."""
    if r.phase != "prefill":
        yield from ((count, 1) for count in SEQUENCES)
    if r.phase != "decode":
        yield from ((1, min(new, TABLE_PAGES * r.kv.page)) for new in (24, 128, 512))


def _weight(r: GemmRequest) -> QTensor | Tensor | None:
    if not isinstance(r.w, Format):
        return None
    if r.w.plain:
        return torch.zeros(r.n, r.k, dtype=element(r.w.element).storage)
    return random_weight(r.w, (r.n, r.k), torch.Generator().manual_seed(0), index=r.group_index)


def _inputs(r: GemmRequest) -> list[Operand]:
    given = (*r.static, *(False for _ in r.x))
    one = torch.ones(1)
    return [
        Operand(f, scale=one if fixed else None, zero=one if fixed and f.zero is not None else None)
        for f, fixed in zip(r.x, given, strict=False)
        if not f.plain
    ]


def _dtype(r: GemmRequest) -> torch.dtype:
    named = {"fp16": torch.float16, "fp32": torch.float32}
    return r.out or named.get(r.x[0].element, torch.bfloat16)


def _rows(m: tuple[int, int]) -> list[int]:
    return [rows for rows in ROWS if m[0] <= rows <= m[1]]
