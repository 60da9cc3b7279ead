"""AutoRound: the tensors of GPTQ or AWQ with one configuration of its own. packing_format decides how they are read.

  auto_round:auto_gptq             GPTQ's words; zero points are stored minus one, each field by itself; no g_idx
  auto_round, auto_round:gptqmodel  the same, zero points as they are; the second has a g_idx that says nothing
  auto_round:auto_awq              AWQ's words (gemm)
`extra_config` overrides bits, group_size and sym of modules by name, else by a pattern that is searched in the name
(the first that is found counts); 16 bits and more leave a module plain. Codes of 2 to 8 bits are one dense stream.
Compared with files that auto-round 0.16.1 wrote and its own layers. Sources: its export_to_autoround/export.py,
inference/convert_model.py and inference/utils.py.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from qhal.errors import CheckpointError
from qhal_schemes.awq import AWQMapping
from qhal_schemes.base import CheckpointWarning, MappingScheme, SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family
from qhal_schemes.gptq import GPTQMapping, Settings
from qhal_schemes.matching import compile_pattern, near_text
from qhal_schemes.packing import unpack
from qhal_schemes.source import TensorIndex

_PACKINGS = {"awq": "awq", "auto_awq": "awq", "gptq": "minus one", "auto_gptq": "minus one", "": "as it is",
             "gptqmodel": "as it is", "exllamav2": "as it is", "tritonv2": "as it is"}  # fmt: skip
"""What stands behind `auto_round` in packing_format, and what it means; the last two are names of old versions."""
_MEANING = frozenset({
    "bits", "group_size", "sym", "data_type", "act_bits", "act_data_type", "act_dynamic", "act_sym", "act_group_size",
    "super_bits", "super_group_size", "rotation_config",
})  # fmt: skip
_REFUSED = ("super_bits", "super_group_size", "rotation_config", "rotation_configs", "spinquant_config",
            "static_kv_dtype", "static_attention_dtype", "dynamic")  # fmt: skip
_TUNING = frozenset({
    "quant_method", "packing_format", "extra_config", "block_name_to_quantize", "to_quant_block_names",
    "quant_block_list", "modules_in_block_to_quantize", "modules_to_not_convert", "autoround_version", "backend",
    "amp", "batch_size", "dataset", "desc_act", "damp_percent", "true_sequential", "provider", "lm_head",
    "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "enable_torch_compile",
    "enable_alg_ext", "gradient_accumulate_steps", "iters", "low_cpu_mem_usage", "low_gpu_mem_usage", "lr",
    "minmax_lr", "nsamples", "scale_dtype", "seqlen", "optimizer", "sampler", "seed", "not_use_best_mse",
    "disable_opt_rtn", "quant_lm_head", "momentum", "model_dtype", "static_kv_granularity",
    "static_attention_granularity", "qhal_zero_format", "supported_types", "enable_deterministic_algorithms",
})  # fmt: skip


@dataclass(frozen=True)
class Overrides:
    """extra_config and the blocks: what a module has instead of the settings of all. A setting is an object of them."""

    exact: Mapping[str, Mapping[str, Any]]
    patterns: tuple[tuple[str, re.Pattern[str]], ...]
    blocks: tuple[str, ...]

    @staticmethod
    def of(config: CheckpointConfig, index: TensorIndex) -> Overrides:
        """Read and check both. A key that is no module's name is a pattern."""
        extra = config.quantization.get("extra_config")
        if extra is None:
            extra = {}
        if not isinstance(extra, dict) or not all(isinstance(v, dict) for v in extra.values()):
            raise config.bad("extra_config", "an object of settings by name", extra)
        modules, patterns = {name.rpartition(".")[0] for name in index}, []
        for name, settings in extra.items():
            _arithmetic(config, settings, f"extra_config[{name[:80]!r}].")
            if name not in modules:
                try:
                    patterns.append((name, compile_pattern(name)))
                except (re.error, RecursionError, OverflowError) as bad:
                    raise config.bad(f"extra_config[{name[:80]!r}]", "a regular expression", str(bad)) from None
        return Overrides(extra, tuple(patterns), _blocks(config))

    def find(self, module: str) -> tuple[str, Mapping[str, Any]] | None:
        """The entry of a module: its name, else the first pattern that is found in it."""
        if module in self.exact:
            return module, self.exact[module]
        key = next((key for key, pattern in self.patterns if self.exact[key] and pattern.search(module)), None)
        return None if key is None else (key, self.exact[key])

    def skipped(self, module: str) -> str | None:
        """The rule that leaves a module plain, if there is one."""
        found = self.find(module)
        if found is not None:
            return f"extra_config {found[0]!r}" if _plain(found[1].get("bits", 0)) else None
        outside = self.blocks and not any(module.startswith(block) for block in self.blocks)
        return f"outside block_name_to_quantize {', '.join(self.blocks)[:200]}" if outside else None

    def check(self, mapping: SchemeMapping) -> None:
        """An entry that quantizes a module which the file holds plain is an error, one that names none is a warning."""
        config, names = mapping.config, [*mapping.modules, *mapping.excluded]
        for module in mapping.excluded:
            if module in self.exact and not _plain(self.exact[module].get("bits", 0)):
                raise CheckpointError(
                    f"{config.folder / config.file}: extra_config {module!r} quantizes {module}, but the file holds a "
                    f"plain weight"
                )
        patterns = dict(self.patterns)
        for key in self.exact:
            if key not in names and not (key in patterns and any(patterns[key].search(name) for name in names)):
                warnings.warn(
                    f"extra_config: {key[:200]!r} matches no module{near_text(key, names)}",
                    CheckpointWarning,
                    stacklevel=4,
                )


