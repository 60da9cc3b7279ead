"""Formats in the words of Quark: the specs of weights, inputs and caches, and how config.json spells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qhal.blocks import Block
from qhal.elements import element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal_schemes.quark import dynamic_format
from qhal_schemes.quark_config import ELEMENTS, INTEGERS, MX, TensorSpec
from qhal_schemes.quark_weights import weight_format
from qhal_schemes.target import STORED

DTYPES = {name: dtype for dtype, name in ELEMENTS.items()}
"""The dtype of every element, the inverse of ELEMENTS."""
_QSCHEMES = {"tensor": "per_tensor", "row": "per_channel", "group": "per_group", "tile": "per_block"}
_OBSERVERS = {
    "per_tensor": "PerTensorMinMaxObserver",
    "per_channel": "PerChannelMinMaxObserver",
    "per_group": "PerGroupMinMaxObserver",
    "per_block": "PerBlockMinMaxObserver",
}
_HELD = (
    "quark holds fp8 per tensor, row, group and tile, int4, uint4, int8 and uint8 per tensor, row and group, fp4 and "
    "fp6 in groups with exponents, and int4 under fp8 scales"
)


@dataclass(frozen=True)
class Weight:
    """How a weight is written. scale: the element of its scales; outer: that of the first stage's, "" without one."""

    specs: tuple[TensorSpec, ...]
    scale: str
    outer: str = ""

    @property
    def format(self) -> Format:
        """The format that a reader of the file finds."""
        stage = ""
        if self.outer:
            stage = f"{'row' if self.specs[0].qscheme == 'per_channel' else 'tensor'}*{self.outer}"
        return weight_format(self.specs[-1], self.scale, stage)


def weight_words(w: Format) -> Weight:
    """The specs that come nearest to a weight's format; FormatError with what there is where none does."""
    e, block, scale = element(w.element), w.block, w.scale
    refused = FormatError(f"{_HELD}; not {w}")
    if block is None or scale is None or w.op != "*" or w.offset is not None or block.kind not in _QSCHEMES:
        raise refused
    name, asymmetric = e.name, w.zero is not None
    if e.integer:
        if e.bits > 8 or block.kind == "tile" or (not asymmetric and e.kind == "uint"):
            raise refused
        name = f"{e.kind}{4 if e.bits <= 4 else 8}"
    exponents = scale.plain and scale.element == "e8m0"
    if name not in DTYPES or (asymmetric and not e.integer):
        raise refused
    if exponents != (DTYPES[name] in MX) and not (exponents and DTYPES[name].startswith("fp8")):
        raise refused
    if DTYPES[name] in MX and block.kind != "group":
        raise refused
    spec = _spec(DTYPES[name], block, symmetric=not asymmetric, exponents=exponents)
    if scale.plain:
        return Weight((spec,), _wide(scale, refused) if not exponents else "e8m0")
    inner, outside = scale.scale, scale.block
    stages = name == "int4" and not asymmetric and scale.element in STORED and scale.op == "*"
    if stages and inner is not None and inner.plain and outside is not None and outside.kind in ("tensor", "row"):
        return Weight((_spec("fp8_e4m3", outside), spec), scale.element, _wide(inner, refused))
    if e.integer:  # the product of the levels, if that is exact
        return Weight((spec,), "fp32")
    raise refused


def input_words(f: LinearFormat) -> TensorSpec | None:
    """The spec of a module's input; FormatError where there is none."""
    given = f.input
    if given is None:
        return None
    refused = FormatError(f"quark has no word for {'static ' if f.static_input else ''}inputs quantized to {given}")
    block, scale = given.block, given.scale
    if block is None or scale is None or not scale.plain or given.offset is not None or given.element not in DTYPES:
        raise refused
    dtype = DTYPES[given.element]
    exponents = scale.element == "e8m0"
    if given.zero is not None and (
        not given.zero.plain or given.zero.element != given.element or dtype not in INTEGERS
    ):
        raise refused
    if dtype in ("int4", "uint4") or block.kind not in ("tensor", "row", "group"):
        raise refused
    if f.static_input:
        if block.kind != "tensor" or scale.element not in STORED or dtype in MX:
            raise refused
        return _spec(dtype, block, symmetric=given.zero is None)
    if exponents != (dtype in MX) and not (exponents and dtype.startswith("fp8")):
        raise refused
    if exponents and block.kind != "group":
        raise refused
    specs = [
        _spec(dtype, block, axis=1, symmetric=given.zero is None, dynamic=True, exponents=exponents, mode=mode)
        for mode in (("even", "floor", "ceil") if exponents else ("even",))
    ]
    return next((spec for spec in specs if dynamic_format(spec) == given), specs[0])


def cache_words(k: Format) -> TensorSpec:
    """The spec of the outputs that a cache keeps; FormatError where there is none."""
    known = k.element in ("e4m3fn", "int8") and k.zero is None and k.offset is None
    if not known or k.block is None or k.block.kind != "tensor" or k.scale is None or k.scale.element not in STORED:
        raise FormatError(f"quark holds caches of e4m3fn or int8 with one static scale, not of {k}")
    return _spec(DTYPES[k.element], k.block)


def spec_json(s: TensorSpec) -> dict[str, Any]:
    """A spec with every key that Quark 0.13 writes."""
    axis = {"per_channel": s.axis, "per_group": -1}.get(s.qscheme)
    mx = s.dtype in MX
    return {
        "dtype": s.dtype,
        "qscheme": s.qscheme,
        "ch_axis": axis,
        "group_size": s.group_size or None,
        "block_size": list(s.block) if s.qscheme == "per_block" else None,
        "is_dynamic": s.dynamic,
        "symmetric": None if mx else s.symmetric,
        "observer_cls": "PerBlockMXObserver" if s.exponent_scale else _OBSERVERS[s.qscheme],
        "round_method": "half_even",
        "scale_type": "float",
        "scale_format": "e8m0" if s.exponent_scale else None,
        "scale_calculation_mode": s.mode if s.exponent_scale else None,
        "zero_point_type": "int32",
        "is_scale_quant": False,
        "mx_element_dtype": None,
        "enable_buffer_reuse": False,
        "max_input_numel": 4194304,
    }


def _spec(
    dtype: str,
    block: Block,
    *,
    axis: int = 0,
    symmetric: bool = True,
    dynamic: bool = False,
    exponents: bool = False,
    mode: str = "even",
) -> TensorSpec:
    qscheme = _QSCHEMES[block.kind]
    group = block.cols if qscheme == "per_group" else 0
    tile = (block.rows, block.cols) if qscheme == "per_block" else (0, 0)
    axis = {"per_channel": axis, "per_group": 1}.get(qscheme, 0)
    return TensorSpec(dtype, qscheme, axis, group, tile, dynamic, symmetric, exponents, mode)


def _wide(scale: Format, refused: FormatError) -> str:
    if scale.element not in STORED:
        raise refused
    return scale.element
