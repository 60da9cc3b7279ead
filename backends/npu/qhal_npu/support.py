"""What an NPU answers to every request: one function per kind, after what makes a request well-formed at all.

Products answer from the operator table (`products.py`, `grouped.py`), quantizers from `quantizing.py`; the rest says
that it runs on the NPU's own torch operators. `docs/npu.md` has the rule behind it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from qhal.elements import element
from qhal.formats import Format
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
from qhal_npu import attention, grouped, products, quantizing
from qhal_npu.attention_table import AT_THE_CALL
from qhal_portable import support as portable
from qhal_portable.kv import STATIC

_NO_GRAPH = "graph capture is not connected to NPUGraph yet; ask without graph"
_TORCH = "on the NPU's own torch operators; waits for the device where lengths or counts are read on the host"
_DENSE = "[N, K]"
_UNPROVEN = "by the operator's published formula; a device's own bits are level L3"


def support(request: Request, arch: str) -> Support:
    """The answer of a generation; total and pure."""
    whole = replace(request, graph=False) if isinstance(request, GemmRequest) else request
    answer = portable.support(whole)
    if answer and arch == "310P" and not isinstance(request, GemmRequest):
        return Support("not_implemented", "on a 310P only products of plain fp16 activations are connected")
    return _support(request, arch, revision()) if answer else answer


@lru_cache(maxsize=65536)
def _support(request: Request, arch: str, tables: int) -> Support:
    """The answer to a well-formed request while the named tables are at that revision."""
    if isinstance(request, GemmRequest):
        return _product(request, arch)
    answer = portable.support(request)
    if isinstance(request, QuantizeRequest):
        return _quantizer(request, answer, arch)
    if isinstance(request, HadamardRequest):
        return _rotation(request, answer, arch)
    if isinstance(request, KVRequest):
        return _cache(request, answer, arch)
    if isinstance(request, AttentionRequest):
        return _attention(request, answer, arch)
    if isinstance(request, VQRequest):
        return _here(answer, "table entries gathered and summed in fp32 by the NPU's torch operators")
    if isinstance(request, CommRequest):
        fault = unmade(request.codec.format, arch)
        return Support("unsupported", fault) if fault else _here(answer, answer.executes)
    assert isinstance(request, GroupedRequest)
    return _grouped(request, answer, arch)


def _product(request: GemmRequest, arch: str) -> Support:
    """The table's answer to a product that is well-formed."""
    if request.graph:
        return Support("unsupported", _NO_GRAPH, nearest=replace(request, graph=False))
    found = products.choose(request, arch)
    if isinstance(found, products.Refusal):
        return _refused(request, found, arch)
    if request.batch_invariant and not found.exact:
        reason = f"{found.kind}: the order of a sum depends on the number of rows"
        return Support("unsupported", reason, nearest=replace(request, batch_invariant=False))
    rules = []
    for f, fixed in zip(request.x, (*request.static, *(False for _ in request.x)), strict=False):
        if not f.plain:
            maker = quantizing.choose(f, None, fixed, arch, clip=request.clip)
            if isinstance(maker, str) or maker.op == "host":
                return Support("unsupported", maker if isinstance(maker, str) else f"{f} is made on the host")
            rules += [maker.rule] if maker.rule is not None else []
    arithmetic = Arithmetic.of(request)
    assert arithmetic is not None
    own = found.kind in ("16 bits", "fp32") and not found.note
    answer = portable.support(request)
    return replace(
        answer,
        level="full" if own else "conditional",
        reason="; ".join(t for t in (found.note, "" if found.layout == _DENSE else _UNPROVEN) if t),
        arithmetic=replace(arithmetic, accumulate=found.accumulate),
        rule=rules[0] if rules else None,
        executes=found.executes,
        numerics=found.numerics,
        layouts=(found.layout,),
        deterministic=found.exact,
        batch_invariant=found.exact,
    )


def _refused(request: GemmRequest, found: products.Refusal, arch: str) -> Support:
    """A refusal, with the nearest request only if it is one that works."""
    nearest: Request | None = found.nearest
    if nearest is not None and nearest != request:
        answer = support(nearest, arch)
        nearest = nearest if answer else answer.nearest
    return Support("unsupported", str(found), nearest=nearest)