class AutoRoundGPTQ(GPTQMapping):
    """Tensors of GPTQ. Only files for GPTQModel must have a g_idx, and in none it orders anything."""

    bits = (2, 3, 4, 5, 6, 7, 8)
    overrides = "extra_config"

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        self._extra = Overrides.of(config, index)
        self.indexed = "gptqmodel" in str(config.quantization.get("packing_format"))
        super().__init__(config, index)
        self._extra.check(self)

    def layout(self, module: str) -> str:
        """How zero points are stored, and whether an index is beside them."""
        return "auto_gptq" if self._v1 else "gptqmodel" if self.indexed else "auto_round"

    def _minus_one(self) -> bool:
        return _packing(self.config) == "minus one"

    def _overrides(self, section: object) -> list[tuple[str, re.Pattern[str], Settings | None]]:
        return []  # `Overrides` has them

    def _rule_of(self, module: str) -> tuple[str, Settings | None] | None:
        found = self._extra.find(module)
        if found is None:
            return None
        key, said = found
        plain = _plain(said.get("bits", 0))
        settings = {name: value for name, value in said.items() if value is not None}
        return key, None if plain else self._settings(settings, self._default, f"extra_config[{key[:80]!r}].")

    def _skipped(self, module: str) -> str | None:
        return self._extra.skipped(module)

    def _zeros(self, module: str, stored: Tensor, s: Settings, rows: int) -> Tensor:
        """Zero points; a stored largest field is refused, as readers do not agree on it."""
        top = (1 << s.bits) - 1
        if self._v1 and not s.sym and bool((unpack(stored, s.bits, rows) == top).any()):
            raise self.index.bad(
                f"{module}.qzeros",
                f"fields below {top}: they are zero points minus one",
                f"{top}, which is {top + 1} to auto-round, and to others a zero point of 0 that spoils its neighbours",
            )
        return super()._zeros(module, stored, s, rows)


class AutoRoundAWQ(AWQMapping):
    """Tensors of AWQ; every quantized module has the same settings."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        self._extra = Overrides.of(config, index)
        symmetric = config.boolean("sym", True)
        section = {**config.quantization, "zero_point": not symmetric}
        super().__init__(replace(config, quantization=section), index)
        for module in self.modules:
            key, said = self._extra.find(module) or ("", {})
            odd = [k for k in ("bits", "group_size", "sym") if said.get(k) not in (None, section.get(k))]
            if odd:
                raise CheckpointError(
                    f"unsupported: {config.folder / config.file}: extra_config {key!r} gives {module} its own "
                    f"{odd[0]}; AWQ layouts of several settings are planned"
                )
        self._extra.check(self)

    def layout(self, module: str) -> str:
        """Always AWQ's words."""
        return "auto_awq"

    def _skipped(self, module: str) -> str | None:
        return self._extra.skipped(module)


