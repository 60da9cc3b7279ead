"""Every torch_npu operator that this backend calls, one function each; nothing else touches `torch.ops.npu`.

They go through the dispatcher and not through torch_npu's Python functions, so this module imports no device library:
`qhal_npu.load` does. Schemas are checked by name against the wheel's (`make conformance-npu`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ND, FRACTAL_NZ = 2, 29
INTERNAL = (29, 50, 51)
"""FRACTAL_NZ, and FRACTAL_NZ_C0_16 and _C0_32 for narrow codes beside wider ones."""
INT8, INT32, FP16, FP32, QINT8, BF16, QUINT4X2 = 1, 3, 5, 6, 12, 15, 16
E4M3FN, E8M0, E2M1 = 292, 293, 296
"""Above 256: 256 + the aclDataType, as torch_npu numbers types that torch has no word for."""
NUMBER = {torch.float16: FP16, torch.bfloat16: BF16, torch.float32: FP32, torch.int32: INT32}


def _npu() -> Any:
    return torch.ops.npu


def runtime() -> Any:
    """`torch.npu`, which torch_npu adds: memory, streams, settings."""
    return torch.npu  # type: ignore[attr-defined]


def quant_matmul(x: Tensor, w: Tensor, scale: Tensor, out: torch.dtype, **more: Any) -> Tensor:
    """x [M, K] @ w [K, N], see `npu_quant_matmul`; more: pertoken_scale, bias, MX types and group sizes."""
    y: Tensor = _npu().npu_quant_matmul(x, w, scale, output_dtype=NUMBER[out], **more)
    return y


def weight_quant_matmul(
    x: Tensor, w: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """x @ ((w + offset) * scale) + bias, see `npu_weight_quant_batchmatmul`; group 0: one scale per column."""
    y: Tensor = _npu().npu_weight_quant_batchmatmul(
        x, w, scale, antiquant_offset=offset, bias=bias, antiquant_group_size=group
    )
    return y


def grouped_matmul(x: Tensor, w: Tensor, ends: Tensor, out: torch.dtype, **more: Tensor | None) -> Tensor:
    """Rows x [T, K] sorted by expert, w [E, K, N], ends int64 [E] cumulative; more: scale, bias, per_token_scale."""
    lists = {name: [t] for name, t in more.items() if t is not None}
    found: list[Tensor] = _npu().npu_grouped_matmul(
        [x], [w], group_list=ends, split_item=3, group_type=0, group_list_type=0, output_dtype=NUMBER[out], **lists
    )
    return found[0]


def dynamic_quant(x: Tensor, dst_type: int) -> tuple[Tensor, Tensor]:
    """Codes and fp32 scales [...] of the rows of x, see `npu_dynamic_quant`."""
    codes, scale = _npu().npu_dynamic_quant(x, dst_type=dst_type)
    return codes, scale


def static_quant(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """round(x / scale + zero) as int8, scale and zero fp32 [1], see `npu_quantize`."""
    codes: Tensor = _npu().npu_quantize(x, scale, zero, QINT8, -1, True)
    return codes


def dynamic_mx_quant(x: Tensor, dst_type: int, round_mode: str) -> tuple[Tensor, Tensor]:
    """Codes (E2M1 two to a byte) and E8M0 bytes [..., ceil(K/64), 2], see `npu_dynamic_mx_quant`."""
    codes, scale = _npu().npu_dynamic_mx_quant(x, dst_type=dst_type, round_mode=round_mode)
    return codes, scale


def to_nz(w: Tensor) -> Tensor:
    """w [..., K, N] in FRACTAL_NZ. RuntimeError if it stayed ND, which torch_npu does not report."""
    _allow_internal_format(w)
    return _checked_nz(w, _npu().npu_format_cast(w, FRACTAL_NZ))


def e2m1_to_nz(w: Tensor) -> Tensor:
    """E2M1 pairs [N, K/2] in FRACTAL_NZ, laid out to meet e4m3fn activations."""
    _allow_internal_format(w)
    return _checked_nz(w, _npu().npu_format_cast(w, FRACTAL_NZ, customize_dtype=E4M3FN, input_dtype=E2M1))


def _checked_nz(w: Tensor, cast: Tensor) -> Tensor:
    if w.device.type == "npu" and int(_npu().get_npu_format(cast)) not in INTERNAL:
        raise RuntimeError(
            "npu_format_cast left a weight in ND; set torch.npu.config.allow_internal_format = True before loading"
        )
    return cast


def from_nz(w: Tensor) -> Tensor:
    """w in ND again."""
    cast: Tensor = _npu().npu_format_cast(w, ND)
    return cast


def int4pack(codes: Tensor) -> Tensor:
    """int32 codes [..., n] to int32 words [..., n / 8], see `npu_convert_weight_to_int4pack`; packed on the host."""
    packed: Tensor = _npu().npu_convert_weight_to_int4pack(codes.to(torch.int32).contiguous())
    return packed


def fused_attention(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """o and lse, see `npu_fused_infer_attention_score`."""
    o, lse = _npu().npu_fused_infer_attention_score(q, k, v, **more)
    return o, lse


def fused_attention_v2(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """o and lse, see `npu_fused_infer_attention_score_v2`."""
    o, lse = _npu().npu_fused_infer_attention_score_v2(q, k, v, **more)
    return o, lse


def scatter_rows(cache: Tensor, rows: Tensor, values: Tensor) -> None:
    """cache[rows[i]] = values[i] in place, see `npu_scatter_nd_update_`; rows int64 [T]."""
    _npu().npu_scatter_nd_update_(cache, rows.reshape(-1, 1), values)


def _allow_internal_format(w: Tensor) -> None:
    if w.device.type == "npu":
        runtime().config.allow_internal_format = True
