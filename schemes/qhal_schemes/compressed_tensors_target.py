"""Writing specs as compressed-tensors: config groups for every pair of formats, static input scales, the cache.

What weights look like on disk is `compressed_tensors_writer.py`; here is what a whole model needs beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.blocks import Block
from qhal.elements import dtype_name, element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.layer_formats import KVFormat, LinearFormat
from qhal.specs import KVSpec, LinearSpec
from qhal.tensors import QTensor
from qhal_schemes.compressed_tensors_writer import VERSION, Layout, entry, pack_tensors, plan_layout, tensor_layouts
from qhal_schemes.target import STORED, Goal, Layer, Target, Written, changed_input, only_weights
from qhal_schemes.writing import TensorLayout


class CompressedTensorsTarget(Target):
    """compressed-tensors checkpoints, as version 0.20 lays them out."""

    name: ClassVar[str] = "compressed-tensors"

    def goal(self, f: LinearFormat) -> Goal:
        """The same weight in this file format's words, and the input as a reader will find it."""
        only_weights(f, self.name)
        if f.group_index:
            raise FormatError(f"{self.name} has no activation order since 0.19; --to gptq keeps it")
        layout = self._layout(f)
        given = layout.input(dtype_name(self.dtype) if not f.static_input else _scale_name(f.input))
        return Goal(layout.weight, given, changed_input(f, given))

    def layout(self, layer: Layer) -> dict[str, TensorLayout]:
        """The weight's tensors, a static input's, and a bias."""
        f = layer.format
        found = {n.rpartition(".")[2]: t for n, t in tensor_layouts("m", f.n, f.k, self._layout(f)).items()}
        if f.static_input and layer.goal.input is not None:
            if layer.goal.input.element == "e2m1":
                found["input_global_scale"] = TensorLayout("F32", (1,))
            else:
                found["input_scale"] = TensorLayout(STORED[_scale_name(layer.goal.input)], (1,))
            if layer.goal.input.zero is not None:
                found["input_zero_point"] = TensorLayout("I8", (1,))
        return found | self.bias_layout(f)

    def tensors(self, layer: Layer, spec: LinearSpec) -> dict[str, Tensor]:
        """The weight packed, scales of a static input as they are (its global scale as one that divides)."""
        assert isinstance(spec.weight, QTensor)
        packed = pack_tensors("m", spec.weight, self._layout(layer.format))
        found = {n.rpartition(".")[2]: t for n, t in packed.items()}
        given = layer.goal.input
        if layer.format.static_input and given is not None:
            assert spec.input is not None and spec.input.scale is not None
            scale = spec.input.scale.reshape(1)
            if given.element == "e2m1":
                source = spec.input.format.scale
                found["input_global_scale"] = scale if source is not None and source.op == "/" else 1 / scale
            else:
                found["input_scale"] = scale
            if given.zero is not None:
                zero = spec.input.zero
                found["input_zero_point"] = torch.zeros(1) if zero is None else zero.float().round().clamp(-128, 127)
                found["input_zero_point"] = found["input_zero_point"].reshape(1).to(torch.int8)
        return found | self.bias_tensors(spec)

    def written(self, layers: Sequence[Layer], plain: Mapping[str, str], cache: KVFormat | None) -> Written:
        """One group for all Linear modules, or a group with named targets for every pair of formats."""
        groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for layer in layers:
            group = self._layout(layer.format).json
            groups.setdefault(str(group), (group, []))[1].append(layer.module)
        found = list(groups.values())
        named = [{**g, "targets": ["Linear"] if len(found) == 1 else modules} for g, modules in found]
        formats = {g["format"] for g, _ in found}
        section = {
            "quant_method": self.name,
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": {f"group_{i}": g for i, g in enumerate(named)},
            "ignore": list(plain),
            "kv_cache_scheme": None if cache is None else _cache_arguments(cache),
            "global_compression_ratio": None,
            "version": VERSION,
        }
        return Written(section)

    def cache_goal(self, f: KVFormat, projections: Mapping[str, bool]) -> None:
        """Static int8 and fp8 per tensor or head, nothing else."""
        _cache_arguments(f)

    def cache_tensors(self, module: str, spec: KVSpec) -> dict[str, Tensor]:
        """k_scale and v_scale on the attention module."""
        found: dict[str, Tensor] = {}
        for part, operand in (("k", spec.k), ("v", spec.v)):
            assert operand.scale is not None
            heads = operand.format.block is not None and operand.format.block.kind == "head"
            shape = (-1, 1, 1) if heads else (1,)
            found[f"{module}.{part}_scale"] = operand.scale.reshape(shape)
            if operand.zero is not None:
                found[f"{module}.{part}_zero_point"] = operand.zero.reshape(shape).to(torch.int8)
        return found

    def _layout(self, f: LinearFormat) -> Layout:
        assert isinstance(f.weight, Format)
        inputs = None if f.input is None else input_arguments(f.input, static=f.static_input)
        return plan_layout(_spelled(f.weight), inputs)


