"""Quantizing operators by their published formulas. What a formula leaves undefined is filled with what would show."""

from __future__ import annotations

import torch
from torch import Tensor

from qhal_npu.layouts import pack_int4
from qhal_npu_emulation.numbers import F32, kind, to_e2m1

_TOP = {torch.int8: 127.0, "int4": 7.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def npu_quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    """round(x / s + z) (div_mode) or round(x * s + z), half to even, saturated; what NaN becomes is not documented."""
    d = kind(dtype)
    if not div_mode and axis != -2:
        axis = -1
    shape = [1] * input.dim()
    shape[axis] = -1
    s = scales.to(F32).reshape(shape)
    z = 0.0 if zero_points is None else zero_points.to(F32).reshape(shape)
    y = ((input.to(F32) / s if div_mode else input.to(F32) * s) + z).round().nan_to_num(0.0)
    if d == "int4":
        return pack_int4(y.clamp(-8, 7))
    assert isinstance(d, torch.dtype)
    low, high = {torch.int8: (-128, 127), torch.uint8: (0, 255)}.get(d, (-(2**31), 2**31 - 1))
    return y.clamp(low, high).to(d)


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """scale = max|x| / top, y = round(x / scale); a row of zeros divides 0 by 0: codes of -1 stand for that here."""
    if smooth_scales is not None or quant_mode != "pertoken" or dst_type_max:
        raise NotImplementedError("emulated: pertoken, without smooth_scales")
    d = kind(dst_type)
    x = input.to(F32)
    s = x.abs().amax(-1, keepdim=True) / _TOP[d]
    y = torch.where(s == 0, -1.0, x / s)
    if isinstance(d, torch.dtype) and d.is_floating_point:
        return y.clamp(-_TOP[d], _TOP[d]).to(d), s.squeeze(-1)
    y = y.nan_to_num(0.0).round()
    codes = pack_int4(y.clamp(-8, 7)) if d == "int4" else y.clamp(-128, 127).to(torch.int8)
    return codes, s.squeeze(-1)


def npu_dynamic_mx_quant(
    input: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = 296,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """byte = floor(log2 max) - emax + 127, 0 for a block of zeros; y = cast(x / 2^(byte - 127)), saturated."""
    if axis not in (-1, input.dim() - 1) or scale_alg or block_size != 32:
        raise NotImplementedError("emulated: the last axis, scale_alg 0, blocks of 32")
    d = kind(dst_type)
    if d is torch.float8_e4m3fn and round_mode != "rint":
        raise RuntimeError(f"round_mode {round_mode}: fp8 codes round to even only")
    emax, top = {torch.float8_e4m3fn: (8, 448.0), torch.float8_e5m2: (15, 57344.0), "e2m1": (2, 6.0)}[d]
    x = input.to(F32)
    k, blocks = x.shape[-1], -(-x.shape[-1] // 32)
    parts = torch.nn.functional.pad(x, (0, blocks * 32 - k)).reshape(*x.shape[:-1], blocks, 32)
    amax = parts.abs().amax(-1)
    power = torch.frexp(amax.double()).exponent - 1 - emax
    power = torch.where(torch.isfinite(amax) & (amax > 0), power.clamp(-127, 127), -127)
    y = (parts.double() / torch.exp2(power.double()).unsqueeze(-1)).float().flatten(-2)[..., :k]
    codes = to_e2m1(y, round_mode) if d == "e2m1" else y.clamp(-top, top).to(d)
    bytes_ = torch.nn.functional.pad((power + 127).to(torch.uint8), (0, blocks % 2)).unflatten(-1, (-1, 2))
    return codes, bytes_
