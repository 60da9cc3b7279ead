"""The configuration of Quark: records of tensor specs, and which of them a module follows.

exclude wins over layer_quant_config (an exact name, then the first pattern in the order of the file), that over
layer_type_quant_config, that over global_quant_config; a record replaces the one below it whole. Patterns are those of
a shell, against the full name of a module, and never reach its children. Keys as in amd-quark 0.13
(quantization/config/config.py). What is valid there but not read here is refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qhal.errors import CheckpointError
from qhal_schemes.base import CheckpointWarning
from qhal_schemes.config import CheckpointConfig, integer
from qhal_schemes.matching import LINEAR, GlobPatterns

ELEMENTS = {
    "fp8_e4m3": "e4m3fn", "fp8_e5m2": "e5m2", "int8": "int8", "uint8": "uint8", "int4": "int4", "uint4": "uint4",
    "fp4": "e2m1", "fp6_e3m2": "e3m2", "fp6_e2m3": "e2m3",
}  # fmt: skip
"""The element of every dtype that is read."""
MX = ("fp4", "fp6_e3m2", "fp6_e2m3")
INTEGERS = ("int8", "uint8", "int4", "uint4")
_SCHEMES = ("per_tensor", "per_channel", "per_group", "per_block")
_OFFLINE = ("smooth", "smoothquant", "autosmoothquant", "awq", "gptq", "gptaq", "autoround", "qronos", "rotation")
"""Algorithms that leave nothing but other weights behind (a rotation: if it is not applied online)."""
_RECORD = frozenset({"weight", "input_tensors", "output_tensors", "bias", "target_device"})
_SPEC = frozenset({
    "dtype", "qscheme", "ch_axis", "group_size", "block_size", "is_dynamic", "symmetric", "scale_format",
    "scale_calculation_mode", "round_method", "scale_type", "zero_point_type", "is_scale_quant", "mx_element_dtype",
    "observer_cls", "observer_cls_kwargs", "enable_buffer_reuse", "max_input_numel", "percentile",
})  # fmt: skip
_TOP = frozenset({
    "quant_method", "global_quant_config", "layer_quant_config", "layer_type_quant_config", "exclude", "export",
    "kv_cache_quant_config", "kv_cache_post_rope", "softmax_quant_spec", "algo_config", "quant_mode", "version",
    "pre_quant_opt_config", "log_severity_level", "min_kv_scale",
})  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized. axis: of per_channel and per_group, counted from the front of a 2-D tensor."""

    dtype: str
    qscheme: str
    axis: int
    group_size: int
    block: tuple[int, int]
    dynamic: bool
    symmetric: bool
    exponent_scale: bool
    mode: str

    @property
    def element(self) -> str:
        """The element of the codes."""
        return ELEMENTS[self.dtype]

    def __str__(self) -> str:
        size = {"per_group": f" {self.group_size}", "per_block": f" {list(self.block)}"}.get(self.qscheme, "")
        return f"{'dynamic ' if self.dynamic else ''}{self.dtype} {self.qscheme}{size}"


@dataclass(frozen=True)
class Record:
    """How a module is quantized. weight: no spec, one, or the stages of a weight that is quantized twice."""

    path: str
    weight: tuple[TensorSpec, ...]
    inputs: TensorSpec | None
    outputs: TensorSpec | None


