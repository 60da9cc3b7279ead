"""grouped_gemm: the exact product of every expert with its rows, then the activation, then one rounding.

Always float64, with weights decoded only for the experts that have rows. The order of rows can change the last bits of
a float64 sum, hence one fp32 result in some 2^28; with request.gemm.batch_invariant rows are multiplied one by one and
it changes none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qhal.errors import BatchError, FormatError
from qhal.groups import Groups, Indexed, Masked, Offsets
from qhal.layer_formats import Activation
from qhal.requests import GroupedRequest
from qhal.tensors import QTensor
from qhal_portable.gemm import accept, operand, product, write
from qhal_portable.prepared import PreparedWeight
from qhal_portable.quantize import quantize
from qhal_portable.rounding import round_once
from qhal_portable.storage import expert

Index = slice | tuple[int, slice] | Tensor


def grouped_gemm(
    x: Tensor | QTensor, p: PreparedWeight, groups: Groups, out: Tensor | QTensor | None
) -> Tensor | QTensor:
    """See QuantOps.grouped_gemm. Every form of groups works on every prepared weight."""
    request = p.request
    if not isinstance(request, GroupedRequest):
        raise FormatError(f"the weight was prepared for {request}; grouped_gemm needs a GroupedRequest")
    if isinstance(groups, Masked):
        y, dtype = _masked(x, p, request, groups)
    elif isinstance(groups, Indexed):
        y, dtype = _indexed(x, p, request, groups)
    else:
        y, dtype = _offsets(x, p, request, groups)
    rounded = round_once(y, dtype)
    if request.quantize is None:
        if isinstance(out, QTensor):
            raise FormatError("out is a QTensor, but the request has no quantize")
        return write(rounded, out)
    if isinstance(out, Tensor):
        raise FormatError(f"out is a plain tensor, the result is {request.quantize}")
    return quantize(rounded, request.quantize, p.device, out)


class Rows:
    """Q(x), by expert: quantized once where experts share the operand, else each expert's rows with its own scale."""

    def __init__(self, x: Tensor | QTensor, p: PreparedWeight, request: GroupedRequest, *, axes: int = 2) -> None:
        self.own = p.inputs[0] if p.inputs and p.inputs[0].per_expert and not isinstance(x, QTensor) else None
        if self.own is None or isinstance(x, QTensor):
            self.value, self.dtype = operand(x, request.gemm, p, 0, axes=axes)
        else:
            self.value, self.dtype = x, accept(x, request.gemm, p.device, axes=axes)

    def of(self, e: int, index: Index) -> Tensor:
        """[t, K]: the rows at `index`, which expert e reads."""
        rows = self.value[index]
        return rows if self.own is None else quantize(rows, self.own.expert(e), rows.device).dequantize()


def one_expert(x: Tensor, p: PreparedWeight, request: GroupedRequest, e: int) -> Tensor:
    """float64 [t, N] (or the activation's width) of rows x [t, K] through expert e; nothing is rounded."""
    bias = None if p.bias is None else p.bias[e]
    weight = expert(p.multiplied, e)
    rows = x.split(1) if request.gemm.batch_invariant and x.shape[0] else (x,)
    y = torch.cat([product(row, weight, bias) for row in rows])
    return y if request.activation is None else activate(y, request.activation)


def activate(y: Tensor, a: Activation) -> Tensor:
    """act(gate) * up of [t, 2I] (gate first), or act(up) of [t, I], in the dtype of y.

    swiglu: gate is cut at +limit, up at +limit and -limit; gate * sigmoid(alpha * gate) * (up + shift).
    """
    gate, up = y.chunk(2, -1) if a.gated else (y, None)
    if a.name == "swiglu":
        gate = gate if a.limit is None else gate.clamp(max=a.limit)
        up = None if up is None else (up if a.limit is None else up.clamp(-a.limit, a.limit)) + a.shift
    if a.name == "silu":
        acted = gate * torch.sigmoid(gate)
    elif a.name == "gelu":
        acted = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    elif a.name == "gelu_tanh":
        acted = gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    elif a.name == "relu2":
        acted = gate.clamp(min=0) ** 2
    else:
        acted = gate * torch.sigmoid(a.alpha * gate)
    return acted if up is None else acted * up


