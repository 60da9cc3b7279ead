"""Deliberately wrong calls, and the level that refuses each: proof that the levels see what they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import qhal_npu_emulation as emulation
from qhal.errors import UnsupportedError
from qhal.formats import Format
from qhal.requests import GemmRequest
from qhal_conformance.cases import Case
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_npu import calls, running
from qhal_npu.ops import NpuOps


@dataclass(frozen=True)
class Wrong:
    """A call that must not pass. level: which one refuses it; text: a part of what it says."""

    name: str
    level: str
    text: str
    call: Callable[[], Any]


def plain() -> list[dict[str, Any]]:
    """The calls that need no device: plan, schema, meta, emulated."""
    emulation.ops("A2")
    return [_tried(w) for w in WRONG]


def on_device() -> list[dict[str, Any]]:
    """The calls that the wheel's host code refuses, or this backend behind it. On a stand-in with a device."""
    return [_tried(Wrong("ND where NZ is needed", "L1 host", "left a weight in ND", _stays_nd))]


def _tried(w: Wrong) -> dict[str, Any]:
    try:
        w.call()
    except Exception as error:
        said = str(error).splitlines()[0]
        return {"call": w.name, "level": w.level, "refused": w.text in str(error), "said": " ".join(said.split())[:160]}
    return {"call": w.name, "level": w.level, "refused": False, "said": "it passed"}


def _meta(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _untransposed() -> None:
    calls.quant_matmul(_meta(4, 64), _meta(32, 64), _meta(32, dtype=torch.float32), torch.bfloat16)


def _misspelt() -> None:
    scale = _meta(32, dtype=torch.float32)
    calls.quant_matmul(_meta(4, 64), _meta(64, 32), scale, torch.bfloat16, per_token_scale=scale)


def _bf16_scale() -> None:
    calls.quant_matmul(_meta(4, 64), _meta(64, 32), _meta(32, dtype=torch.bfloat16), torch.float16)


def _float_bias() -> None:
    words, rows = _meta(1, 64, dtype=torch.int64), _meta(4, 1, dtype=torch.float32)
    more = {"pertoken_scale": rows, "bias": _meta(64, dtype=torch.float32)}
    calls.quant_matmul(_meta(4, 64), _meta(64, 8, dtype=torch.int32), words, torch.bfloat16, **more)


def _padded_rows() -> None:
    q, rows = _meta(6, 4, 128, dtype=torch.bfloat16), _meta(2, 3, 4, 128, dtype=torch.bfloat16)
    calls.fused_attention_v2(
        q, rows, rows, num_query_heads=4, input_layout="TND", actual_seq_qlen=[3, 6], actual_seq_kvlen=[3, 6]
    )


def _int8_prefill() -> None:
    q, pages = torch.zeros(1, 2, 4, 64).bfloat16(), torch.zeros(1, 128, 256, dtype=torch.int8)
    more = {f"{n}_antiquant_scale": torch.ones(4).bfloat16() for n in ("key", "value")}
    modes = {f"{n}_antiquant_mode": 2 for n in ("key", "value")}
    calls.fused_attention(
        q, pages, pages, num_heads=4, input_layout="BSND", actual_seq_lengths_kv=[20], block_size=128,
        block_table=torch.zeros(1, 1, dtype=torch.int32), **more, **modes,
    )  # fmt: skip


def _without_scale_bias() -> None:
    kept = running._int4_8

    def careless(p: Any, arch: str) -> Any:
        p.kernel["scale_bias"] = torch.zeros_like(p.kernel["scale_bias"])
        return kept(p, arch)

    running._int4_8 = careless
    try:
        shape = (("m", 17), ("n", 64), ("k", 160))
        outcome = run_case(
            Case("gemm", "int4.row*fp32~int8.row*fp32", shape, "bf16", "normal"), emulation.ops("A2")
        ).outcome
    finally:
        running._int4_8 = kept
    if outcome.status is Status.FAIL:
        raise ValueError(outcome.reason)


def _planned(w: str, x: str, arch: str, **more: Any) -> Callable[[], None]:
    request = replace(GemmRequest(w=Format.parse(w), n=64, k=128, x=(Format.parse(x),)), **more)

    def ask() -> None:
        answer = NpuOps(arch, "meta").supports(request)
        if not answer:
            raise UnsupportedError(answer, request)

    return ask


def _stays_nd() -> None:
    kept = calls._allow_internal_format

    def forgotten(w: torch.Tensor) -> None:
        calls.runtime().config.allow_internal_format = False

    calls._allow_internal_format = forgotten
    try:
        calls.to_nz(torch.zeros(64, 64, dtype=torch.int8).to("npu:0"))
    finally:
        calls._allow_internal_format = kept


_W8, _MX, _ASYMMETRIC = "int8.row*fp32", "e4m3fn.g32*e8m0", "int8-fp32.row*fp32"
WRONG = (
    Wrong("weight not transposed", "L1 meta", "k dim of x1 and x2 need be same", _untransposed),
    Wrong("misspelt keyword", "L1 schema", "per_token_scale", _misspelt),
    Wrong("bf16 scale with fp16 output", "L1 meta", "scale", _bf16_scale),
    Wrong("float scale_bias to npu_quant_matmul", "L1 meta", "bias's type should be torch.int32", _float_bias),
    Wrong("padded rows as TND", "L1 meta", "should equal to query's dim3", _padded_rows),
    Wrong("two queries over int8 pages", "L2 emulated", "torch.int8", _int8_prefill),
    Wrong("int8 x int4 without scale_bias", "L2 emulated", "outside their bound", _without_scale_bias),
    Wrong("microscaling on an A2", "plan", "documented for A5", _planned(_MX, _MX, "A2")),
    Wrong("too many columns", "plan", "last-axis", _planned(_W8, _W8, "A2", n=70000)),
    Wrong("asymmetric weight under int8", "plan", "one-scale-each", _planned(_ASYMMETRIC, _W8, "A2")),
    Wrong("quantized inputs on a 310P", "plan", "generation", _planned(_W8, _W8, "310P")),
)