class _Scheme(MappingScheme):
    """Opens as one of both, by packing_format."""

    def open(self, config: CheckpointConfig, index: TensorIndex) -> SchemeMapping:
        """Check what all layouts share, then match the tensors."""
        section = config.quantization
        _arithmetic(config, section, "")
        if config.boolean("desc_act", False):
            raise config.bad("desc_act", "false: auto-round keeps columns in order", True)
        unknown = [key for key in section if key not in _MEANING | _TUNING and key not in _REFUSED]
        if unknown:
            warnings.warn(
                f"{config.folder / config.file}: {unknown[0][:80]}: no key of auto-round that is known here; it is not "
                f"looked at",
                CheckpointWarning,
                stacklevel=2,
            )
        return (AutoRoundAWQ if _packing(config) == "awq" else AutoRoundGPTQ)(config, index)


def _packing(config: CheckpointConfig) -> str:
    """awq, or how zero points are stored in GPTQ's words."""
    said = config.quantization.get("packing_format")
    if said is None and config.boolean("sym", True):
        said = "auto_round:auto_gptq"  # its default; zero points of another kind would be off the middle
    if not isinstance(said, str):
        raise config.bad("packing_format", "the name of a layout, which decides how zero points are stored", said)
    head, *rest = said.split(":")
    rest = [part for part in rest if part not in ("exllamav2", "tritonv2")] if len(rest) > 1 else rest
    kind = _PACKINGS.get(rest[0] if rest else "") if len(rest) < 2 else None
    if said == "auto":
        return "minus one"
    if head not in ("auto_round", "autoround", "auto-round") or kind is None:
        raise CheckpointError(
            f"unsupported: {config.folder / config.file}: packing_format {said[:80]!r}; can be read: auto_round, "
            f"auto_round:auto_gptq, auto_round:gptqmodel, auto_round:auto_awq"
        )
    return kind


def _arithmetic(config: CheckpointConfig, said: Mapping[str, Any], path: str) -> None:
    """Integer weights and plain inputs; anything else that changes numbers is refused by its name."""
    unknown = [key for key in said if key not in _MEANING] if path else []
    if unknown:
        raise config.bad(f"{path}{unknown[0][:80]}", f"one of {', '.join(sorted(_MEANING))}", said[unknown[0]])
    if path and _plain(said.get("bits")):
        return  # left plain: the rest describes that
    kind, inputs = said.get("data_type") or "int", said.get("act_bits") or 16
    if type(inputs) is not int:
        raise config.bad(f"{path}act_bits", "a number of bits", inputs)
    odd = next((key for key in _REFUSED if said.get(key)), None)
    if kind != "int":
        odd = f"data_type {str(kind)[:80]!r}"
    elif inputs < 16:
        odd = f"act_bits {inputs}"
    if odd is not None:
        raise CheckpointError(
            f"unsupported: {config.folder / config.file}: {path}{odd}; integer weights with plain inputs can be read, "
            f"others are planned"
        )


def _plain(bits: object) -> bool:
    return type(bits) is int and bits >= 16


def _blocks(config: CheckpointConfig) -> tuple[str, ...]:
    """The prefixes of names that may be quantized; () for all."""
    section = config.quantization
    key = next((k for k in ("block_name_to_quantize", "to_quant_block_names") if section.get(k)), None)
    said = None if key is None else section[key]
    if said is None:
        return ()
    names = said.split(",") if isinstance(said, str) else said if isinstance(said, list) else [said]
    flat = [name for item in names for name in (item if isinstance(item, list) else [item])]
    if not all(isinstance(name, str) and name.strip() for name in flat):
        raise config.bad(str(key), "names of blocks", said)
    return tuple(str(name).strip() for name in flat)


scheme = _Scheme(
    AutoRoundGPTQ,
    Family(
        "AutoRound",
        "auto-round 0.16",
        ("auto_gptq", "auto_round", "gptqmodel", "auto_awq"),
        (
            "data types other than int, quantized inputs",
            *_REFUSED,
            "desc_act",
            "AWQ's words with several settings",
            "largest stored zero points of auto_gptq without sym, on which readers do not agree",
        ),
    ),
)
