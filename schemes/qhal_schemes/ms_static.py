"""Static int8 inputs of ModelSlim: input_scale, input_offset, deq_scale and quant_bias of W8A8 and W8A8_MIX.

y = (codes(x) @ w.T + quant_bias) * deq_scale with deq_scale = input_scale * weight_scale and
quant_bias = round(bias / deq_scale - input_offset * sum_k w). Devices add quant_bias, so the bias of a W8A8 layer is
the one that it stands for, (quant_bias + input_offset * sum_k w) * deq_scale, at most deq_scale / 2 from the `bias`
stored beside it. W8A8_MIX adds `bias` where inputs are dynamic; there quant_bias is checked and dropped.
Models in float16 store deq_scale as int64: the bits of the float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhal.formats import Format
from qhal.specs import Operand
from qhal_schemes import checks
from qhal_schemes.lanes import row_sums
from qhal_schemes.ms_types import STATIC
from qhal_schemes.source import WIDE, TensorIndex

PARTS = ("input_scale", "input_offset", "quant_bias", "deq_scale")
_MARK = 1 << 46
"""Set in scales that were already converted for an operator."""
_UNIT = 2.0**-24


def locate(index: TensorIndex, stem: str, n: int) -> tuple[str, ...]:
    """Check the tensors of a static input by dtype and shape; their names."""
    for part in PARTS[:2]:
        name = f"{stem}.{part}"
        scalar = name in index and index[name].shape == ()
        index.expect(name, tuple(WIDE), () if scalar else (1,))
    index.expect(f"{stem}.quant_bias", ("I32",), (n,))
    index.expect(f"{stem}.deq_scale", ("F32", "I64"), (n,))
    return tuple(f"{stem}.{part}" for part in PARTS)


def product_scale(index: TensorIndex, stem: str, stored: Tensor) -> Tensor:
    """deq_scale as float32."""
    name = f"{stem}.deq_scale"
    if stored.dtype == torch.int64:
        bits = torch.where(stored >= _MARK, stored - _MARK, stored)
        if bool(((bits < 0) | (bits >= 1 << 32)).any()):
            raise index.bad(name, "the bits of float32 numbers in int64", "other int64 values")
        stored = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    checks.scales(index, name, stored, positive=True)
    return stored


def operand(index: TensorIndex, stem: str, t: dict[str, Tensor]) -> Operand:
    """The static input: one scale and one offset."""
    scale, offset = t["input_scale"].float().reshape(1), t["input_offset"].float().reshape(1)
    checks.scales(index, f"{stem}.input_scale", scale, positive=True)
    checks.finite(index, f"{stem}.input_offset", offset)
    return Operand(Format.parse(STATIC), scale, offset)


def folded_bias(index: TensorIndex, stem: str, t: dict[str, Tensor], known: bool) -> Tensor:
    """float32 [n]: the bias that quant_bias stands for. Product scale and bias are compared with what is stored beside
    them, weight_scale and `bias`. known: the layer has no other bias than `bias`, none if the file has none.
    """
    deq, offset = product_scale(index, stem, t["deq_scale"]).double(), t["input_offset"].double().reshape(1)
    if "weight_scale" in t:
        _check_product(index, stem, t, deq)
    correction = offset * row_sums(t["weight"])
    folded = (t["quant_bias"].double() + correction) * deq
    if known or "bias" in t:
        bias = t["bias"].double() if "bias" in t else torch.zeros_like(deq)
        rounding = 0.5 + 4 * _UNIT * ((bias / deq).abs() + correction.abs())
        wrong = ~((folded - bias).abs() <= deq * rounding)
        if bool(wrong.any()):
            raise index.bad(
                f"{stem}.quant_bias",
                "round(bias / deq_scale - input_offset * sums of the rows of the weight)",
                f"{int(wrong.sum())} other values",
            )
    return folded.float()


def _check_product(index: TensorIndex, stem: str, t: dict[str, Tensor], deq: Tensor) -> None:
    """deq_scale is input_scale * weight_scale, rounded in the coarsest of their dtypes."""
    expected = t["input_scale"].double().reshape(1) * t["weight_scale"].double().flatten()
    unit = max(torch.finfo(t[part].dtype).eps for part in ("input_scale", "weight_scale"))
    wrong = ~((deq - expected).abs() <= expected.abs() * max(unit, 2 * _UNIT))
    if bool(wrong.any()):
        raise index.bad(f"{stem}.deq_scale", "input_scale * weight_scale", f"{int(wrong.sum())} other values")