class QuarkConfig:
    """The quantization section, every record checked."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config, section = config, config.quantization
        _warn_unknown(config, section, _TOP, "")
        self._pack_method = self._export(section.get("export"))
        if section.get("softmax_quant_spec") is not None:
            raise unsupported(config, "softmax_quant_spec", "quantized attention probabilities")
        self._algorithms(section.get("algo_config"))
        self.exclude = GlobPatterns("exclude", config.names("exclude"))
        self.everything = self._record(section.get("global_quant_config"), "global_quant_config")
        self.layers = self._records("layer_quant_config")
        self.types = self._records("layer_type_quant_config")
        self.cache = self._records("kv_cache_quant_config")
        self._globs = GlobPatterns("layer_quant_config", tuple(self.layers))

    def find(self, module: str) -> tuple[Record | None, str]:
        """The record of a Linear module and the rule that names it; no record: the module is excluded by that rule."""
        entry = self.exclude.find(module)
        if entry is not None:
            return None, f"exclude {entry!r}"
        entry = module if module in self.layers else self._globs.find(module)
        if entry is not None:
            return self.layers[entry], f"layer_quant_config {entry!r}"
        for kind, record in self.types.items():
            if kind.rpartition(".")[2].rstrip("'>") in (LINEAR, "nn.Linear"):
                return record, f"layer_type_quant_config {kind!r}"
        return self.everything, "global_quant_config"

    def warn_unused(self, modules: Sequence[str], also: Sequence[str]) -> None:
        """One warning for every pattern that names no module."""
        self.exclude.warn_unused(modules, also)
        self._globs.used.update(name for name in self.layers if name in set(modules))
        self._globs.warn_unused(modules, also)

    # ---------------------------------------------------------------- parsing

    @property
    def reorder(self) -> bool:
        """Whether eight nibbles of an int32 are interleaved; asked only for weights that are packed so."""
        if self._pack_method is None:
            raise self.config.bad("export.pack_method", "reorder or order: no tensor tells the order of nibbles", None)
        return self._pack_method == "reorder"

    def _export(self, export: object) -> str | None:
        """The pack method, None if the file names none."""
        if not export:
            return None
        if not isinstance(export, dict):
            raise self.config.bad("export", "an object", export)
        if export.get("weight_format", "real_quantized") != "real_quantized":
            raise unsupported(self.config, "export.weight_format", f"{export['weight_format']!r}: weights are floats")
        order = export.get("pack_method")
        if order not in ("reorder", "order", None):
            raise self.config.bad("export.pack_method", "reorder or order", order)
        return order

    def _algorithms(self, value: object) -> None:
        for i, one in enumerate(value if isinstance(value, list) else [] if value is None else [value]):
            name = one.get("name") if isinstance(one, dict) else None
            if not isinstance(one, dict) or not isinstance(name, str):
                raise self.config.bad(f"algo_config[{i}]", "an object with a name", one)
            if name not in _OFFLINE:
                raise unsupported(
                    self.config, f"algo_config[{i}].name", f"{name[:80]!r}; can be read: {', '.join(_OFFLINE)}"
                )
            online = [key for key in ("online_r1_rotation", "r3", "r4") if one.get(key)]
            if name == "rotation" and online:
                raise unsupported(self.config, f"algo_config[{i}].{online[0]}", "rotations that are applied online")

    def _records(self, key: str) -> dict[str, Record]:
        section = self.config.quantization.get(key) or {}
        if not isinstance(section, dict):
            raise self.config.bad(key, "an object of records by name", section)
        return {name: self._record(value, f"{key}[{name[:80]!r}]") for name, value in section.items()}

    def _record(self, value: object, path: str) -> Record:
        if not isinstance(value, dict):
            raise self.config.bad(path, "an object", value)
        _warn_unknown(self.config, value, _RECORD, f"{path}.")
        if value.get("bias") is not None:
            raise unsupported(self.config, f"{path}.bias", "quantized biases")
        weight = self._specs(value.get("weight"), f"{path}.weight")
        inputs, outputs = (self._specs(value.get(key), f"{path}.{key}") for key in ("input_tensors", "output_tensors"))
        for specs, key in ((inputs, "input_tensors"), (outputs, "output_tensors")):
            if len(specs) > 1:
                raise unsupported(self.config, f"{path}.{key}", f"{len(specs)} stages")
        if any(spec.dynamic for spec in weight):
            raise self.config.bad(f"{path}.weight.is_dynamic", "false", True)
        return Record(path, weight, *(specs[0] if specs else None for specs in (inputs, outputs)))

    def _specs(self, value: object, path: str) -> tuple[TensorSpec, ...]:
        if isinstance(value, list):
            return tuple(self._spec(one, f"{path}[{i}]") for i, one in enumerate(value))
        return () if value is None else (self._spec(value, path),)

    def _spec(self, value: object, path: str) -> TensorSpec:
        config = self.config
        if not isinstance(value, dict):
            raise config.bad(path, "an object", value)
        _warn_unknown(config, value, _SPEC, f"{path}.")
        dtype, qscheme = (self._name(value, key, path) for key in ("dtype", "qscheme"))
        if dtype not in ELEMENTS:
            raise unsupported(config, f"{path}.dtype", f"{dtype[:80]!r}; can be read: {', '.join(ELEMENTS)}")
        if qscheme not in _SCHEMES:
            raise config.bad(f"{path}.qscheme", f"one of {', '.join(_SCHEMES)}", qscheme)
        scale = value.get("scale_format")
        if scale not in (None, "float32", "e8m0"):
            raise unsupported(config, f"{path}.scale_format", f"{str(scale)[:80]!r}; can be read: e8m0, float32, null")
        if (scale == "e8m0") != (dtype in MX) and not (scale == "e8m0" and dtype.startswith("fp8")):
            raise config.bad(f"{path}.scale_format", f"{'e8m0' if dtype in MX else 'no e8m0'} for {dtype}", scale)
        if value.get("zero_point_type") == "float32":
            raise unsupported(config, f"{path}.zero_point_type", "float zero points")
        if value.get("is_scale_quant"):
            raise unsupported(config, f"{path}.is_scale_quant", "quantized scales")
        mode = value.get("scale_calculation_mode")
        if mode not in (None, "even", "floor", "ceil"):
            raise unsupported(config, f"{path}.scale_calculation_mode", f"{str(mode)[:80]!r}")
        dynamic, symmetric = value.get("is_dynamic", False), value.get("symmetric")
        for key, flag in (("is_dynamic", dynamic), ("symmetric", symmetric)):
            if not isinstance(flag, bool) and not (flag is None and key == "symmetric"):
                raise config.bad(f"{path}.{key}", "true or false", flag)
        if symmetric is False and dtype not in INTEGERS:
            raise config.bad(f"{path}.symmetric", f"true or null for {dtype}", symmetric)
        size = integer(config, value, "group_size", path=f"{path}.") if qscheme == "per_group" else 0
        if dtype in MX and qscheme != "per_group":
            raise config.bad(f"{path}.qscheme", f"per_group for {dtype}", qscheme)
        block = self._block(value, path) if qscheme == "per_block" else (0, 0)
        axis = self._axis(value, path) if qscheme in ("per_channel", "per_group") else 0
        return TensorSpec(
            dtype, qscheme, axis, size, block, dynamic, symmetric is not False, scale == "e8m0", mode or "even"
        )

    def _name(self, value: Mapping[str, Any], key: str, path: str) -> str:
        found = value.get(key)
        if not isinstance(found, str):
            raise self.config.bad(f"{path}.{key}", "a name", found)
        return found

    def _axis(self, value: Mapping[str, Any], path: str) -> int:
        axis = value.get("ch_axis")
        if type(axis) is not int or not -2 <= axis < 2:
            raise self.config.bad(f"{path}.ch_axis", "an axis of a 2-D tensor", axis)
        return axis % 2

    def _block(self, value: Mapping[str, Any], path: str) -> tuple[int, int]:
        block = value.get("block_size")
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n < 1 << 20 for n in block):
            raise self.config.bad(f"{path}.block_size", "[rows, columns]", block)
        return block[0], block[1]


def _warn_unknown(config: CheckpointConfig, section: Mapping[str, Any], known: frozenset[str], path: str) -> None:
    for key in (k for k in section if k not in known):
        text = f"{config.folder / config.file}: {path}{key[:80]}: no key of Quark that is known; it is not looked at"
        warnings.warn(text, CheckpointWarning, stacklevel=3)


def unsupported(config: CheckpointConfig, key: str, what: str) -> CheckpointError:
    """The error about something that Quark writes and that is not read here."""
    return CheckpointError(f"unsupported: {config.folder / config.file}: {key}: {what}; planned")
