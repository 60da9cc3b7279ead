"""Which attentions the kernel takes, and in what arithmetic."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from qhal.formats import Format
from qhal.requests import AttentionRequest, NumericsClass
from qhal.rules import Rule
from qhal_triton.kv.rows import Row, row_of
from qhal_triton.paths import Path
from qhal_triton.target import Target

_PLAIN_P = {"bf16": 8, "fp16": 11, "fp32": 24, "e4m3fn": 4, "e5m2": 3}
_STATIC_P = ("int8", "uint8", "e4m3fn", "e5m2")
_BF16_BITS, _FP16_BITS = 8, 11


class Arithmetic(NamedTuple):
    """How an attention is computed.

    q, rope   rows of queries (rope: of the second part, MLA); k, v the cache's rows
    *_parts   16-bit parts of an operand: 1 where one holds it exactly, else 2 (upper and next 8 bits)
    type      operands of Q.K: bf16 or fp16; rope_type of the rope part's product; pv of P.V
    p         element that exp(s - max) is rounded to; p_static under a static scale, that divides or multiplies
    """

    q: Row
    rope: Row
    k: Row
    v: Row
    q_parts: int
    rope_parts: int
    k_parts: int
    v_parts: int
    type: str
    rope_type: str
    p: str
    p_static: bool
    p_divides: bool
    p_parts: int
    pv: str


def choose(request: AttentionRequest, target: Target) -> Path | None:
    """The kernel that takes the request; None: no kernel does."""
    found = arithmetic(request)
    if found is None:
        return None
    parts = max(found.q_parts, found.k_parts, found.v_parts, found.p_parts)
    return Path(
        kernel="attend",
        executes=(
            f"{'MLA' if request.kv.kind == 'mla' else 'paged'} attention: {request.kv.k.storage} and "
            f"{request.kv.v.storage} decoded in registers, {found.type} Q.K, {found.pv} P.V"
            f"{', operands in two 16-bit parts' if parts > 1 else ''}, fp32 softmax and sums"
        ),
        numerics=NumericsClass.REDUCED_ACC,
        invariant=True,
    )


@lru_cache(maxsize=4096)
def arithmetic(request: AttentionRequest) -> Arithmetic | None:
    """The arithmetic of a request; None where the kernel has none."""
    kv, mla = request.kv, request.kv.kind == "mla"
    if kv.page & (kv.page - 1):
        return None
    k, v = row_of(kv.k, kv.k_dim), row_of(kv.v, kv.v_dim)
    wide = kv.k_dim + kv.v_dim if mla else kv.k_dim
    q = _query(request.q, kv.k_dim, wide)
    rope = q if request.q_rope is None else _query(request.q_rope, kv.v_dim, kv.v_dim)
    if request.q_rope is not None and rope is not None and rope.zero:
        return None
    p = _weights(request.p)
    if k is None or v is None or q is None or rope is None or p is None or "fp32" in (k.element, v.element):
        return None
    name, static, divides = p
    fp16 = q.element == "fp16" and k.bits <= _FP16_BITS and not k.inside and k.element != "bf16"
    values = k if mla else v
    outside = values.kind == "row"  # then P takes the scale of the row, and with it more bits than one part has
    bits = 24 if outside else 8 if static else _PLAIN_P[name]
    half = bits == _FP16_BITS and values.bits <= _FP16_BITS and not values.inside and values.element != "bf16"
    if mla and fp16 != half:  # one tile serves both products
        fp16 = half = False
    one = _FP16_BITS if half else _BF16_BITS
    rope_fp16 = rope.element == "fp16" and v.bits <= _FP16_BITS and not v.inside and v.element != "bf16"
    return Arithmetic(
        q=q,
        rope=rope,
        k=k,
        v=v,
        q_parts=_parts(q.bits, fp16),
        rope_parts=_parts(rope.bits, rope_fp16),
        k_parts=_parts(k.bits, fp16),
        v_parts=_parts(v.bits, rope_fp16 if mla else half),
        type="fp16" if fp16 else "bf16",
        rope_type="fp16" if rope_fp16 else "bf16",
        p=name,
        p_static=static,
        p_divides=divides,
        p_parts=1 if bits <= one else 2,
        pv="fp16" if half else "bf16",
    )


def _parts(bits: int, fp16: bool) -> int:
    return 1 if bits <= (_FP16_BITS if fp16 else _BF16_BITS) else 2


def _query(f: Format, dim: int, wide: int) -> Row | None:
    """Queries of `wide` features, `dim` of which meet the first of two rows of keys: 16-bit floats, or codes."""
    found = row_of(f, wide)
    if found is None or found.packed or found.element == "fp32" or found.kind == "col":
        return None
    if found.kind == "group" and dim % found.group and dim != wide:
        return None  # a group over both parts of a latent query
    if not found.kind:
        return found if found.element in ("bf16", "fp16") else None
    return found


def _weights(f: Format) -> tuple[str, bool, bool] | None:
    """(element, static, divides) of P."""
    if f.plain:
        return (f.element, False, False) if f.element in _PLAIN_P and f.rule == Rule() else None
    if f.element not in _STATIC_P or f.rule != Rule():
        return None
    return f.element, True, f.op == "/"
