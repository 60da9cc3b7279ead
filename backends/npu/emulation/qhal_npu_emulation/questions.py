"""One question for every path of the backend: what the host level runs, by kind and generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qhal.caches import KVCache, Limits
from qhal.encoding import encode
from qhal.formats import Format
from qhal.groups import Indexed, Offsets
from qhal.layer_formats import Activation, KVFormat
from qhal.layers import attention_request
from qhal.requests import AttentionRequest, GemmRequest, GroupedRequest, KVRequest
from qhal.specs import Operand
from qhal_npu.attention_table import operator
from qhal_npu.ops import NpuOps
from qhal_npu_emulation.attentions import ASKS, Ask, ask

_ALL, _OLD, _NEW = ("A2", "A3", "A5"), ("A2", "A3"), ("A5",)
_NZ, _V5, _ANTI = ("aclnnQuantMatmulWeightNz",), ("aclnnQuantMatmulV5",), ("aclnnWeightQuantBatchMatmulV2",)
_PLAIN, _EXPERTS = ("aclnnMm", "aclnnMatmul", "aclnnAddmm"), ("aclnnGroupedMatmulV5",)
_SCATTER = ("aclnnScatterNdUpdate",)


@dataclass(frozen=True)
class Question:
    """ask: runs it on a backend, results on the processor. entries: aclnn entry points, one of which must be reached.

    nz  the weight must arrive in FRACTAL_NZ
    """

    name: str
    on: tuple[str, ...]
    ask: Callable[[NpuOps], Tensor]
    entries: tuple[str, ...]
    nz: bool = False


def questions() -> list[Question]:
    """Every path."""
    w8, mx8, mx4 = "int8.row*fp32", "e4m3fn.g32*e8m0", "e2m1.g32*e8m0"
    offset, silu = "int8-fp32.tensor*fp32", Activation("silu")
    rows: list[tuple[str, tuple[str, ...], Callable[[NpuOps], Tensor], tuple[str, ...], bool]] = [
        ("W8A8 dynamic, NZ", _ALL, _gemm(w8, w8), _NZ, True),
        ("W8A8 dynamic, ND", _ALL, _gemm(w8, w8, n=48), _V5, False),
        ("W8A8 dynamic, fp16, bias", _ALL, _gemm(w8, w8, "fp16", bias=True), _NZ, True),
        ("W8A8 dynamic, fp32 result", _ALL, _gemm(w8, w8, out=torch.float32), _NZ, True),
        ("W8A8 static, bias", _ALL, _gemm(w8, "int8.tensor*fp32", static=True, bias=True), _NZ, True),
        ("W8A8 static with offset", _ALL, _gemm(w8, offset, static=True), _NZ, True),
        ("W8A8 static, fp16", _ALL, _gemm(w8, "int8.tensor*fp32", "fp16", static=True), _NZ, True),
        ("W8A16", _OLD, _gemm("int8.row*bf16", "bf16"), _ANTI, False),
        ("W8A16, groups, bias", _OLD, _gemm("int8.g32*bf16", "bf16", bias=True), _ANTI, False),
        ("W4A16, groups", _OLD, _gemm("int4.g32*bf16", "bf16"), _ANTI, False),
        ("W4A16, zero points", _OLD, _gemm("uint4-uint4.g64*fp16", "fp16", "fp16"), _ANTI, False),
        ("W4A8", _OLD, _gemm("int4.row*fp32", w8), _EXPERTS, False),
        ("W4A4", _OLD, _gemm("int4.row*fp32", "int4.row*fp32"), _V5, False),
        ("FP8, bias", _NEW, _gemm("e4m3fn.row*fp32", "e4m3fn.row*fp32", bias=True), _V5, False),
        ("FP8 blocks", _NEW, _gemm("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32", n=256, k=256), _V5, False),
        ("MXFP8, bias", _NEW, _gemm(mx8, mx8, bias=True), _V5, False),
        ("MXFP4", _NEW, _gemm(mx4, mx4), _V5, False),
        ("MXFP4 x MXFP8", _NEW, _gemm(mx4, mx8), _NZ, True),
        ("plain", _ALL, _gemm("bf16", "bf16"), _PLAIN, False),
        ("plain, fp32 bias", _ALL, _gemm("bf16", "bf16", bias=True), _PLAIN, False),
        ("experts, W8A8", _ALL, _experts(w8, w8), ("aclnnGroupedMatmulWeightNz",), True),
        ("experts, W8A8, silu", _ALL, _experts(w8, w8, silu), ("aclnnGroupedMatmulWeightNz",), True),
        ("experts, plain", _ALL, _experts("bf16", "bf16"), _EXPERTS, False),
        ("experts, decoded", _ALL, _experts("int4.g32*bf16", "bf16"), _EXPERTS, False),
        ("cache, int8 per head", _ALL, _cache("int8.head*fp32"), _SCATTER, False),
        ("cache, bf16", _ALL, _cache("bf16"), _SCATTER, False),
        ("attention, torch operators", _ALL, _attention, _SCATTER, False),
    ]
    rows += [(a.name, (on,), partial(_fused, a), (operator(a.line).aclnn[on],), False) for a in ASKS for on in a.on]
    return [Question(*row) for row in rows]


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _gemm(
    w: str, x: str, kind: str = "bf16", *, n: int = 64, k: int = 128, bias: bool = False, static: bool = False,
    out: torch.dtype | None = None,
) -> Callable[[NpuOps], Tensor]:  # fmt: skip
    wf, xf = Format.parse(w), Format.parse(x)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    request = GemmRequest(w=wf, n=n, k=k, x=(xf,), static=(static,), bias=bias, out=out)

    def ask(ops: NpuOps) -> Tensor:
        weight = _weight(_numbers(n, k, seed=1), wf)
        zero = torch.tensor([3.0]) if xf.zero is not None else None
        operand = Operand(xf, torch.tensor([0.03]), zero) if static else Operand(xf)
        made = ops.prepare(
            weight, request, inputs=() if xf.plain else (operand,), bias=_numbers(n, seed=2) if bias else None
        )
        return ops.gemm(_numbers(5, k).to(dtype).to(ops.device), made).cpu()

    return ask


def _weight(values: Tensor, f: Format) -> Tensor:
    return values.to(torch.bfloat16) if f.plain else encode(values, f)  # type: ignore[return-value]


def _experts(w: str, x: str, activation: Activation | None = None) -> Callable[[NpuOps], Tensor]:
    wf, xf = Format.parse(w), Format.parse(x)
    gemm = GemmRequest(w=wf, n=64, k=128, x=(xf,))
    request = GroupedRequest(gemm=gemm, experts=3, groups="offsets", activation=activation)

    def ask(ops: NpuOps) -> Tensor:
        made = ops.prepare(
            _weight(_numbers(3, 64, 128, seed=1), wf), request, inputs=() if xf.plain else (Operand(xf),)
        )
        x = _numbers(6, 128).to(torch.bfloat16).to(ops.device)
        offsets = torch.tensor([0, 2, 2, 6], dtype=torch.int32).to(ops.device)
        first = ops.grouped_gemm(x, made, Offsets(offsets))
        ids = torch.tensor([[0, 2], [1, -1]], dtype=torch.int32).to(ops.device)
        pairs = replace(request, groups="indexed", top_k=2)
        again = ops.prepare(_weight(_numbers(3, 64, 128, seed=1), wf), pairs, inputs=made.inputs)
        second = ops.grouped_gemm(x[:2], again, Indexed(ids))
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        return torch.cat([first.cpu(), second.cpu()])

    return ask


def _filled(ops: NpuOps, fmt: str, attention: tuple[AttentionRequest, ...] = ()) -> KVCache:
    f = Format.parse(fmt)
    request = KVRequest(kind="mha", k=f, v=f, heads=2, k_dim=64, v_dim=64, page=16)
    layout, planes = ops.kv_planes(request, attention=attention)
    return KVCache.allocate(request, 4, ops.device, planes=planes, layout=layout)


def _cache(fmt: str) -> Callable[[NpuOps], Tensor]:
    def ask(ops: NpuOps) -> Tensor:
        cache = _filled(ops, fmt)
        slots = torch.tensor([3, -1, 40], dtype=torch.int64).to(ops.device)
        k, v = (_numbers(3, 2, 64, seed=s).to(torch.bfloat16).to(ops.device) for s in (1, 2))
        ops.quant_kv(k, v, cache, slots)
        return torch.cat([cache.planes[f"{n}.codes"].cpu().float().flatten() for n in ("k", "v")])

    return ask


def _attention(ops: NpuOps) -> Tensor:
    """fp32 queries over int8 rows: no fused operator takes them."""
    f = Format.parse("int8.row*fp32")
    kv = KVFormat(name="layer", kind="mha", k=f, v=f, heads=2, k_dim=64, v_dim=64)
    request = attention_request(kv, torch.float32, page=16, heads=4, scale=0.125, phase="decode")
    cache = _filled(ops, "int8.row*fp32", (request,))
    slots = torch.arange(24, dtype=torch.int64).to(ops.device)
    k, v = (_numbers(24, 2, 64, seed=s).to(torch.bfloat16).to(ops.device) for s in (1, 2))
    ops.quant_kv(k, v, cache, slots)
    batch = ops.attention_batch(request, Limits(batch=2, tokens=2, pages=2))
    table = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32).to(ops.device)
    batch.plan(torch.tensor([1, 1]), torch.tensor([20, 7]), table)
    return ops.attention(_numbers(2, 4, 64).to(ops.device), cache, batch).cpu()


def _fused(a: Ask, ops: NpuOps) -> Tensor:
    found = ask(a, ops)
    o, lse = found.o.cpu(), found.lse
    return o if lse is None else torch.cat([o.float().flatten(), lse.cpu().flatten()])
