"""What this backend executes, for every request: one function per kind, each a list of reasons to refuse.

Whether a format can be quantized to is asked of its definition (`qhal.encodable`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import isfinite
from typing import get_args

import torch

from qhal.caches import canonical_planes
from qhal.codebooks import STRUCTURED, CodebookFormat
from qhal.codecs import refusals, row_wise
from qhal.elements import WIDE, element
from qhal.encodable import dense, encodable
from qhal.errors import QhalError
from qhal.formats import Format
from qhal.layer_formats import Activation
from qhal.named_tables import revision
from qhal.requests import (
    Arithmetic,
    AttentionRequest,
    CommRequest,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    KVRequest,
    NumericsClass,
    QuantizeRequest,
    Request,
    Support,
    VQRequest,
)
from qhal_portable.gemm import copy_class
from qhal_portable.hadamard import misfits
from qhal_portable.kv import STATIC

FLOATS = tuple(WIDE.values())
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu")
_NO_GRAPH = "no graph capture here; ask without graph"
Reasons = Iterator[str]


def support(request: Request, copies: tuple[torch.dtype, ...] = FLOATS, *, graphs: bool = False) -> Support:
    """The answer to any request, well-formed or not. copies: see `gemm.copy_class`; graphs: capture is no obstacle."""
    try:
        with torch.device("cpu"):  # engines ask while models are built on the meta device; the answer is the same
            return _support(request, revision(), copies, graphs)
    except Exception as fault:  # total by contract: a request that cannot be read is refused with the reason
        return Support("unsupported", f"the request cannot be read ({type(fault).__name__}: {fault})")


@lru_cache(maxsize=65536)
def _support(request: Request, tables: int, copies: tuple[torch.dtype, ...], graphs: bool) -> Support:
    """The answer while the named tables (Hadamard, codebooks) are at that revision."""
    if not isinstance(request, get_args(Request)):
        return Support("unsupported", f"{type(request).__name__} is no request of this interface")
    reasons = [r for r in dict.fromkeys(_reasons(request)) if not (graphs and r == _NO_GRAPH)]
    if not reasons:
        return _full(request, copies)
    return Support("unsupported", "; ".join(reasons), nearest=_nearest(request, reasons))


def _reasons(request: Request) -> Reasons:
    if isinstance(request, GemmRequest):
        yield from _gemm(request)
    elif isinstance(request, GroupedRequest):
        yield from _grouped(request)
    elif isinstance(request, KVRequest):
        yield from _kv(request)
    elif isinstance(request, AttentionRequest):
        yield from _attention(request)
    elif isinstance(request, QuantizeRequest):
        yield from _quantize(request)
    elif isinstance(request, HadamardRequest):
        yield from _hadamard(request)
    elif isinstance(request, VQRequest):
        yield from _sizes(n=request.n, k=request.k)
        yield from _codebooks(request.w)
        yield from _float(request.out, "out")
    elif isinstance(request, CommRequest):
        yield from refusals(request)


def _full(request: Request, copies: tuple[torch.dtype, ...]) -> Support:
    arithmetic = Arithmetic.of(request)
    inner = request.gemm if isinstance(request, GroupedRequest) else request
    layouts, invariant, numerics = ("canonical",), True, NumericsClass.EXACT
    if isinstance(inner, GemmRequest):
        layouts, invariant = (layout(inner),), inner.batch_invariant
        copy = copy_class(inner, copies) if isinstance(request, GemmRequest) else None
        numerics = NumericsClass.EXACT if copy is None else copy[1]
        executes = _gemm_words(inner, copy is not None)
    elif isinstance(request, AttentionRequest):
        executes = f"dequantize the cache, float64 softmax, P rounded to {request.p}, one rounding at the end"
    elif isinstance(request, HadamardRequest):
        executes, numerics = "float64 butterflies and matrices, one rounding at the end", NumericsClass.FP32_ACC
    elif isinstance(request, VQRequest):
        executes, numerics = "sum of codebook entries in fp32, one rounding", NumericsClass.FP32_ACC
    elif isinstance(request, CommRequest):
        executes, numerics = _comm_words(request), _comm_class(request)
        invariant = request.codec.quantize_own and row_wise(request.codec.format)
    else:
        executes = "qhal.encoding.encode"
    if arithmetic is not None:
        plain = isinstance(inner, GemmRequest) and numerics != NumericsClass.EXACT
        arithmetic = replace(arithmetic, accumulate="fp32" if plain else "fp64")
    return Support(
        "full",
        arithmetic=arithmetic,
        executes=executes,
        numerics=numerics,
        layouts=layouts,
        deterministic=True,
        batch_invariant=invariant,
        concurrent=True,
    )


def _gemm_words(r: GemmRequest, copy: bool) -> str:
    if copy:
        x = r.x[0].element
        return f"{_wa(r)}: weight decoded to {x} once, torch.nn.functional.linear in {x}, fp32 accumulate"
    return f"{_wa(r)}: operands decoded to fp32 per call, float64 product and sum, one rounding"


def _wa(r: GemmRequest) -> str:
    def bits(f: Format | CodebookFormat) -> str:
        return f"{element(f.element).bits}" if isinstance(f, Format) else f"{f.bits:.3g}"

    return f"W{bits(r.operand or r.w)}A{bits(r.x[0])}"


def _comm_words(r: CommRequest) -> str:
    if r.collective in ("all_gather", "all_to_all"):
        return f"{r.codec.format} codes and scales over all_to_all_single, decoded in fp32, one rounding"
    back = ", and back" if r.collective == "all_reduce" else ""
    return f"two-shot: {r.codec.format} codes to their owner, summed in rank order in {r.codec.accumulate}{back}"


def _comm_class(r: CommRequest) -> NumericsClass:
    """Moving is exact; a sum is as good as its type."""
    if r.collective in ("all_gather", "all_to_all"):
        return NumericsClass.EXACT
    return NumericsClass.FP32_ACC if r.codec.accumulate == "fp32" else NumericsClass.REDUCED_ACC


def layout(r: GemmRequest) -> str:
    """How the portable operations keep the weight of a request."""
    narrow = isinstance(r.w, Format) and element(r.w.element).bits <= 4 and r.k % 2 == 0
    return "nibble" if narrow else "canonical"


def _nearest(request: Request, reasons: list[str]) -> Request | None:
    """The same request without graph, if that was the only obstacle."""
    if reasons != [_NO_GRAPH]:
        return None
    if isinstance(request, GroupedRequest):
        return replace(request, gemm=replace(request.gemm, graph=False))
    return replace(request, graph=False) if isinstance(request, GemmRequest | AttentionRequest) else None


def _gemm(r: GemmRequest) -> Reasons:
    yield from _sizes(n=r.n, k=r.k)
    if not 0 <= r.m[0] <= r.m[1]:
        yield f"m={r.m} must be (smallest, largest) row count"
    if isinstance(r.w, CodebookFormat):
        yield from _codebooks(r.w)
    if r.group_index and not (isinstance(r.w, Format) and r.w.block is not None and r.w.block.kind == "group"):
        yield f"group_index has a meaning only with g<k> blocks, not with {r.w}"
    if not r.x:
        yield "x names no input format"
    for f in (*r.x, *([] if r.operand is None else [r.operand])):
        yield from dense(f)
        yield from encodable(f)
    yield from _float(r.out, "out", optional=True)
    if r.graph:
        yield _NO_GRAPH


def _grouped(r: GroupedRequest) -> Reasons:
    yield from _gemm(r.gemm)
    yield from _sizes(experts=r.experts, top_k=r.top_k)
    if isinstance(r.gemm.w, CodebookFormat):
        yield "codebook weights cannot be stacked; run one gemm per expert"
    if r.groups not in ("offsets", "masked", "indexed"):
        yield f"groups={r.groups!r}: choose offsets, masked or indexed"
    if r.activation is not None:
        a: Activation = r.activation
        if a.name not in ACTIVATIONS:
            yield f"activation {a.name!r}: choose one of {', '.join(ACTIVATIONS)}"
        if a.gated and r.gemm.n % 2:
            yield f"n={r.gemm.n} holds gate and up rows and must be even"
    if r.quantize is not None:
        yield from encodable(r.quantize)


def _kv(r: KVRequest) -> Reasons:
    if r.kind not in ("mha", "mla"):
        yield f"kind={r.kind!r}: choose mha or mla"
    yield from _sizes(heads=r.heads, k_dim=r.k_dim, v_dim=r.v_dim, page=r.page)
    if r.kind == "mla" and r.heads != 1:
        yield f"mla has one latent row per token, not heads={r.heads}"
    try:
        canonical_planes(r)
    except QhalError as bad:
        yield str(bad)
        return
    for f in (r.k, r.v):
        yield from dense(f)
        fixed = f.block is not None and f.block.kind in STATIC
        if fixed and (f.offset is not None or (f.scale is not None and not f.scale.plain)):
            yield f"{f}: a static cache scale is one plain plane, without offset"
        if (f.zero is not None and not f.zero.plain) or (f.offset is not None and not f.offset.plain):
            yield f"{f}: zero points and offsets of a cache are plain planes"
        yield from encodable(f, static=fixed or (f.scale is not None and not f.scale.plain))


def _attention(r: AttentionRequest) -> Reasons:
    yield from _kv(r.kv)
    yield from _sizes(heads=r.heads)
    if r.kv.heads > 0 and r.heads % r.kv.heads:
        yield f"heads={r.heads} is no multiple of the cache's {r.kv.heads}"
    if r.phase not in ("prefill", "decode", "mixed"):
        yield f"phase={r.phase!r}: choose prefill, decode or mixed"
    if not isfinite(r.scale):
        yield f"scale={r.scale} must be finite"
    if r.softcap is not None and not (isfinite(r.softcap) and r.softcap > 0):
        yield f"softcap={r.softcap} must be positive"
    if r.window is not None and r.window < 1:
        yield f"window={r.window} must be at least 1"
    if r.tree and (r.window is not None or not r.causal):
        yield "tree: new tokens see what the tree says and every earlier key; ask without window and with causal"
    if r.q_rope is not None:
        if r.kv.kind != "mla":
            yield f"q_rope={r.q_rope}: only the queries of mla have a rope part of their own"
        block, scale = r.q_rope.block, r.q_rope.scale
        if block is not None and (block.kind not in ("row", "group") or scale is None or not scale.plain):
            yield f"q_rope={r.q_rope}: use a plain float, or scales computed per (token, head)"
        yield from dense(r.q_rope)
        yield from encodable(r.q_rope)
    try:
        planes = canonical_planes(r.kv, [r])
    except QhalError as bad:
        yield str(bad)
        return
    yield from dense(r.q)
    yield from encodable(r.q, static=any(p.name.startswith("q.") for p in planes))
    if r.p.plain and element(r.p.element).kind != "float":
        yield f"p={r.p}: P without a scale is a plain float type such as fp32, bf16 or e4m3fn"
    yield from dense(r.p)
    yield from encodable(r.p, static=not r.p.plain)
    yield from _float(r.out, "out")
    if r.graph:
        yield _NO_GRAPH


def _quantize(r: QuantizeRequest) -> Reasons:
    yield from _float(r.x, "x")
    if r.layout != "canonical":
        yield f"layout {r.layout!r}: this backend writes canonical tensors"
    if r.static and r.format.scale is None:
        yield f"{r.format} has no scale that could be static"
    yield from encodable(r.format, static=r.static)


def _hadamard(r: HadamardRequest) -> Reasons:
    yield from _sizes(n=r.n)
    yield from _float(r.x, "x")
    for kind in r.kinds:
        yield from misfits(kind, r.n)
    if r.quantize is not None:
        yield from encodable(r.quantize)


def _codebooks(w: CodebookFormat) -> Reasons:
    if not isinstance(w, CodebookFormat):
        yield f"{w} is no codebook format"
        return
    for segment in w.segments:
        for _, name in segment.codebooks:
            if name and name not in STRUCTURED:
                yield f"no structured codebook {name!r}; known: {', '.join(STRUCTURED) or 'none yet'}"


def _sizes(**sizes: int) -> Reasons:
    for name, size in sizes.items():
        if size < 1:
            yield f"{name}={size} must be at least 1"


def _float(dtype: torch.dtype | None, name: str, *, optional: bool = False) -> Reasons:
    if not (dtype in FLOATS or (optional and dtype is None)):
        yield f"{name}={dtype}: choose bf16, fp16 or fp32"
