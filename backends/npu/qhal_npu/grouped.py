"""grouped_gemm: npu_grouped_matmul over rows sorted by expert, in every form of groups.

All forms become sorted rows and the ends of each expert's run, without a look at the host. Results that are rounded
once come from the operator itself. Where something follows in fp32 (an activation, weighted sums of pairs, an fp32
result), W8A8 takes the operator's int32 sums and scales them here; the other kinds multiply expert by expert with their
fp32 sums, which reads the ends on the host. npu_grouped_matmul_swiglu_quant, npu_dequant_swiglu_quant and
npu_grouped_matmul_finalize_routing are not used: they round and quantize between these steps in another way than the
contract's, so they would give other bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qhal.errors import BatchError, FormatError
from qhal.groups import Groups, Indexed, Masked
from qhal.requests import GemmRequest, GroupedRequest
from qhal.tensors import QTensor
from qhal_npu import calls, products, running
from qhal_npu.products import Path, Refusal
from qhal_npu.quantizing import HALF_TYPES, quantize
from qhal_npu.weights import STACKED, NpuWeight
from qhal_portable.gemm import accept, write
from qhal_portable.grouped import activate, width
from qhal_portable.quantize import quantize as checked_quantize

_EACH = ("FP8", "FP8 blocks", "MXFP8", "MXFP4", "MXFP4 x MXFP8")
"""Kinds whose experts are multiplied one by one, with fp32 sums as results where something follows."""


@dataclass(frozen=True)
class Rows:
    """Sorted rows. order: of the caller's rows (None: as they are); ends int64 [E]; valid: rows that an expert has."""

    order: Tensor | None
    ends: Tensor
    owner: Tensor
    valid: Tensor


def choose(r: GroupedRequest, arch: str) -> Path | Refusal:
    """The path of the products, for all experts."""
    found = products.choose(replace(r.gemm, graph=False, batch_invariant=False), arch)
    if isinstance(found, Refusal):
        return found
    if any(f.zero is not None for f in r.gemm.x):
        return Refusal("", f"{found.kind}: static zero points of experts are not connected")
    if found.kind in STACKED:
        return found
    if found.kind in _EACH:
        return replace(found, note=f"{found.kind}: expert by expert, whose rows are counted on the host")
    if found.kind.endswith("A16"):
        return products.decoded(r.gemm, arch, f"{found.kind} of experts is not connected to npu_grouped_matmul")
    if found.kind == "W4A8":
        wide = products.choose(replace(r.gemm, bias=True, graph=False, batch_invariant=False), arch)
        return replace(wide, note="int4 codes of experts are kept as int8") if isinstance(wide, Path) else wide
    return Refusal("", f"{found.kind} of experts is not connected to npu_grouped_matmul")


def grouped_gemm(
    x: Tensor | QTensor, p: NpuWeight, groups: Groups, out: Tensor | QTensor | None, arch: str
) -> Tensor | QTensor:
    """See QuantOps.grouped_gemm."""
    r = p.request
    if not isinstance(r, GroupedRequest):
        raise FormatError(f"the weight was prepared for {r}; grouped_gemm needs a GroupedRequest")
    masked = isinstance(groups, Masked)
    dtype = _dtype(x, p, r.gemm, 3 if masked else 2)
    rows = _rows(x, r, groups)
    flat = _flat(x) if masked else x
    if masked:
        flat = _blank(flat, rows.valid)
    sorted_x = flat if rows.order is None else _take(flat, rows.order)
    summed = isinstance(groups, Indexed) and groups.weights is not None
    narrow = r.activation is None and not summed and dtype in HALF_TYPES
    y = _product(sorted_x, p, r, rows, dtype if narrow else torch.float32, arch)
    if r.activation is not None:
        y = activate(y, r.activation)
    y = torch.where(rows.valid[:, None], y, torch.zeros((), dtype=y.dtype, device=y.device))
    if isinstance(groups, Indexed):
        y = _back(y, groups, rows)
    elif masked:
        y = y.reshape(*x.shape[:2], width(r))
    rounded = y.to(dtype)
    if r.quantize is None:
        if isinstance(out, QTensor):
            raise FormatError("out is a QTensor, but the request has no quantize")
        return write(rounded, out)
    if isinstance(out, Tensor):
        raise FormatError(f"out is a plain tensor, the result is {r.quantize}")
    return checked_quantize(rounded, r.quantize, p.place, out, by=lambda rows, o: quantize(rows, o, arch))


