"""The algorithms of ModelOpt: what each quant_algo stores, and in which formats its layers compute.

Names as hf_quant_config.json has them (modelopt/torch/export/quant_utils.py, versions 0.23 to 0.47). Scales multiply.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qhal.elements import element
from qhal.formats import Format


@dataclass(frozen=True)
class Algorithm:
    """What a quant_algo stores and how its layers compute.

    weight    the format; {g} stands for the group size
    group     the group size where the configuration names none; 0: the width of the scale tells
    input     the format of the input; "": it stays as it is
    static    the input has a stored scale, `input_scale`
    operand   the weight is rounded to this before the product, with the scale `weight_scale_2`
    low_rank  a branch x @ lora_a.T @ lora_b.T beside the product
    """

    weight: str
    group: int = 0
    input: str = ""
    static: bool = False
    operand: str = ""
    low_rank: bool = False

    def format(self, group: int = 0) -> Format:
        """The weight's format for groups of `group` elements."""
        return _format(self.weight.format(g=group or self.group or 1))

    def input_format(self, group: int = 0) -> Format | None:
        """The input's format; dynamic MX exponents are ceil(log2(amax / qmax))."""
        return _format(self.input.format(g=group or self.group)) if self.input else None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return element(self.format().element).bits

    @property
    def operand_format(self) -> Format | None:
        """What the weight is rounded to before the product."""
        return _format(self.operand) if self.operand else None


_FP8, _INT8, _INT4 = "e4m3fn.tensor*fp32", "int8.row*fp32", "int4.g{g}*fp32"
_NVFP4 = "e2m1.g{g}*(e4m3fn.tensor*fp32)"
_MXFP4, _MXFP8 = "e2m1.g{g}*e8m0", "e4m3fn.g{g}*e8m0"
ALGORITHMS: dict[str, Algorithm] = {
    "FP8": Algorithm(_FP8, input=_FP8, static=True),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm("e4m3fn.row*fp32", input="e4m3fn.row*fp32"),
    "FP8_PB_WO": Algorithm("e4m3fn.{g}x{g}*fp32", 128),
    "NVFP4": Algorithm(_NVFP4, 16, _NVFP4, static=True),
    "NVFP4_AWQ": Algorithm(_NVFP4, 16, _NVFP4, static=True),
    "NVFP4_SVD": Algorithm(_NVFP4, 16, _NVFP4, static=True, low_rank=True),
    "W4A16_NVFP4": Algorithm(_NVFP4, 16),
    "W4A8_NVFP4_FP8": Algorithm(_NVFP4, 32, _FP8, static=True),
    "W4A16_AWQ": Algorithm(_INT4),
    "W4A8_AWQ": Algorithm(_INT4, 0, _FP8, static=True, operand=_FP8),
    "W8A8_SQ_PER_CHANNEL": Algorithm(_INT8, input="int8.tensor*fp32", static=True),
    "W8A16": Algorithm(_INT8),
    "MXFP4": Algorithm(_MXFP4, 32, _MXFP4 + "@e8m0=ceil"),
    "W4A8_MXFP4_FP8": Algorithm(_MXFP4, 32, _FP8, static=True),
    "MXFP8": Algorithm(_MXFP8, 32, _MXFP8 + "@e8m0=ceil"),
}
"""Every quant_algo that can be read; some are written in lower case (fp8_pb_wo, mxfp4)."""

CACHES = {"FP8": _FP8, "NVFP4": _NVFP4.format(g=16)}
"""kv_cache_quant_algo -> the format of K and V."""


@lru_cache(maxsize=64)
def _format(name: str) -> Format:
    return Format.parse(name)
