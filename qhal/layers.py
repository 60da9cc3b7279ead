"""From specs to layers on a device: the one place that turns what a checkpoint says into requests and prepared weights.

Every spec runs on every backend through this file: y = rotate_out(gemm(Q(x'), W) + low_rank(x')) + b,
x' = rotate_in(x).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from qhal.caches import KVCache
from qhal.elements import dtype_name
from qhal.errors import FormatError, ShardError
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.layer_formats import ExpertsFormat, KVFormat, LayerFormat, LinearFormat
from qhal.prepared import Prepared, PreparedExperts, PreparedLinear
from qhal.requests import (
    AttentionRequest,
    Form,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    KVRequest,
    NumericsClass,
    Request,
)
from qhal.rotations import Rotation, kinds
from qhal.specs import ExpertsSpec, KVSpec, LinearSpec, Operand


def gemm_request(
    f: LinearFormat,
    dtype: torch.dtype,
    *,
    out: torch.dtype | None = None,
    m: tuple[int, int] = (1, 8192),
    graph: bool = False,
    numerics: NumericsClass | None = None,
) -> GemmRequest:
    """The product inside a layer whose activations have dtype `dtype`; `out` None gives results in the dtype of x."""
    plain = Format(dtype_name(dtype))
    inputs = (f.input or plain, *([f.decode_input] if f.decode_input else []))
    static = (f.static_input, *([f.static_decode] if f.decode_input else []))
    direct = not (f.rotate_out or f.low_rank)
    return GemmRequest(
        w=f.weight,
        n=f.n,
        k=f.k,
        x=inputs,
        static=static if any(static) else (),
        clip=f.clip,
        m=m,
        out=out,
        operand=f.operand,
        bias=f.bias and direct,
        group_index=f.group_index,
        graph=graph,
        numerics=numerics,
    )


def requests(
    f: LayerFormat,
    dtype: torch.dtype,
    *,
    m: tuple[int, int] = (1, 8192),
    numerics: NumericsClass | None = None,
    page: int = 16,
    groups: Form = "offsets",
    top_k: int = 1,
) -> Iterator[Request]:
    """Every request that a layer makes of a backend, in the order of execution. Needs no weights and no device.

    page           slots of a page of a cache. What reads the cache is asked with `attention_request`: its heads and
                   scale are the model's
    groups, top_k  how the engine calls experts, as in `expert_requests`
    """
    if isinstance(f, KVFormat):
        yield kv_request(f, page=page)
        return
    if isinstance(f, ExpertsFormat):
        yield from expert_requests(f, dtype, m=m, numerics=numerics, groups=groups, top_k=top_k)
        return
    if f.rotate_in:
        yield HadamardRequest(kinds=f.rotate_in, n=f.k, x=dtype)
    yield gemm_request(f, dtype, m=m, numerics=numerics)
    if f.rotate_out:
        yield HadamardRequest(kinds=f.rotate_out, n=f.n, x=dtype)


def kv_request(f: KVFormat, *, page: int) -> KVRequest:
    """The cache that a layer's format needs, in pages of `page` slots."""
    return KVRequest(kind=f.kind, k=f.k, v=f.v, heads=f.heads, k_dim=f.k_dim, v_dim=f.v_dim, page=page)


def attention_request(
    f: KVFormat,
    dtype: torch.dtype,
    *,
    page: int,
    heads: int,
    scale: float,
    phase: Literal["prefill", "decode", "mixed"],
) -> AttentionRequest:
    """Attention over that cache with Q and P as the format says; heads are query heads, `dtype` that of q and out.

    Over a latent cache whose rope rows are plain, a quantized q is the latent part: the rope part stays in `dtype`.
    Window, soft-cap, sinks, lse and trees are the model's: set them with `dataclasses.replace`.
    """
    plain = Format(dtype_name(dtype))
    return AttentionRequest(
        kv=kv_request(f, page=page),
        heads=heads,
        scale=scale,
        phase=phase,
        q=f.q or plain,
        q_rope=plain if f.kind == "mla" and f.q is not None and f.v.plain else None,
        p=f.p or plain,
        out=dtype,
    )


