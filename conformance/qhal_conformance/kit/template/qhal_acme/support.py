"""What this backend claims. Every request gets an answer, with a reason where it is no: plans are made from it.

The suite checks it both ways: a claim that fails is a failure, a refusal that works is a finding. So a claim is one
line here, written together with its kernel, and never wider than it.
"""

from __future__ import annotations

from collections.abc import Iterator

from qhal.elements import WIDE
from qhal.formats import Format
from qhal.requests import (
    Arithmetic,
    GemmRequest,
    NumericsClass,
    QuantizeRequest,
    Request,
    Support,
    minimum_class,
)

FLOATS = tuple(Format(name) for name in WIDE)
QUANTIZED = tuple(
    Format.parse(name) for name in ("int8.row*fp32", "int8.tensor*fp32", "int8.g128*bf16", "e4m3fn.row*fp32")
)
"""What `quantize` writes, and a product reads as its x."""
WEIGHTS = {"int8": ("row", "group"), "int4": ("row", "group"), "e4m3fn": ("row",)}
"""Elements of a weight, and the blocks of their scales; groups of any size, plain floats besides."""


def support(request: Request, *, graph: bool) -> Support:
    """The answer to any request, the same on every rank. graph: whether this device captures graphs."""
    try:
        reasons = list(_reasons(request, graph))
    except Exception as fault:  # total by contract: what cannot be read is refused
        reasons = [f"the request cannot be read: {fault}"]
    if reasons:
        return Support("unsupported", "; ".join(reasons))
    if isinstance(request, QuantizeRequest):
        return Support("full", executes="one pass per tensor, fp32", numerics=NumericsClass.EXACT, graph=graph)
    assert isinstance(request, GemmRequest) and isinstance(request.w, Format)
    return Support(
        "full",
        executes=f"{request.w} and {request.x[0]} decoded to fp32, fp32 product, one rounding",
        arithmetic=Arithmetic.of(request),  # both operands are quantized as asked: no downgrade
        numerics=NumericsClass.FP32_ACC,  # the suite's bound follows from this word: see docs/numerics.md of qhal
        layouts=(layout(request.w),),
        graph=graph,  # deterministic, batch_invariant, concurrent stay False until somebody has shown them
    )


def layout(w: Format) -> str:
    """How `weights.py` stores the codes of a weight."""
    return "nibble" if w.element == "int4" else "canonical"


def _reasons(request: Request, graph: bool) -> Iterator[str]:
    """Everything that is in the way, so that a reader sees it at once."""
    if isinstance(request, QuantizeRequest):
        yield from _quantize(request)
    elif isinstance(request, GemmRequest):
        yield from _gemm(request, graph)
    else:
        yield f"acme has no kernel for {type(request).__name__}; it executes quantize and gemm"


def _quantize(r: QuantizeRequest) -> Iterator[str]:
    if r.format not in QUANTIZED:
        yield f"acme quantizes to {_names(QUANTIZED)}, not to {r.format}"
    elif r.static and str(r.format.block) != "tensor":
        yield f"a static scale is one per tensor, not per {r.format.block}"
    if r.x not in WIDE.values():
        yield f"x is {r.x}, must be {_names(FLOATS)}"
    if r.layout != "canonical":
        yield f"layout {r.layout!r}: acme writes canonical tensors"


def _gemm(r: GemmRequest, graph: bool) -> Iterator[str]:
    if not isinstance(r.w, Format) or not _readable(r.w):
        known = ", ".join(f"{element} with {' or '.join(blocks)} scales" for element, blocks in WEIGHTS.items())
        yield f"weights in {r.w}: acme reads {known}, and {_names(FLOATS)}"
    unknown = [f for f in r.x if f not in (*FLOATS, *QUANTIZED)]
    if unknown or not r.x:
        yield f"x in {_names(unknown) or 'no format'}: acme takes {_names((*FLOATS, *QUANTIZED))}"
    given = (f for f, static in zip(r.x, r.static, strict=False) if static and str(f.block) != "tensor")
    yield from (f"a static scale is one per tensor, not per {f.block}" for f in given)
    if r.clip:
        yield "inputs that keep a part of their range (clip): no kernel yet"
    if r.n < 1 or r.k < 1:
        yield f"n={r.n}, k={r.k}: there is nothing to multiply"
    if r.out is not None and r.out not in WIDE.values():
        yield f"results in {r.out}: choose {_names(FLOATS)}"
    if r.operand is not None:
        yield f"weights rounded to {r.operand} before the product: no kernel yet"
    if r.group_index:
        yield "act-order weights (group_index): no kernel yet"
    if r.batch_invariant:
        yield "nobody has shown yet that a row's bits do not depend on its batch"
    if minimum_class(r) < NumericsClass.FP32_ACC:
        yield f"class {minimum_class(r).label}: sums are fp32"
    if r.graph and not graph:
        yield "this device captures no graphs; ask without graph"


def _readable(f: Format) -> bool:
    """A plain float, or integers or e4m3fn times one plain float per row or group: no zero points, no nested scales."""
    if f in FLOATS:
        return True
    plain_scale = f.scale is not None and f.scale in FLOATS and f.op == "*"
    extras = f.zero is not None or f.offset is not None or f.sparsity is not None
    return plain_scale and not extras and f.block is not None and f.block.kind in WEIGHTS.get(f.element, ())


def _names(formats: tuple[Format, ...] | list[Format]) -> str:
    return ", ".join(str(f) for f in formats)
