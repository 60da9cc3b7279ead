"""Writing compressed-tensors: the configuration that spells a Format, and the tensors that hold a QTensor on disk.

The inverse of `ct_config.py` and `ct_weights.py`, for what can be made without calibration data. Codes of 3, 5, 6 and
7 bits are packed as one dense bit stream, which is what versions from 0.18 on read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhal.elements import element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.tensors import QTensor
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.ct_config import (
    FLOAT,
    INT,
    MXFP4,
    MXFP8,
    NVFP4,
    PACKED,
    Group,
    input_format,
    read_groups,
    weight_format,
)
from qhal_schemes.packing import pack, pack_nibbles, unsigned, words
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.writing import TensorLayout

VERSION = "0.20.0"  # of compressed-tensors: the layout that is written
POSSIBLE = (
    "int2..int8 with g<k> or row blocks, symmetric or with a zero point of the same element (int4.g32*bf16, "
    "int4-int4.g128*bf16@domain=minmax); e4m3fn with tensor, row or <n>x<k> blocks; all with bf16, fp16 or fp32 "
    "scales; e4m3fn.g32*e8m0; e2m1.g32*e8m0; e2m1.g16*(e4m3fn.tensor/fp32)"
)
_STORED = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores quantized Linear modules: one config group.

    weight  the format and the rule that weights are encoded by
    group   the same, in the words of the file format; `input` is what the group says of activations
    json    the group as it stands in config.json
    """

    weight: Format
    group: Group
    json: dict[str, Any]

    @property
    def stored(self) -> Format:
        """The format that a reader of the file finds: the rule is not stored."""
        return weight_format(self.group.format, self.group.weights, _scale_name(self.weight))

    def input(self, dtype: str) -> Format | None:
        """The format of activations whose element is `dtype`; None: they stay as they are."""
        return None if self.group.inputs is None else input_format(self.group.inputs, dtype)

    def section(self, ignore: Sequence[str]) -> dict[str, Any]:
        """The quantization_config of a whole checkpoint whose plain Linear modules are `ignore`."""
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": self.group.format,
            "config_groups": {"group_0": self.json},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": VERSION,
        }


def plan_layout(weight: Format, inputs: dict[str, Any] | None = None) -> Layout:
    """The layout for weights of a format; FormatError with what is possible. inputs: input_activations of the group."""
    kind = element(weight.element).kind
    if kind == "uint" and weight.zero == Format(weight.element) and weight.rule.domain == "minmax":
        name = weight.element.removeprefix("u")  # the file holds both as fields with an offset
        weight, kind = replace(weight, element=name, zero=Format(name)), "int"
    fmt, arguments = _arguments(weight, kind, packed=inputs is None)
    group = {
        "targets": ["Linear"],
        "weights": arguments,
        "input_activations": inputs,
        "output_activations": None,
        "format": fmt,
    }
    section = {"config_groups": {"group_0": group}, "format": fmt}
    read = read_groups(CheckpointConfig(Path(), {}, section, "compressed-tensors", "config.json"))[0]
    layout = Layout(weight, read, group)
    if layout.stored != weight.storage:
        raise _refused(weight)
    return layout