def _dtype(x: Tensor | QTensor, p: NpuWeight, r: GemmRequest, axes: int) -> torch.dtype:
    if isinstance(x, QTensor):
        if x.format.storage not in {f.storage for f in r.x} or x.layout != "canonical":
            raise FormatError(f"x is a {x.format} tensor in layout {x.layout}; the weight was prepared for {r.x[0]}")
        if r.out is None:
            raise FormatError(f"x arrives as {x.format}: the request must name the result's dtype (out=)")
        if len(x.shape) != axes or x.shape[-1] != r.k:
            raise FormatError(f"x is {x.shape}, must be [{'E, M' if axes == 3 else 'T'}, {r.k}]")
        return r.out
    dtype = accept(x, r, p.place, axes=axes)
    if not r.x[0].plain and not p.inputs:
        raise FormatError(
            f"x is plain {x.dtype}, but the weight was prepared for {r.x[0]} without saying how to quantize; pass "
            "inputs= to prepare, or quantize x first"
        )
    if p.copy is not None and x.dtype != p.copy.dtype:
        raise FormatError(f"x arrives as {x.dtype}, the weight was prepared for {r}")
    return dtype


def _rows(x: Tensor | QTensor, r: GroupedRequest, groups: Groups) -> Rows:
    """Sorted rows of any form; BatchError for groups that do not fit x."""
    experts = r.experts
    if isinstance(groups, Masked):
        if len(x.shape) != 3 or x.shape[0] != experts or groups.counts.numel() != experts:
            raise BatchError(f"counts of {groups.counts.numel()} experts and x {x.shape}; the request has {experts}")
        most = x.shape[1]
        inside = torch.arange(most, device=groups.counts.device) < groups.counts[:, None]
        ends = torch.arange(1, experts + 1, device=groups.counts.device) * most
        owner = torch.arange(experts, device=ends.device).repeat_interleave(most)
        return Rows(None, ends, owner, inside.reshape(-1))
    if isinstance(groups, Indexed):
        return _sorted(x, r, groups)
    offsets = groups.offsets.to(torch.int64)
    if offsets.numel() != experts + 1:
        raise BatchError(f"offsets of {offsets.numel()} numbers, must be {experts + 1}")
    ends = offsets[1:].contiguous()
    position = torch.arange(x.shape[0], device=ends.device)
    owner = torch.bucketize(position, ends, right=True)
    valid = (position >= offsets[0]) & (owner < experts)
    return Rows(None, ends, owner.clamp(max=experts - 1), valid)


def _sorted(x: Tensor | QTensor, r: GroupedRequest, groups: Indexed) -> Rows:
    ids = groups.ids
    tokens, top_k = ids.shape
    expected = tokens * top_k if groups.pairs else tokens
    if x.shape[0] != expected:
        raise BatchError(f"x has {x.shape[0]} rows, ids {tuple(ids.shape)} need {expected}")
    flat = ids.reshape(-1).to(torch.int64)
    if flat.numel() and (int(flat.min()) < -1 or int(flat.max()) >= r.experts):
        raise BatchError(f"ids must be [T, top_k] of -1 to {r.experts - 1}, got {tuple(ids.shape)}")
    expert = torch.where(flat < 0, r.experts, flat)
    owner, pairs = torch.sort(expert, stable=True)
    counts = (expert[:, None] == torch.arange(r.experts, device=flat.device)).sum(0)
    ends = counts.cumsum(0)
    valid = owner < r.experts
    groups.cache["qhal_npu.pairs"] = pairs
    order = pairs if groups.pairs else pairs // max(top_k, 1)
    return Rows(order, ends, owner.clamp(max=r.experts - 1), valid)


def _back(y: Tensor, groups: Indexed, rows: Rows) -> Tensor:
    """Rows in pair order, or their weighted sums in fp32."""
    pairs = groups.cache["qhal_npu.pairs"]
    unsorted = torch.empty_like(y)
    unsorted[pairs] = y
    if groups.weights is None:
        return unsorted
    tokens, top_k = groups.ids.shape
    share = torch.where(groups.ids < 0, 0.0, groups.weights.float())
    return (unsorted.float().reshape(tokens, top_k, -1) * share[..., None]).sum(1)


