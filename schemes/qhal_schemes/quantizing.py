"""Quantizing a float checkpoint, module by module: into a checkpoint on disk, or on the way in. Same bits either way.

Round to nearest in float32, without calibration data. Scales have the divisors and exponents of compressed-tensors,
whose files are written (compressed_tensors/quantization/utils/helpers.py, calculate_qparams).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qhal.elements import dtype_name
from qhal.encoding import encode
from qhal.errors import CheckpointError, FormatError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec, Operand
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.base import SchemeMapping
from qhal_schemes.compressed_tensors_writer import (
    POSSIBLE,
    Layout,
    dynamic_inputs,
    plan_layout,
)
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.matching import LINEAR, Patterns, is_router, module_class
from qhal_schemes.modules import ModuleTable
from qhal_schemes.plain import describe_plain
from qhal_schemes.source import WIDE, TensorIndex

WORDS: dict[str, tuple[str, str | None]] = {
    "int4": ("int4.g128*{scale}@qmax=7.5", None),
    "int8": ("int8.row*{scale}@qmax=127.5", "int8"),
    "fp8": ("e4m3fn.tensor*{scale}", "fp8"),
    "fp8_row": ("e4m3fn.row*{scale}", "fp8"),
    "fp8_block": ("e4m3fn.128x128*{scale}", "fp8_g128"),
    "mxfp8": ("e4m3fn.g32*e8m0@e8m0=up1.75", "mxfp8"),
    "mxfp4": ("e2m1.g32*e8m0@e8m0=up1.75", None),
    "nvfp4": ("e2m1.g16*(e4m3fn.tensor/fp32)", None),
}
"""What a bare word means for a whole checkpoint: the weights' format, and inputs quantized while running (None: not).
{scale} is the model's dtype. Besides, weights only: int<b>_g<k> and int<b>_row, asymmetric uint<b>_g<k>, uint<b>_row.
"""

_WORD = re.compile(r"(u?)int([2-8])_(?:g(\d+)|row|channel)")


def resolve_format(name: str | Format, dtype: torch.dtype) -> Layout:
    """What `name` means for a model of `dtype`: a word of WORDS, or a weight format by its own name (weights only)."""
    if isinstance(name, Format):
        return plan_layout(name)
    if not isinstance(name, str):
        raise FormatError(f"format {name!r}: expected the name of a format; words: {', '.join(WORDS)}")
    word, scale = name.strip(), dtype_name(dtype)
    found = _WORD.fullmatch(word)
    if found:
        u, bits, size = found.groups()
        b, block = int(bits), f"g{size}" if size else "row"
        text = f"int{b}-int{b}.{block}*{scale}@domain=minmax" if u else f"int{b}.{block}*{scale}@qmax={(2**b - 1) / 2}"
        return plan_layout(Format.parse(text))
    if word in WORDS:
        text, inputs = WORDS[word]
        return plan_layout(Format.parse(text.format(scale=scale)), dynamic_inputs(inputs) if inputs else None)
    try:
        fmt = Format.parse(word)
    except FormatError as bad:
        raise FormatError(f"{bad}; words for a checkpoint: {', '.join(WORDS)}, int<b>_g<k>, uint<b>_g<k>") from None
    if fmt.plain:
        raise FormatError(
            f"format {name!r} is a bare element: words for a checkpoint are {', '.join(WORDS)}, int<b>_g<k>, "
            f"int<b>_row, uint<b>_g<k>, uint<b>_row; weight formats: {POSSIBLE}"
        )
    return plan_layout(fmt)


@dataclass(frozen=True)
class Choice:
    """Which Linear modules are quantized, in file order, and by which rule each of the others stays plain."""

    modules: tuple[str, ...]
    left: dict[str, str]
    ignore: tuple[str, ...]
    """every name that the written configuration must ignore: the plain modules, and a head that the file shares"""


def choose(config: CheckpointConfig, index: TensorIndex, layout: Layout, ignore: Sequence[str]) -> Choice:
    """Pick the modules: 2-D float weights that are no embedding, router or ignored; refuses shapes that do not fit."""
    if config.method:
        raise CheckpointError(
            f"{config.folder}: already quantized ({config.method}); quantize the checkpoint that it was made from"
        )
    patterns = Patterns("ignore", (ignore,) if isinstance(ignore, str) else ignore)
    table = ModuleTable(index)
    weights = {m: t["weight"] for m, t in table.items() if "weight" in t and module_class(m) == LINEAR}
    linears = [m for m, weight in weights.items() if len(weight.shape) == 2]
    left: dict[str, str] = {}
    for module in linears:
        rule = patterns.find(module)
        if rule is not None:
            left[module] = f"ignore {rule!r}"
        elif is_router(module):
            left[module] = "a router is not quantized"
        elif 0 in index[f"{module}.weight"].shape:
            left[module] = "an empty weight"
        else:  # a weight of another dtype would stay plain in a file that says every Linear is quantized
            index.expect(f"{module}.weight", tuple(WIDE), (None, None))
    _refuse_fused_experts(config, index, patterns)
    modules = tuple(m for m in linears if m not in left)
    shared = ["lm_head"] if config.tied and "lm_head.weight" not in index else []
    for name in ("lm_head", *shared):
        patterns.used.add(name)  # a head may be absent: the default ignores it everywhere
    patterns.warn_unused(linears)
    if not modules:
        raise CheckpointError(
            f"{config.folder}: nothing to quantize: {len(linears)} Linear weights, all are left plain"
        )
    _check_shapes(config, index, modules, layout)
    return Choice(modules, left, (*left, *shared))


def _refuse_fused_experts(config: CheckpointConfig, index: TensorIndex, patterns: Patterns) -> None:
    """Experts kept as one 3-D parameter are no Linear modules: they must not stay plain without a word."""
    for name, entry in index.items():
        if len(entry.shape) < 3 or "experts" not in name.split("."):
            continue
        if patterns.find(name) is None:
            raise CheckpointError(
                f"unsupported: {config.folder / entry.file}: {name} {list(entry.shape)} holds all experts in one "
                f"parameter; only experts with a module each are quantized. Name it in `ignore` to keep it plain"
            )


def _check_shapes(config: CheckpointConfig, index: TensorIndex, modules: Sequence[str], layout: Layout) -> None:
    a, inputs = layout.group.weights, layout.group.inputs
    size = max(a.group_size, -1 if inputs is None else inputs.group_size)
    wrong = {m: k for m in modules if size > 0 and (k := index[f"{m}.weight"].shape[1]) % size}
    if not wrong:
        return
    listed = ", ".join(f"{m} (K={k})" for m, k in list(wrong.items())[:12])
    more = f" and {len(wrong) - 12} more" if len(wrong) > 12 else ""
    fits = [g for g in (128, 64, 32, 16) if g < size and not any(k % g for k in wrong.values())]
    hint = f"a group of {fits[0]} would fit all; or " if fits and layout.group.format == "pack-quantized" else ""
    raise CheckpointError(
        f"{config.folder}: {layout.weight}: K does not divide into groups of {size} in {listed}{more}; nothing was "
        f"written. {hint}name these modules in `ignore` to keep them plain"
    )


def quantize_weight(index: TensorIndex, module: str, layout: Layout) -> QTensor:
    """Read and encode the weight of one module; CheckpointError naming the tensor for NaN, Inf or a scale overflow."""
    name = f"{module}.weight"
    weight = index.read(name)
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):  # a NaN shows in both; no temporaries
        checks.finite(index, name, weight)
    q = encode(weight, layout.weight)
    scale = q.scale
    if isinstance(scale, Tensor) and scale.is_floating_point():
        if not bool(torch.isfinite(scale).all()):
            raise index.bad(
                name, f"values whose scale fits {layout.weight}", f"a peak of {weight.abs().max().item():g}"
            )
        # A block too small for its scale's dtype has scale 0 and codes that decode to 0. Readers refuse scales of 0.
        q = replace(q, scale=torch.where(scale == 0, torch.ones_like(scale), scale))
    elif isinstance(scale, QTensor) and isinstance(scale.scale, Tensor) and not bool(torch.isfinite(scale.scale).all()):
        raise index.bad(name, f"values whose scale fits {layout.weight}", f"a peak of {weight.abs().max().item():g}")
    return replace(q, format=layout.stored)


class QuantizingMapping(SchemeMapping):
    """A float checkpoint whose modules are quantized as they are read: what the written checkpoint would hold."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex, layout: Layout, ignore: Sequence[str]) -> None:
        super().__init__(config, index)
        self._layout = layout
        self.choice = choose(config, index, layout, ignore)

    @property
    def modules(self) -> Sequence[str]:
        """Every module that is quantized."""
        return self.choice.modules

    @property
    def excluded(self) -> Mapping[str, str]:
        """Linear modules that stay plain."""
        return self.choice.left

    def describe(self, module: str) -> LinearFormat:
        """The format, as a reader of the written checkpoint would describe it."""
        fmt = self._layout.input(dtype_name(self.config.dtype))
        return replace(describe_plain(self.index, module), weight=self._layout.stored, input=fmt)

    def read(self, module: str) -> LinearSpec:
        """Read and quantize one module."""
        fmt = self._layout.input(dtype_name(self.config.dtype))
        bias = None
        if f"{module}.bias" in self.index:
            bias = self.index.read(f"{module}.bias").float()
            checks.finite(self.index, f"{module}.bias", bias)
        weight = quantize_weight(self.index, module, self._layout)
        return LinearSpec(weight, input=None if fmt is None else Operand(fmt), bias=bias, name=module)

    def tensors(self, module: str) -> Sequence[str]:
        """The weight and a bias."""
        return [f"{module}.{leaf}" for leaf in ("weight", "bias") if f"{module}.{leaf}" in self.index]


def quantizing_mapping(
    config: CheckpointConfig, index: TensorIndex, quantize: str | Format, ignore: Sequence[str] = ("lm_head",)
) -> QuantizingMapping:
    """A float checkpoint, quantized on the way in; see `resolve_format` for the names."""
    return QuantizingMapping(config, index, resolve_format(quantize, config.dtype), ignore)
