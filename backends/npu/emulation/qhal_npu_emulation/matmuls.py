"""Products by their published formulas: in which order sums, scales and biases meet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qhal_npu.layouts import pack_int4, unpack_int4
from qhal_npu_emulation.numbers import F32, e2m1, e8m0, int4_weight, kind, scale_value, sums


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """(int32 sums + int32 bias) * scale * pertoken + float bias; MX: sums of decoded codes times their bytes."""
    out = kind(output_dtype)
    assert isinstance(out, torch.dtype)
    if scale_dtype is not None and kind(scale_dtype) == "e8m0":
        return _mx(x1, x2, scale, pertoken_scale, bias, x1_dtype, x2_dtype).to(out)
    if group_sizes == [1, 128, 128]:
        return _blocks(x1, x2, scale, pertoken_scale, bias).to(out)
    a, b = x1, x2
    if x1.dtype == torch.int32:
        a, b = unpack_int4(x1), int4_weight(x2)
    if a.dtype.is_floating_point:
        y = a.to(F32) @ b.to(F32)
    else:
        total = sums(a, b)
        if bias is not None and bias.dtype == torch.int32:
            total, bias = total + bias, None
        if out == torch.int32:
            return total.to(torch.int32)
        y = total.to(F32)
    y = y * scale_value(scale)
    if pertoken_scale is not None:
        y = y * pertoken_scale.to(F32).reshape(-1, 1)
    return (y if bias is None else y + bias.to(F32)).to(out)


def _mx(
    x1: Tensor, x2: Tensor, scale: Tensor, rows: Tensor | None, bias: Tensor | None, t1: int | None, t2: int | None
) -> Tensor:
    """x1 [M, K], x2 [K, N]; bytes [M, K/64, 2] and [K/64, N, 2]."""
    assert rows is not None
    a = e2m1(x1) if t1 is not None and kind(t1) == "e2m1" else x1.to(F32)
    b = e2m1(x2.t().contiguous()).t() if t2 is not None and kind(t2) == "e2m1" else x2.to(F32)
    k = a.shape[-1]
    sa = e8m0(rows).flatten(-2).repeat_interleave(32, -1)[..., :k]
    sb = e8m0(scale).permute(1, 0, 2).flatten(-2).repeat_interleave(32, -1)[..., :k].t()
    y = ((a.double() * sa.double()) @ (b.double() * sb.double())).to(F32)
    return y if bias is None else y + bias.to(F32)


def _blocks(x1: Tensor, x2: Tensor, scale: Tensor, rows: Tensor | None, bias: Tensor | None) -> Tensor:
    """x1 [M, K] in groups of 128, x2 [K, N] in tiles of 128 x 128: scales [M, K/128] and [K/128, N/128]."""
    assert rows is not None
    k, n = x2.shape
    a = x1.to(F32).double() * rows.repeat_interleave(128, 1)[:, :k]
    b = x2.to(F32).double() * scale.repeat_interleave(128, 0)[:k].repeat_interleave(128, 1)[:, :n]
    y = (a @ b).to(F32)
    return y if bias is None else y + bias.to(F32)


def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """x @ ((w + offset) * scale) + bias, the decoded weight in the type of x."""
    w = int4_weight(weight) if weight.dtype == torch.int32 else weight
    decoded = _antiquant(w, antiquant_scale, antiquant_offset).to(x.dtype)
    y = x.to(F32) @ decoded.to(F32)
    return (y if bias is None else y + bias.to(F32)).to(x.dtype)


def _antiquant(w: Tensor, s: Tensor, off: Tensor | None) -> Tensor:
    k, n = w.shape[-2:]

    def spread(t: Tensor) -> Tensor:
        t = t.to(F32).reshape(-1, n)
        return t.repeat_interleave(k // t.shape[0], 0)

    return (w.to(F32) + (0.0 if off is None else spread(off))) * spread(s)


def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    scale: list[Tensor] | None = None,
    antiquant_scale: list[Tensor] | None = None,
    antiquant_offset: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
    **other: Any,
) -> list[Tensor]:
    """`npu_quant_matmul` per run of rows, and int8 x int4 as two planes of 4 bits; cumulative group lists."""
    if group_list_type or group_type or split_item not in (2, 3) or any(v for v in other.values()):
        raise NotImplementedError("emulated: one result, rows grouped, cumulative lists")
    assert group_list is not None
    rows, w = x[0], weight[0]
    out = kind(output_dtype, rows.dtype)
    assert isinstance(out, torch.dtype)
    n = w.shape[-1] * 8 if w.dtype == torch.int32 else w.shape[-1]
    y = torch.zeros(rows.shape[0], n, dtype=out)
    start = 0
    for e, end in enumerate(group_list.tolist()):
        part = slice(start, end)
        one = {name: None if v is None else v[0][e] for name, v in (("b", bias), ("s", scale), ("a", antiquant_scale))}
        off = None if antiquant_offset is None else antiquant_offset[0][e]
        pertoken = None if per_token_scale is None else per_token_scale[0][part]
        y[part] = _one(rows[part], w[e], one["b"], one["s"], one["a"], off, pertoken, out)
        start = end
    return [y]


def _one(
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor | None,
    anti: Tensor | None,
    off: Tensor | None,
    pertoken: Tensor | None,
    out: torch.dtype,
) -> Tensor:
    if anti is not None:
        decoded = _antiquant(int4_weight(w) if w.dtype == torch.int32 else w, anti, off).to(a.dtype)
        y = a.to(F32) @ decoded.to(F32)
    elif a.dtype == torch.int8 and w.dtype == torch.int32:
        return two_planes(a, int4_weight(w), s, bias, pertoken).to(out)
    elif a.dtype == torch.int8:
        total = sums(a, w)
        if bias is not None and bias.dtype == torch.int32:
            total, bias = total + bias, None
        if out == torch.int32:
            return total.to(torch.int32)
        assert s is not None
        y = total.to(F32) * scale_value(s)
    else:
        y = a.to(F32) @ w.to(F32)
        y = y if s is None else y * scale_value(s)
    if pertoken is not None:
        y = y * pertoken.to(F32).reshape(-1, 1)
    return (y if bias is None else y + bias.to(F32)).to(out)


def two_planes(a: Tensor, w: Tensor, s: Tensor | None, bias: Tensor | None, pertoken: Tensor | None) -> Tensor:
    """x = 16 high + low + 8: the kernel drops the 8, so that its bias must hold 8 sum_k(w scale)."""
    assert s is not None
    high, low = a >> 4, (a & 15) - 8
    y = (16 * sums(high, w) + sums(low, w)).to(F32) * scale_value(s).reshape(1, -1)
    y = y if bias is None else y + bias.to(F32)
    return y if pertoken is None else y * pertoken.to(F32).reshape(-1, 1)


def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """Eight codes to an int32, the first lowest: measured on the wheel's own packer, which runs on the host."""
    if weight.dtype != torch.int32 or not weight.is_contiguous() or weight.shape[-1] % 8:
        raise RuntimeError(f"int4pack takes contiguous int32 [..., 8j], not {weight.dtype} {tuple(weight.shape)}")
    return pack_int4(weight)


def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """Values and logical shape stay; what changes is the order of bytes on a device (`layouts.nz`)."""
    return input.clone(memory_format=torch.contiguous_format)


def mm_dtype(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`torch.mm` with another result: the wheel has a kernel for it, torch has none for the processor."""
    return a.to(out_dtype) @ b.to(out_dtype)
