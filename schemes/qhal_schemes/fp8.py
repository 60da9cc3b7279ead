"""FP8 of DeepSeek, Qwen, AutoFP8 and transformers: e4m3fn codes, a scale per tile or per tensor that multiplies.

weight e4m3fn [N, K], weight_scale_inv (or weight_scale) [ceil(N/r), ceil(K/c)] for weight_block_size [r, c], one value
where that is null: W = code * scale, whatever the name says. Tiles start at the top left, the last ones may be short;
transformers 5 divides N by the grid instead, which gives other numbers for 192 rows. Tiles are those of the
configuration, never guessed from the grid. Inputs are quantized per token in groups of c (per token without tiles), or
with a static input_scale; scale_fmt ue8m0 rounds those scales up to a power of two.

Experts have modules of their own, or are stacked as transformers stacks them: gate_up_proj [E, 2I, K] (or, as the
shapes show, [E, K, 2I]) with gate_up_proj_scale_inv, gate rows first. expert_dtype fp4: experts hold two e2m1 codes in
a byte of [N, K/2], the even column in the low nibble, with a scale [N, K/32]. Sources: DeepSeek-V3's inference code,
transformers 5.23 (integrations/finegrained_fp8.py). What was compared with their numbers: compared/fp8.txt.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec, Operand
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.base import CheckpointWarning, MappingScheme, SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family
from qhal_schemes.experts import StackedExperts
from qhal_schemes.fp8_tensors import PROJECTIONS, SCALES, Stored, locate, locate_stacked
from qhal_schemes.matching import EMBEDDING, SkipPatterns, module_class
from qhal_schemes.modules import ModuleTable
from qhal_schemes.packing import unpack_nibbles
from qhal_schemes.plain import BlockRules
from qhal_schemes.source import TensorIndex

_FMTS = ("e4m3", "e4m3fn", "float8_e4m3fn")
_KEYS = frozenset({
    "quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt", "modules_to_not_convert",
    "ignored_layers", "modules_to_convert", "expert_dtype", "dequantize", "weight_per_tensor", "act_per_tensor",
})  # fmt: skip
_KEPT_PLAIN = ("eh_proj", "shared_head.head", "indexer.weights_proj")
"""Linear layers inside decoder blocks that DeepSeek's own files keep plain and name nowhere."""