def set_static(cache: KVCache, spec: KVSpec) -> None:
    """Write the static scales and zero points that a checkpoint gives into the cache of its layer.

    FormatError for a cache of other formats or planes (Q and P have theirs only in a cache made from
    `kv_planes(request, attention=[...])`), and for a static plane that the spec has no value for; only p.scale may keep
    its start.
    """
    for name, mine, theirs in (("k", spec.k.format, cache.request.k), ("v", spec.v.format, cache.request.v)):
        if mine.storage != theirs.storage:
            raise FormatError(f"{spec.name}: the checkpoint's {name} is {mine}, the cache holds {theirs}")
    rows = ("latent", "rope") if spec.kind == "mla" else ("k", "v")
    found = {}
    for name, operand in ((rows[0], spec.k), (rows[1], spec.v), ("q", spec.q), ("p", spec.p)):
        if operand is None:
            continue
        if operand.clip != (1.0, 1.0):
            raise FormatError(f"{spec.name}: {name}={operand.format} has clip {operand.clip}; attention clips nothing")
        level = operand.format.scale
        outer = "scale" if level is None or level.plain else "scale.scale"
        for plane, value in ((f"{name}.{outer}", operand.scale), (f"{name}.zero", operand.zero)):
            static = plane in cache.static
            if value is not None and not static:
                have = ", ".join(sorted(cache.static)) or "none"
                raise FormatError(
                    f"{spec.name}: the cache has no static plane {plane} for {operand.format}; it has {have}"
                )
            if value is None and static and plane != "p.scale":
                raise FormatError(
                    f"{spec.name}: {plane} of {operand.format} is static, but the spec has no value for it"
                )
            if value is not None:
                found[plane] = value.reshape(()).expand(cache.planes[plane].shape) if value.numel() == 1 else value
    for plane, value in found.items():
        cache.set_static(plane, value)


def expert_requests(
    f: ExpertsFormat,
    dtype: torch.dtype,
    *,
    m: tuple[int, int] = (1, 8192),
    numerics: NumericsClass | None = None,
    groups: Form = "offsets",
    top_k: int = 1,
) -> tuple[GroupedRequest, GroupedRequest]:
    """The two grouped products of an expert layer. groups, top_k: how the engine says which rows belong to whom."""
    first = gemm_request(f.gate_up, dtype, m=m, numerics=numerics)
    second = gemm_request(f.down, dtype, m=m, numerics=numerics)
    return (
        GroupedRequest(gemm=first, experts=f.experts, groups=groups, top_k=top_k, activation=f.activation),
        GroupedRequest(gemm=second, experts=f.experts, groups=groups, top_k=top_k),
    )


def prepare_linear(
    spec: LinearSpec,
    ops: QuantOps,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.dtype | None = None,
    m: tuple[int, int] = (1, 8192),
    numerics: NumericsClass | None = None,
) -> PreparedLinear:
    """A layer on `ops`. dtype: of the activations; m: the smallest and largest row count that will occur.

    out: dtype of the results, None for that of x; it must be given if x will arrive already quantized.
    UnsupportedError if the backend does not execute one of the layer's operations.
    """
    request = gemm_request(spec.format, dtype, out=out, m=m, numerics=numerics)
    inputs = [o for o in (spec.input, spec.decode_input) if o is not None]
    weight = ops.prepare(
        spec.weight, request, inputs=inputs, operand=spec.operand, bias=spec.bias if request.bias else None
    )
    return PreparedLinear(
        ops=ops,
        format=spec.format,
        weight=weight,
        rotate_in=_chain(spec.rotate_in, request.k, dtype, ops),
        rotate_out=_chain(spec.rotate_out, request.n, dtype, ops),
        low_rank=None if spec.low_rank is None else (spec.low_rank[0].to(ops.device), spec.low_rank[1].to(ops.device)),
        bias=spec.bias.to(ops.device) if spec.bias is not None and not request.bias else None,
    )


def prepare_experts(
    spec: ExpertsSpec,
    ops: QuantOps,
    *,
    dtype: torch.dtype = torch.bfloat16,
    m: tuple[int, int] = (1, 8192),
    numerics: NumericsClass | None = None,
    groups: Form = "offsets",
    top_k: int = 1,
) -> PreparedExperts:
    """The experts of one layer on `ops`; groups and top_k as in `expert_requests`."""
    for part in (spec.gate_up, spec.down):
        if part.rotate_in or part.rotate_out or part.low_rank:
            raise ShardError(f"{spec.name}: rotations and low-rank branches inside experts are not supported yet")
    first, second = expert_requests(spec.format, dtype, m=m, numerics=numerics, groups=groups, top_k=top_k)

    def one(part: LinearSpec, request: GroupedRequest) -> Prepared:
        inputs: list[Operand] = [o for o in (part.input, part.decode_input) if o is not None]
        return ops.prepare(part.weight, request, inputs=inputs, operand=part.operand, bias=part.bias)

    return PreparedExperts(ops, spec.format, one(spec.gate_up, first), one(spec.down, second))


def _chain(chain: tuple[Rotation, ...], n: int, dtype: torch.dtype, ops: QuantOps) -> Prepared | None:
    if not chain:
        return None
    return ops.prepare(chain, HadamardRequest(kinds=kinds(chain), n=n, x=dtype))