def _quantizer(request: QuantizeRequest, answer: Support, arch: str) -> Support:
    found = quantizing.choose(request.format, request.x, request.static, arch)
    if isinstance(found, str):
        return Support("unsupported", found)
    executes = answer.executes if found.op in ("torch", "host") else found.op
    executes += " on the host" if found.op == "host" else ""
    return replace(
        answer,
        level="conditional",
        reason=_UNPROVEN,
        rule=found.rule,
        executes=executes,
        numerics=NumericsClass.EXACT,
    )


def _rotation(request: HadamardRequest, answer: Support, arch: str) -> Support:
    fault = "" if request.quantize is None else unmade(request.quantize, arch)
    if fault:
        return Support("unsupported", fault, nearest=replace(request, quantize=None))
    words = "fp32 products with Sylvester matrices up to order 16, tables and factors; one rounding"
    return _here(answer, words, batch_invariant=False)


def _cache(request: KVRequest, answer: Support, arch: str) -> Support:
    for f in (request.k, request.v):
        fault = unmade(f, arch, static=f.block is not None and f.block.kind in STATIC)
        if fault:
            return Support("unsupported", fault)
    return _here(answer, f"{answer.executes}, written by npu_scatter_nd_update_")


def _attention(request: AttentionRequest, answer: Support, arch: str) -> Support:
    refused = _cache(request.kv, answer, arch)
    if not refused:
        return refused
    for f in (request.q, request.p, *([] if request.q_rope is None else [request.q_rope])):
        fault = unmade(f, arch, static=True)
        if fault:
            return Support("unsupported", fault)
    words = f"pages gathered and decoded, fp32 products and softmax, P rounded to {request.p}, one rounding"
    arithmetic = None if answer.arithmetic is None else replace(answer.arithmetic, accumulate="fp32")
    path = attention.choose(request, arch)
    if isinstance(path, attention.Broken):
        found = _here(answer, words, numerics=NumericsClass.FP32_ACC, arithmetic=arithmetic, batch_invariant=False)
        return replace(found, reason=f"{found.reason}; not fused: {path}")
    served = "; else ".join(f"{line.op}: {line.kind}" for line in path.lines)
    words = f"{served}; batches they do not take ({', '.join(AT_THE_CALL)}): {words}"
    found = _here(answer, words, numerics=path.numerics, arithmetic=arithmetic, batch_invariant=False)
    reasons = ("lengths and pages are read on the host", _UNPROVEN, path.note)
    return replace(found, reason="; ".join(text for text in reasons if text))


def _grouped(request: GroupedRequest, answer: Support, arch: str) -> Support:
    one = _product(replace(request.gemm, graph=False, batch_invariant=False), arch)
    found = grouped.choose(request, arch)
    if isinstance(found, products.Refusal):
        if not one:
            nearest = one.nearest
            gemm = replace(request, gemm=nearest) if isinstance(nearest, GemmRequest) else None
            return replace(one, nearest=gemm if gemm is not None and support(gemm, arch) else None)
        return Support("unsupported", str(found))
    if request.gemm.batch_invariant:
        return Support("unsupported", "experts: the order of a sum depends on the number of rows")
    fault = "" if request.quantize is None else unmade(request.quantize, arch)
    if fault:
        return Support("unsupported", fault)
    words = f"{found.kind} by npu_grouped_matmul over sorted rows; {found.executes}"
    host = "ids and, before an activation or a weighted sum, ends of runs are read on the host"
    reason = "; ".join(t for t in (found.note, _UNPROVEN, host) if t)
    arithmetic = None if answer.arithmetic is None else replace(answer.arithmetic, accumulate=found.accumulate)
    return replace(
        answer, level="conditional", reason=reason, rule=one.rule, executes=words, numerics=found.numerics,
        arithmetic=arithmetic, layouts=(found.layout,), deterministic=False, batch_invariant=False,
    )  # fmt: skip


def _here(answer: Support, executes: str, **more: Any) -> Support:
    """The answer for what the NPU's own torch operators execute in fp32 and whole numbers."""
    return replace(answer, level="conditional", reason=_TORCH, executes=executes, deterministic=False, **more)


def unmade(f: Format, arch: str, *, static: bool = False) -> str:
    """Why codes of a format cannot be made or read here; "" if they can."""
    if f.plain and element(f.element).wide:
        return ""
    found = quantizing.choose(f, None, static, arch)
    if isinstance(found, str):
        return found
    return f"{f} is made in float64, which the NPU does not compute" if found.op == "host" else ""