def _product(x: Tensor | QTensor, p: NpuWeight, r: GroupedRequest, rows: Rows, dtype: torch.dtype, arch: str) -> Tensor:
    """[T, N] of sorted rows in `dtype`; fp32 means that nothing is rounded yet. Rows of nobody may hold anything."""
    if x.shape[0] == 0:
        return torch.zeros(0, r.gemm.n, dtype=dtype, device=p.place)
    if p.experts:
        return _each(x, p, r, rows, dtype, arch)
    if p.path.kind != "W8A8":
        return _plain(x, p, r, rows, dtype)
    assert isinstance(p.stored, QTensor)
    q, scale = _codes(x, p, rows, arch)
    weight_scale = p.kernel["scale"]
    if dtype in HALF_TYPES:
        return calls.grouped_matmul(
            q, p.stored.codes, rows.ends, dtype, scale=weight_scale, bias=p.bias, per_token_scale=scale
        )
    y = calls.grouped_matmul(q, p.stored.codes, rows.ends, torch.int32).float()
    y = y * scale[:, None] * weight_scale[rows.owner]
    return y if p.bias is None else y + p.bias[rows.owner]


def _codes(x: Tensor | QTensor, p: NpuWeight, rows: Rows, arch: str) -> tuple[Tensor, Tensor]:
    """int8 codes and the fp32 scale of every row."""
    if isinstance(x, Tensor):
        o = p.inputs[0]
        if o.per_expert:
            assert o.scale is not None
            scale = o.scale.float().reshape(-1)[rows.owner]
            quotient = torch.round(x.detach().float() / scale[:, None]).clamp(-128, 127).nan_to_num(0.0)
            return quotient.to(torch.int8), scale
        x = quantize(x.detach(), o, arch)
    assert isinstance(x.scale, Tensor)
    return x.codes, x.scale.float().reshape(-1).expand(x.codes.shape[0]).contiguous()


def _plain(x: Tensor | QTensor, p: NpuWeight, r: GroupedRequest, rows: Rows, dtype: torch.dtype) -> Tensor:
    copy = p.copy
    assert copy is not None
    value = x.codes if isinstance(x, QTensor) else x.detach()
    bias = p.bias if dtype == torch.bfloat16 else p.bias_copy  # the operator takes fp32 beside bf16, fp16 beside fp16
    if dtype == copy.dtype and dtype in HALF_TYPES and (p.bias is None or bias is not None):
        return calls.grouped_matmul(value, copy.transpose(-1, -2), rows.ends, dtype, bias=bias)
    y = torch.zeros(value.shape[0], r.gemm.n, dtype=torch.float32, device=p.place)
    start = 0
    for e, end in enumerate(rows.ends.tolist()):
        if end > start:
            part = value[start:end]
            wide = copy.dtype == torch.float32
            y[start:end] = part @ copy[e].T if wide else torch.mm(part, copy[e].T, out_dtype=torch.float32)
            if p.bias is not None:
                y[start:end] += p.bias[e]
        start = end
    return y


def _each(x: Tensor | QTensor, p: NpuWeight, r: GroupedRequest, rows: Rows, dtype: torch.dtype, arch: str) -> Tensor:
    y = torch.zeros(x.shape[0], r.gemm.n, dtype=dtype, device=p.place)
    start = 0
    for e, end in enumerate(rows.ends.tolist()):
        if end > start:
            y[start:end] = running.product(p.experts[e], arch)(_part(x, start, end), 0, dtype)
        start = end
    return y


def _part(x: Tensor | QTensor, start: int, end: int) -> Tensor | QTensor:
    return x[start:end] if isinstance(x, Tensor) else x.narrow(0, start, end)


def _flat(x: Tensor | QTensor) -> Tensor | QTensor:
    """[E, M, K] as [E * M, K]."""
    if isinstance(x, Tensor):
        return x.reshape(-1, x.shape[-1])

    def rows(t: Tensor | QTensor | None) -> Tensor | None:
        assert not isinstance(t, QTensor)
        return None if t is None else t.reshape(-1, *t.shape[2:])

    return replace(x, codes=x.codes.reshape(-1, x.shape[-1]), scale=rows(x.scale), zero=rows(x.zero))


def _blank(x: Tensor | QTensor, valid: Tensor) -> Tensor | QTensor:
    """Rows that nobody has may hold anything, NaN too: zero before anything reads them."""
    if isinstance(x, Tensor):
        return torch.where(valid[:, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    return x


def _take(x: Tensor | QTensor, order: Tensor) -> Tensor | QTensor:
    if isinstance(x, Tensor):
        return x[order]

    def rows(t: Tensor | QTensor | None) -> Tensor | QTensor | None:
        return t[order] if isinstance(t, Tensor) and t.shape[0] == x.shape[0] else t

    return replace(x, codes=x.codes[order], scale=rows(x.scale), zero=rows(x.zero))
