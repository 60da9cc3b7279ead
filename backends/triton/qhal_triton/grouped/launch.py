"""Host code of grouped products: rows to the product's kernel, then what follows it; no count is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.encoding import encode
from qhal.errors import FormatError
from qhal.groups import Groups, Indexed, Masked, Offsets
from qhal.requests import GroupedRequest
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_portable.gemm import accept, quantized
from qhal_portable.grouped import width
from qhal_portable.prepared import PreparedWeight
from qhal_triton.gemm.launch import Bound, Rows, spec_of
from qhal_triton.gemm.results import finished, given
from qhal_triton.grouped.paths import by_rows, plan
from qhal_triton.grouped.rows import rows_of


def known(p: PreparedWeight) -> bool:
    """Whether an earlier call found that the kernels take this weight."""
    return "_bound" in vars(p)


def run(ops: Any, x: Tensor | QTensor, p: PreparedWeight, groups: Groups, out: Any) -> Tensor | QTensor:
    """The grouped product, see QuantOps.grouped_gemm."""
    request = p.request
    assert isinstance(request, GroupedRequest)
    _check_out(request, out)
    bound = _bound(p, request, ops)
    rows = rows_of(groups, tuple(x.shape), request.experts)
    q, dtype, rows = _operand(ops, x, p, request, groups, rows)
    held = out if request.quantize is None and not isinstance(groups, Masked) else None
    y = _product(bound, request, q, dtype, groups, rows, held)
    if isinstance(groups, Masked):
        y = y.reshape(*x.shape[:2], y.shape[-1])
    if request.quantize is None:
        return given(y, out)
    return ops.quantize(y, request.quantize, out=out)  # type: ignore[no-any-return]


def _product(
    bound: Bound,
    request: GroupedRequest,
    q: Tensor | QTensor,
    dtype: torch.dtype,
    groups: Groups,
    rows: Rows,
    out: Tensor | None,
) -> Tensor:
    """[rows of the result, width], rounded once; in `out` where that fits."""
    wide, a = width(request), request.activation
    weighted = isinstance(groups, Indexed) and groups.weights is not None
    total = groups.ids.shape[0] if isinstance(groups, Indexed) and weighted else rows.rows
    if rows.rows == 0:
        return torch.zeros(total, wide, dtype=dtype, device=bound.weight.device)
    average = -(-rows.rows // request.experts)
    spec = spec_of(bound, q, average)
    if a is None and not weighted:
        part = bound.partial(spec, q, average, dtype, rows, out)
        return part if part.dim() == 2 else finished(part, total, wide, dtype, out)
    part = bound.partial(spec, q, average, torch.float32, rows)
    part = part.unsqueeze(0) if part.dim() == 2 else part
    more: dict[str, Any] = {}
    if a is not None:
        more = {"NAME": a.name, "GATED": a.gated, "LIMITED": a.limit is not None, "alpha": a.alpha, "shift": a.shift}
        more["limit"] = a.limit or 0.0
    if isinstance(groups, Indexed) and groups.weights is not None:
        more |= {"WEIGHTED": True, "TOP": groups.ids.shape[1]}
        more |= {"weights": groups.weights.contiguous(), "ids": groups.ids.contiguous()}
    return finished(part, total, wide, dtype, out, **more)


def _bound(p: PreparedWeight, request: GroupedRequest, ops: Any) -> Bound:
    """The weight's kernel arguments, looked up in the first call."""
    found = vars(p).get("_bound")
    if found is None:
        made = plan(request, ops._target)
        assert made is not None
        found = vars(p)["_bound"] = Bound(p, request.gemm, made, ops._target)
    assert isinstance(found, Bound)
    return found


def _operand(
    ops: Any, x: Tensor | QTensor, p: PreparedWeight, request: GroupedRequest, groups: Groups, rows: Rows
) -> tuple[Tensor | QTensor, torch.dtype, Rows]:
    """Q(x), the dtype of the result, and the rows, which are pairs if experts quantize a token differently."""
    axes = 3 if isinstance(groups, Masked) else 2
    if isinstance(x, QTensor) or not p.inputs:
        q, dtype = quantized(x, request.gemm, p, 0, axes=axes, by=ops.quantize)
        return q, dtype, rows
    assert isinstance(x, Tensor)
    dtype = accept(x, request.gemm, p.device, axes=axes)
    if isinstance(groups, Masked):  # what stands past a count must not reach a scale
        inside = torch.arange(x.shape[1], device=x.device)[None, :, None] < groups.counts.reshape(-1, 1, 1)
        x = torch.where(inside, x, torch.zeros((), dtype=x.dtype, device=x.device))
    own = p.inputs[0]
    if not own.per_expert:
        q, _ = quantized(x, request.gemm, p, 0, axes=axes, by=ops.quantize)
        return q, dtype, rows
    if isinstance(groups, Indexed) and not groups.pairs:
        x, rows = x.repeat_interleave(groups.ids.shape[1], 0), replace(rows, top=1)
    return _by_expert(x, own, groups, request.experts), dtype, rows


def _by_expert(x: Tensor, o: Operand, groups: Groups, experts: int) -> QTensor:
    """Rows quantized with the static scale of their own expert: a tensor's scale becomes one per row."""
    assert o.scale is not None and o.scale.shape[1] == 1
    if isinstance(groups, Masked):
        of = torch.arange(experts, device=x.device).repeat_interleave(x.shape[1])
    elif isinstance(groups, Offsets):
        places = torch.arange(x.shape[0], device=x.device)
        of = torch.searchsorted(groups.offsets[1:].long(), places, right=True).clamp(max=experts - 1)
    else:
        of = groups.ids.reshape(-1).long().clamp(0, experts - 1)
    scale, zero = (None if t is None else t[of].reshape(-1) for t in (o.scale, o.zero))
    q = encode(x.reshape(-1, x.shape[-1]), by_rows(o.format), scale=scale, zero=zero, clip=o.clip)
    return replace(q, format=o.format, layout="a scale per row")


def _check_out(request: GroupedRequest, out: Any) -> None:
    if request.quantize is None and isinstance(out, QTensor):
        raise FormatError("out is a QTensor, but the request has no quantize")
    if request.quantize is not None and isinstance(out, Tensor):
        raise FormatError(f"out is a plain tensor, the result is {request.quantize}")
