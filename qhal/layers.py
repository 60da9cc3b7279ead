"""From specs to layers on a device: the one place that turns what a checkpoint says into requests and prepared weights.

Every spec runs on every backend through this file: y = rotate_out(gemm(Q(x'), W) + low_rank(x')) + b,
x' = rotate_in(x).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qhal.elements import dtype_name
from qhal.errors import ShardError
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.layer_formats import ExpertsFormat, KVFormat, LayerFormat, LinearFormat
from qhal.prepared import Prepared, PreparedExperts, PreparedLinear
from qhal.requests import GemmRequest, GroupedRequest, HadamardRequest, KVRequest, NumericsClass, Request
from qhal.rotations import Rotation, kinds
from qhal.specs import ExpertsSpec, LinearSpec, Operand


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
    direct = not (f.rotate_out or f.low_rank)
    return GemmRequest(
        w=f.weight,
        n=f.n,
        k=f.k,
        x=inputs,
        m=m,
        out=out,
        operand=f.operand,
        bias=f.bias and direct,
        group_index=f.group_index,
        graph=graph,
        numerics=numerics,
    )


def requests(
    f: LayerFormat, dtype: torch.dtype, *, m: tuple[int, int] = (1, 8192), numerics: NumericsClass | None = None
) -> Iterator[Request]:
    """Every request that a layer makes of a backend, in the order of execution. Needs no weights and no device."""
    if isinstance(f, KVFormat):
        yield KVRequest(kind=f.kind, k=f.k, v=f.v, heads=f.heads, k_dim=f.k_dim, v_dim=f.v_dim, page=16)
        return
    if isinstance(f, ExpertsFormat):
        yield from expert_requests(f, dtype, m=m, numerics=numerics)
        return
    if f.rotate_in:
        yield HadamardRequest(kinds=f.rotate_in, n=f.k, x=dtype)
    yield gemm_request(f, dtype, m=m, numerics=numerics)
    if f.rotate_out:
        yield HadamardRequest(kinds=f.rotate_out, n=f.n, x=dtype)


def expert_requests(
    f: ExpertsFormat, dtype: torch.dtype, *, m: tuple[int, int] = (1, 8192), numerics: NumericsClass | None = None
) -> tuple[GroupedRequest, GroupedRequest]:
    """The two grouped products of an expert layer."""
    first = gemm_request(f.gate_up, dtype, m=m, numerics=numerics)
    second = gemm_request(f.down, dtype, m=m, numerics=numerics)
    return (
        GroupedRequest(gemm=first, experts=f.experts, groups="offsets", activation=f.activation),
        GroupedRequest(gemm=second, experts=f.experts, groups="offsets"),
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
) -> PreparedExperts:
    """The experts of one layer on `ops`."""
    for part in (spec.gate_up, spec.down):
        if part.rotate_in or part.rotate_out or part.low_rank:
            raise ShardError(f"{spec.name}: rotations and low-rank branches inside experts are not supported yet")
    first, second = expert_requests(spec.format, dtype, m=m, numerics=numerics)

    def one(part: LinearSpec, request: GroupedRequest) -> Prepared:
        inputs: list[Operand] = [o for o in (part.input, part.decode_input) if o is not None]
        return ops.prepare(part.weight, request, inputs=inputs, operand=part.operand, bias=part.bias)

    return PreparedExperts(ops, spec.format, one(spec.gate_up, first), one(spec.down, second))


def _chain(chain: tuple[Rotation, ...], n: int, dtype: torch.dtype, ops: QuantOps) -> Prepared | None:
    if not chain:
        return None
    return ops.prepare(chain, HadamardRequest(kinds=kinds(chain), n=n, x=dtype))
