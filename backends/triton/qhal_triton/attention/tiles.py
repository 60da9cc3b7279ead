"""What compile checks ask for: decode and prefill over every kind of cache, and how engines hold Q and P."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qhal.caches import Limits
from qhal.formats import Format
from qhal.requests import AttentionRequest, KVRequest
from qhal_triton.attention.batch import constants
from qhal_triton.attention.config import config, words
from qhal_triton.attention.kernels.attend import attend
from qhal_triton.attention.kernels.merge import merge
from qhal_triton.attention.paths import arithmetic
from qhal_triton.kv.tiles import MHA, MLA, kind, pointers
from qhal_triton.target import Target
from qhal_triton.tiles import Tile

_DECODE, _PREFILL = Limits(64, 64, 512), Limits(4, 8192, 512)
_OPERANDS = (
    ("e4m3fn.tensor*fp32", "e4m3fn.tensor*fp32", "e4m3fn.tensor*fp32", "e4m3fn.tensor*fp32"),
    ("int8.row*fp32", "int8.row*fp32", "int8.row*fp32", "int8.tensor*fp32"),
    ("bf16", "bf16", "bf16", "fp32"),
    ("fp16", "fp16", "fp16", "fp16"),
)
"""(k, v, q, p) of what is not held in bf16."""
_ALIGNED = ("k_page", "k_slot", "k_head", "v_page", "v_slot", "v_head")
_SPILLS = {"mla": 1024, "prefill": 384}
"""Bytes (AMD: registers) of a thread: values of 512 features, or of 128 rows, leave few registers for their keys."""
_FEW_WARPS = 128
"""The same where one or two warps hold a tile: addresses of the results, put aside before the loop over keys."""


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    for k, v in MHA:
        yield _tile(_request(k, v, "decode"), _DECODE, target)
    for k, v in (MHA[0], MHA[1], MHA[4], MHA[6]):
        yield _tile(_request(k, v, "prefill"), _PREFILL, target)
    for k, v, q, p in _OPERANDS:
        yield _tile(_request(k, v, "decode", q, p), _DECODE, target)
    for k, v in MLA:
        yield _tile(_request(k, v, "decode", mla=True), _DECODE, target)
    yield _merge()


def _merge() -> Tile:
    known = dict.fromkeys(("partial", "partial_max", "partial_sum", "sinks", "lse"), "*fp32") | {"out": "*bf16"}
    constants_ = {"COLS": 64, "ALL": 16}
    signature = {n: known.get(n, "i32") for n in merge.arg_names if n not in constants_}
    return Tile(name="attention.merge", fn=merge, signature=signature, constants=constants_, options={"num_warps": 4})


def _request(k: str, v: str, phase: str, q: str = "bf16", p: str = "bf16", mla: bool = False) -> AttentionRequest:
    dims = (512, 64) if mla else (128, 128)
    return AttentionRequest(
        kv=KVRequest(
            kind="mla" if mla else "mha", k=Format.parse(k), v=Format.parse(v), heads=1 if mla else 8,
            k_dim=dims[0], v_dim=dims[1], page=64 if mla else 16,
        ),
        heads=128 if mla else 32, scale=0.1, phase="decode" if phase == "decode" else "prefill",
        q=Format.parse(q), p=Format.parse(p), out=torch.float16 if q == "fp16" else torch.bfloat16,
    )  # fmt: skip


def _tile(request: AttentionRequest, limits: Limits, target: Target) -> Tile:
    a = arithmetic(request)
    assert a is not None
    c = config(request, a, limits, target)
    fixed = constants(request, a, c, target)
    known = dict.fromkeys(("sinks", "weight_scale", "lse", "partial", "partial_max", "partial_sum"), "*fp32")
    known |= {"plan": "*i32", "table": "*i32", "tree": "*u8", "q_outer": "*fp32", "scale": "fp32", "softcap": "fp32"}
    known |= {
        "q": kind(a.q.element),
        "p": kind(a.rope.element),
        "out": f"*{'fp16' if a.q.element == 'fp16' else 'bf16'}",
    }
    known |= {"q_scale": kind(a.q.scale), "p_scale_of_q": kind(a.rope.scale), "q_zero": kind(a.q.zero)}
    known |= pointers(a.k, "k", "k_scale", "k_zero", "k_outer") | pointers(a.v, "v", "v_scale", "v_zero", "v_outer")
    known |= {plane: "*i16" for plane, paired in zip("kv", words(request, a, c.m, target), strict=True) if paired}
    formats = f"{request.kv.k} {request.kv.v} q={request.q} p={request.p}"
    return Tile(
        name=f"attention.attend[{request.kv.kind} {request.phase} {formats}]",
        fn=attend,
        signature={n: known.get(n, "i32:16" if n in _ALIGNED else "i32") for n in attend.arg_names if n not in fixed},
        constants=fixed,
        options={"num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": True},
        matrix=True,
        native="16",
        spills=_SPILLS.get(request.kv.kind, _SPILLS.get(request.phase, _FEW_WARPS if c.warps < 4 else 0)),
    )