def tensor_layouts(module: str, n: int, k: int, layout: Layout) -> dict[str, TensorLayout]:
    """Names, dtypes and shapes of the tensors of an [n, k] weight."""
    a, fmt = layout.group.weights, layout.group.format
    assert layout.stored.block is not None
    grid = layout.stored.block.grid(n, k)
    found: dict[str, TensorLayout] = {}
    if fmt == PACKED:
        found["weight_packed"] = TensorLayout("I32", (n, words(k, a.bits)))
        found["weight_shape"] = TensorLayout("I64", (2,))
    elif fmt in (NVFP4, MXFP4):
        found["weight_packed"] = TensorLayout("U8", (n, k // 2))
    else:
        found["weight"] = TensorLayout("I8" if fmt == INT else "F8_E4M3", (n, k))
    scale = _scale_name(layout.weight)
    stored = {"e8m0": "U8", "e4m3fn": "F8_E4M3"}.get(scale) or _STORED[scale]
    found["weight_scale"] = TensorLayout(stored, (1,) if a.strategy == "tensor" else grid)
    if fmt == NVFP4:
        found["weight_global_scale"] = TensorLayout("F32", (1,))
    if not a.symmetric:
        found["weight_zero_point"] = TensorLayout("I32", (words(n, a.bits), grid[1]))
    return {f"{module}.{leaf}": one for leaf, one in found.items()}


def pack_tensors(module: str, q: QTensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors that hold a quantized weight, as `tensor_layouts` announces them."""
    a, fmt = layout.group.weights, layout.group.format
    found: dict[str, Tensor] = {}
    if fmt == PACKED:
        found["weight_packed"] = pack(unsigned(q.codes, a.bits), a.bits)
        found["weight_shape"] = torch.tensor(q.shape, dtype=torch.int64)
    elif fmt in (NVFP4, MXFP4):
        found["weight_packed"] = pack_nibbles(q.codes)
    else:
        found["weight"] = q.codes
    if isinstance(q.scale, QTensor):
        assert isinstance(q.scale.scale, Tensor)
        found["weight_scale"] = q.scale.codes
        found["weight_global_scale"] = q.scale.scale.reshape(1)
    else:
        assert q.scale is not None
        found["weight_scale"] = q.scale.reshape(1) if a.strategy == "tensor" else q.scale
    if not a.symmetric:
        assert isinstance(q.zero, Tensor)
        found["weight_zero_point"] = pack(unsigned(q.zero, a.bits).t().contiguous(), a.bits).t().contiguous()
    return {f"{module}.{leaf}": t for leaf, t in found.items()}


def dynamic_inputs(kind: str) -> dict[str, Any]:
    """input_activations without calibration: "int8" and "fp8" per token, "fp8_g128" per group, "mxfp8"."""
    strategy, size = {"fp8_g128": ("group", 128), "mxfp8": ("group", 32)}.get(kind, ("token", None))
    found = entry(8, "int" if kind == "int8" else "float", True, strategy, size)
    found["dynamic"] = True
    return found | ({"scale_dtype": "torch.uint8"} if kind == "mxfp8" else {})


def _arguments(weight: Format, kind: str, *, packed: bool) -> tuple[str, dict[str, Any]]:
    """The file format and its weights arguments; refuses what no file format holds."""
    block, scale = weight.block, weight.scale
    if block is None or scale is None or weight.offset is not None or weight.sparsity is not None or weight.op != "*":
        raise _refused(weight)
    bits, strategy = (
        element(weight.element).bits,
        {"tensor": "tensor", "row": "channel", "group": "group"}.get(block.kind),
    )
    size = block.cols if block.kind == "group" else None
    if str(weight.storage) == "e2m1.g16*(e4m3fn.tensor/fp32)":
        return NVFP4, entry(4, "float", True, "tensor_group", 16) | {"scale_dtype": "torch.float8_e4m3fn"}
    if str(weight.storage) in ("e2m1.g32*e8m0", "e4m3fn.g32*e8m0"):
        fmt = MXFP4 if bits == 4 else MXFP8
        return fmt, entry(bits, "float", True, "group", 32) | {"scale_dtype": "torch.uint8"}
    if scale.element not in _STORED or not scale.plain:
        raise _refused(weight)
    if weight.element == "e4m3fn" and weight.zero is None and block.kind in ("tensor", "row", "tile"):
        found = entry(8, "float", True, strategy or "block", None)
        return FLOAT, found | ({"block_structure": [block.rows, block.cols]} if block.kind == "tile" else {})
    same_zero = weight.zero is None or (weight.zero.plain and weight.zero.element == weight.element)
    if kind == "int" and bits > 1 and same_zero and strategy in ("channel", "group"):
        found = entry(bits, "int", weight.zero is None, strategy, size)
        return (PACKED if packed else INT), found | ({"zp_dtype": "torch.int8"} if weight.zero is not None else {})
    raise _refused(weight)


def entry(bits: int, kind: str, symmetric: bool, strategy: str, size: int | None) -> dict[str, Any]:
    """One QuantizationArgs as config.json spells it."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
    }


def _scale_name(f: Format) -> str:
    assert f.scale is not None
    return f.scale.element


def _refused(f: Format) -> FormatError:
    return FormatError(f"format {str(f)!r}: no compressed-tensors checkpoint holds it; possible: {POSSIBLE}")


assert set(_STORED.values()) <= set(ELEMENT_OF)