def _spelled(w: Format) -> Format:
    """The format in the words of config groups: signed codes, integer zero points, one level of scales, no tensor."""
    e = element(w.element)
    if not e.integer or w.block is None or w.scale is None:
        if w.scale is not None and str(w.storage) == "e2m1.g16*(e4m3fn.tensor*fp32)":
            return Format.parse("e2m1.g16*(e4m3fn.tensor/fp32)")
        return w.storage
    name = f"int{e.bits}"
    zero = None if w.zero is None or not element(w.zero.element).integer else Format(name)
    block = Block("row") if w.block.kind == "tensor" else w.block
    scale = w.scale if w.scale.plain else Format("fp32")
    rule = replace(w.storage.rule, domain="minmax") if zero is not None else w.storage.rule
    return replace(w.storage, element=name, zero=zero, block=block, scale=scale, rule=rule)


def input_arguments(f: Format, *, static: bool) -> dict[str, Any]:
    """The input_activations that come nearest to a format; FormatError where a file has no word for its element."""
    e, block = element(f.element), f.block
    if f.element not in ("int8", "int4", "e4m3fn", "e2m1") or block is None:
        raise FormatError(f"compressed-tensors has no word for inputs quantized to {f}")
    kind = "int" if e.integer else "float"
    if f.element == "e2m1":
        if str(f.storage.scale) == "e8m0":
            return _dynamic(4, kind, True, "group", block.cols) | {"scale_dtype": "torch.uint8"}
        local = entry(4, kind, True, "tensor_group", block.cols)
        return local | {"dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}
    strategy = {"tensor": "tensor", "row": "token", "group": "group"}.get(block.kind)
    if strategy is None or (static and strategy != "tensor"):
        raise FormatError(f"compressed-tensors has no word for {'static ' if static else ''}inputs quantized to {f}")
    size = block.cols if strategy == "group" else None
    found = entry(e.bits, kind, f.zero is None, strategy, size)
    if not static:
        found["dynamic"] = True
    exponents = f.scale is not None and f.scale.element == "e8m0"
    return found | ({"scale_dtype": "torch.uint8"} if exponents else {})


def _dynamic(bits: int, kind: str, symmetric: bool, strategy: str, size: int | None) -> dict[str, Any]:
    return entry(bits, kind, symmetric, strategy, size) | {"dynamic": True}


def _cache_arguments(f: KVFormat) -> dict[str, Any]:
    held = "compressed-tensors holds caches of int8 or e4m3fn with static scales per tensor or head"
    if f.kind != "mha" or f.k.storage != f.v.storage or f.q is not None or f.p is not None:
        raise FormatError(f"{held}, the same for keys and values, not {f}")
    k = f.k
    strategy = {"tensor": "tensor", "head": "attn_head"}.get(k.block.kind if k.block is not None else "")
    if k.element not in ("int8", "e4m3fn") or strategy is None or k.scale is None or not k.scale.plain:
        raise FormatError(f"{held}, not {f}")
    if k.zero is not None and not element(k.zero.element).integer:
        raise FormatError(f"{held}, not {f}")
    return entry(8, "int" if k.element == "int8" else "float", k.zero is None, strategy, None)


def _scale_name(f: Format | None) -> str:
    return "fp32" if f is None or f.scale is None or not f.scale.plain else f.scale.element