class FP8Mapping(SchemeMapping):
    """A checkpoint of quant_method fp8: one tile size, one way to quantize inputs."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        self._tile = _tile(config)
        self._static = _choice(config, "activation_scheme", ("dynamic", "static"), "dynamic") == "static"
        self._scale_fmt = _choice(config, "scale_fmt", ("float", "ue8m0"), "")
        _choice(config, "fmt", _FMTS, "e4m3")
        if config.quantization.get("modules_to_convert"):
            raise CheckpointError(
                f"unsupported: {config.folder / config.file}: modules_to_convert: modules that are no Linear layers; "
                "planned"
            )
        for key in (k for k in config.quantization if k not in _KEYS):
            text = f"{config.folder / config.file}: {key[:80]}: no key of fp8 that is known here; it is not looked at"
            warnings.warn(text, CheckpointWarning, stacklevel=2)
        table = ModuleTable(index)
        self._stacked: dict[str, StackedExperts] = {}
        self._modules = self._find(table)
        if not self._modules:
            raise CheckpointError(f"{index.folder}: quant_method fp8, but no module has a weight_scale_inv")
        skipped = SkipPatterns(*_skipped(config))
        self._excluded = BlockRules(config, self._modules, skipped, _kept, self._partial).exclude(table.plain_linears())
        skipped.warn_unused(list(table), also=table)

    @property
    def modules(self) -> Sequence[str]:
        """Modules with FP8 weights."""
        return tuple(self._modules)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain modules: modules_to_not_convert, heads, routers, weights that have no whole tiles."""
        return self._excluded

    @property
    def stacked(self) -> Mapping[str, StackedExperts]:
        """Experts stored as transformers stacks them."""
        return self._stacked

    def layout(self, module: str) -> str:
        """The name of its scale, and how experts are stacked."""
        s = self._modules[module]
        if s.experts:
            return "stacked [E, K, N]" if s.transposed else "stacked [E, N, K]"
        return s.names["scale"].rpartition(".")[2]

    def tensors(self, module: str) -> Sequence[str]:
        """The weight, its scale, a static input scale and a bias if there are any."""
        return list(self._modules[module].names.values())

    def describe(self, module: str) -> LinearFormat:
        """The format, from shapes and dtypes alone."""
        s = self._modules[module]
        return LinearFormat(
            name=module,
            n=s.n,
            k=s.k,
            weight=s.format,
            input=self._input_format(s),
            static_input="input" in s.names,
            bias="bias" in s.names,
        )

    def read(self, module: str) -> LinearSpec:
        """The weight as it is stored, its scales on their grid."""
        return self._spec(module, self.index.read_all(self.tensors(module)))

    def read_experts(self, module: str, first: int, count: int) -> LinearSpec:
        """Experts first:first+count of a stacked module, [count, N, K]."""
        return self._spec(module, self.index.read_all(self.tensors(module), (first, count)))

    def _spec(self, module: str, tensors: Mapping[str, Tensor]) -> LinearSpec:
        s = self._modules[module]
        t = {part: tensors[name] for part, name in s.names.items()}
        checks.scales(self.index, s.names["scale"], t["scale"])
        lead = t["weight"].shape[:-2]
        codes, scale = t["weight"], t["scale"].reshape(*lead, *s.grid)
        if s.fp4:
            codes = unpack_nibbles(codes.view(torch.uint8))
        else:
            checks.float8_codes(self.index, s.names["weight"], codes)
        if s.transposed:
            codes, scale = codes.transpose(-1, -2).contiguous(), scale.transpose(-1, -2).contiguous()
        bias = t.get("bias")
        if bias is not None:
            checks.finite(self.index, s.names["bias"], bias)
            bias = bias.float()
        return LinearSpec(QTensor(s.format, codes, scale), input=self._operand(s, t), bias=bias, name=module)

    def _operand(self, s: Stored, t: Mapping[str, Tensor]) -> Operand:
        fmt = self._input_format(s)
        if "input" not in t:
            return Operand(fmt)
        checks.scales(self.index, s.names["input"], t["input"], positive=True)
        if s.experts:
            return Operand(fmt, t["input"].reshape(-1, 1), per_expert=True)
        return Operand(fmt, t["input"].reshape(1))

    def _input_format(self, s: Stored) -> Format:
        return _input_format(s.input_dtype, None if self._tile is None else self._tile[1], self._scale_fmt == "ue8m0")

    # ---------------------------------------------------------------- matching

    def _find(self, table: ModuleTable) -> dict[str, Stored]:
        fp4 = _choice(self.config, "expert_dtype", ("fp8", "fp4"), "fp8") == "fp4"
        found: dict[str, Stored] = {}
        for module, tensors in table.items():
            if ("weight" in tensors and tensors["weight"].dtype == "F8_E4M3") or not tensors.keys().isdisjoint(SCALES):
                if module_class(module) == EMBEDDING:
                    raise CheckpointError(f"unsupported: {self.index.folder}: {module}: a quantized embedding; planned")
                packed = fp4 and ".experts." in module and tensors.get("weight", None) is not None
                packed = packed and tensors["weight"].dtype in ("I8", "U8")
                found[module] = locate(self.index, module, self._tile, self._static, self._scale_fmt, packed)
            elif any(f"{p}_scale_inv" in tensors for p in PROJECTIONS):
                pair = locate_stacked(self.index, module, self._tile, self._static, self._scale_fmt, fp4)
                found |= pair
                self._stacked[module] = StackedExperts(module, next(iter(pair.values())).experts, *pair)
        return found

    def _partial(self, module: str) -> str | None:
        n, k = self.index[f"{module}.weight"].shape
        if self._tile is not None and (n % self._tile[0] or k % self._tile[1]):
            return f"a weight without whole {self._tile[0]}x{self._tile[1]} tiles is left plain by the writer"
        return None


def _kept(module: str) -> str | None:
    name = next((n for n in _KEPT_PLAIN if f".{module}".endswith(f".{n}")), None)
    return None if name is None else f"{name} is plain in every checkpoint of this method"


def _skipped(config: CheckpointConfig) -> tuple[str, tuple[str, ...]]:
    keys = [key for key in ("modules_to_not_convert", "ignored_layers") if config.quantization.get(key) is not None]
    if len(keys) > 1 and config.names(keys[0]) != config.names(keys[1]):
        raise config.bad(keys[1], f"the same list as {keys[0]}", config.quantization[keys[1]])
    key = keys[0] if keys else "modules_to_not_convert"
    return key, config.names(key)


def _tile(config: CheckpointConfig) -> tuple[int, int] | None:
    value = config.quantization.get("weight_block_size")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n < 1 << 20 for n in value):
        raise config.bad("weight_block_size", "[rows, columns] or null", value)
    return value[0], value[1]


def _choice(config: CheckpointConfig, key: str, known: tuple[str, ...], default: str) -> str:
    value = config.quantization.get(key)
    if value is None:
        return default
    if not isinstance(value, str) or value.lower() not in known:
        raise config.bad(key, f"one of {', '.join(known)}", value)
    return value.lower()


@lru_cache(maxsize=64)
def _input_format(static: str, columns: int | None, powers: bool) -> Format:
    """static: element of a static scale, "" for computed ones; columns: of a group, None for whole tokens."""
    if static:
        return Format.parse(f"e4m3fn.tensor*{static}")
    block = "row" if columns is None else f"g{columns}"
    return Format.parse(f"e4m3fn.{block}*{'e8m0@e8m0=ceil' if powers else 'fp32'}")


scheme = MappingScheme(
    FP8Mapping,
    Family(
        "FP8",
        "DeepSeek-V3, Qwen, AutoFP8, transformers 5.23",
        ("weight_scale_inv", "weight_scale", "stacked [E, N, K]", "stacked [E, K, N]"),
        (
            "modules_to_convert: modules that are no Linear layers",
            "quantized embeddings",
            "transposed experts with tiles that are not square",
        ),
    ),
)