def width(request: GroupedRequest) -> int:
    """Columns of the result."""
    gated = request.activation is not None and request.activation.gated
    return request.gemm.n // 2 if gated else request.gemm.n


def _offsets(
    x: Tensor | QTensor, p: PreparedWeight, request: GroupedRequest, groups: Offsets
) -> tuple[Tensor, torch.dtype]:
    """x [T, K], rows sorted by expert; rows outside every expert give zeros."""
    rows = Rows(x, p, request)
    total = rows.value.shape[0]
    ends = groups.offsets.tolist()
    if len(ends) != request.experts + 1 or ends != sorted(ends) or ends[0] < 0 or ends[-1] > total:
        shown = f"{ends[:8]}{'...' if len(ends) > 8 else ''}"
        raise BatchError(
            f"offsets {shown} must be {request.experts + 1} numbers that grow from 0 to at most {total} rows"
        )
    y = torch.zeros(total, width(request), dtype=torch.float64, device=rows.value.device)
    for e in range(request.experts):
        run = slice(ends[e], ends[e + 1])
        if run.stop > run.start:
            y[run] = one_expert(rows.of(e, run), p, request, e)
    return y, rows.dtype


def _masked(
    x: Tensor | QTensor, p: PreparedWeight, request: GroupedRequest, groups: Masked
) -> tuple[Tensor, torch.dtype]:
    """x [E, M, K]; rows past a count are zero before anything reads them, and in the result."""
    counts = groups.counts.tolist()
    if len(x.shape) != 3:
        raise FormatError(f"x is {tuple(x.shape)}; masked groups need [E, M, {request.gemm.k}]")
    experts, most = x.shape[0], x.shape[1]
    if len(counts) != request.experts or experts != request.experts or any(not 0 <= c <= most for c in counts):
        raise BatchError(f"counts {counts[:8]} must be {request.experts} numbers from 0 to {most}; x is {x.shape}")
    inside = torch.arange(most, device=groups.counts.device)[None, :, None] < groups.counts.reshape(-1, 1, 1)
    if isinstance(x, Tensor):
        x = torch.where(inside, x, torch.zeros((), dtype=x.dtype, device=x.device))
    rows = Rows(x, p, request, axes=3)
    y = torch.zeros(experts, most, width(request), dtype=torch.float64, device=rows.value.device)
    for e, count in enumerate(counts):
        if count:
            y[e, :count] = one_expert(rows.of(e, (e, slice(count))), p, request, e)
    return y, rows.dtype


def _indexed(
    x: Tensor | QTensor, p: PreparedWeight, request: GroupedRequest, groups: Indexed
) -> tuple[Tensor, torch.dtype]:
    """x [T, K], or [T * top_k, K] in pair order; pairs come out, or with weights their weighted sum [T, N]."""
    ids = groups.ids
    if ids.dim() != 2 or (ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= request.experts)):
        raise BatchError(f"ids must be [T, top_k] of -1 to {request.experts - 1}, got {tuple(ids.shape)}")
    tokens, top_k = ids.shape
    rows = Rows(x, p, request)
    expected = tokens * top_k if groups.pairs else tokens
    if rows.value.shape[0] != expected:
        raise BatchError(f"x has {rows.value.shape[0]} rows, ids {tuple(ids.shape)} need {expected}")
    flat = ids.reshape(-1)
    y = torch.zeros(tokens * top_k, width(request), dtype=torch.float64, device=rows.value.device)
    for e in sorted(set(flat.tolist()) - {-1}):
        pairs = (flat == e).nonzero().reshape(-1)
        y[pairs] = one_expert(rows.of(e, pairs if groups.pairs else pairs // top_k), p, request, e)
    if groups.weights is None:
        return y, rows.dtype
    if groups.weights.shape != ids.shape:
        raise BatchError(f"weights are {tuple(groups.weights.shape)}, ids are {tuple(ids.shape)}")
    share = torch.where(ids < 0, 0.0, groups.weights.double())
    return (y.reshape(tokens, top_k, width(request)) * share[..., None]).sum(1), rows.dtype
