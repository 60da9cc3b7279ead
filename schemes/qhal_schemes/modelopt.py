"""ModelOpt: hf_quant_config.json (or its copy in config.json) matched to modules, each read into a LinearSpec.

One algorithm for all quantized modules, or one for each (`quantized_layers`, what AutoQuantize writes). What a file
holds quantized is read so even where the configuration excludes it, with a warning: exporters list modules there whose
packed weights they write. Keys: `modelopt_config.py`; tensors: `modelopt_weights.py`; caches: `modelopt_kv.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qhal.errors import CheckpointError
from qhal.layer_formats import LinearFormat
from qhal.rotations import Diagonal
from qhal.specs import LinearSpec
from qhal_schemes import checks, modelopt_weights
from qhal_schemes.base import CheckpointWarning, MappingScheme, SchemeMapping
from qhal_schemes.claims import Claimed
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family
from qhal_schemes.matching import EMBEDDING, GlobPatterns, module_class, near_text
from qhal_schemes.modelopt_algorithms import ALGORITHMS
from qhal_schemes.modelopt_config import SIDE_FILE, Layer, read_description
from qhal_schemes.modelopt_kv import Cache
from qhal_schemes.modelopt_weights import CODES, Stored, locate
from qhal_schemes.modules import ModuleTable
from qhal_schemes.plain import BlockRules
from qhal_schemes.source import TensorIndex
from qhal_schemes.strict_json import load_json


class ModelOptMapping(SchemeMapping):
    """A ModelOpt checkpoint."""

    cache: Cache

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        self._said = read_description(config)
        table = ModuleTable(index)
        self._refuse_stacked(table)
        skipped = GlobPatterns("exclude_modules", self._said.excluded or (), inside=True)
        entries = {module: skipped.find(module) for module in table}
        self._modules: dict[str, Stored] = {}
        for module, tensors in table.items():
            if "weight" in tensors and tensors["weight"].dtype in CODES:
                self._modules[module] = locate(index, module, self._layer(module))
        blocks = [m for m in self._modules if entries[m] is None]
        self._excluded = BlockRules(config, blocks, skipped, self._rule).exclude(table.plain_linears())
        self._warn(table, skipped, entries)
        self.cache = Cache.read(config, index, self._said.cache or "", self._rows)

    @property
    def modules(self) -> Sequence[str]:
        """Modules whose weight the file holds as codes."""
        return tuple(self._modules)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain Linear modules: excluded by name, not in quantized_layers, routers, other towers."""
        return self._excluded

    def layout(self, module: str) -> str:
        """Its quant_algo."""
        return self._layer(module).algo

    def tensors(self, module: str) -> Sequence[str]:
        """Codes, scales, the input's scale and pre-scale, low-rank factors and a bias."""
        return self._modules[module].names

    def describe(self, module: str) -> LinearFormat:
        """The format, from the configuration and the index."""
        m = self._modules[module]
        return LinearFormat(
            name=module,
            n=m.n,
            k=m.k,
            weight=m.format,
            input=m.input,
            static_input=m.algorithm.static,
            operand=m.algorithm.operand_format,
            rotate_in=(("diagonal", m.k),) if m.pre_scale else (),
            low_rank=m.rank,
            bias=m.bias,
        )

    def read(self, module: str) -> LinearSpec:
        """Read and check one module. pre_quant_scale multiplies the input, before the low-rank branch reads it."""
        m = self._modules[module]
        t = self.index.read_all(m.names)
        given, operand = modelopt_weights.operands(self.index, module, m, t)
        for name in (*(m.low_rank or ()), *([f"{module}.bias"] if m.bias else ())):
            checks.finite(self.index, name, t[name])
        pre = f"{module}.pre_quant_scale"
        if m.pre_scale:
            checks.scales(self.index, pre, t[pre], positive=True)
        return LinearSpec(
            weight=modelopt_weights.weight(self.index, module, m, t),
            input=given,
            operand=operand,
            rotate_in=(Diagonal(t[pre].float()),) if m.pre_scale else (),
            low_rank=None if m.low_rank is None else (t[m.low_rank[0]].float(), t[m.low_rank[1]].float()),
            bias=t[f"{module}.bias"].float() if m.bias else None,
            name=module,
        )

    # ---------------------------------------------------------------- matching

    def _layer(self, module: str) -> Layer:
        """The algorithm of a module that the file holds quantized."""
        layer, where = self._said.layer(module), f"{self.index.folder}: {module}"
        if layer is None:
            what = "no quantized_layers entry names it" if self._said.layers is not None else "quant_algo is null"
            near = near_text(module, self._said.layers or ())
            raise CheckpointError(f"{where}: holds quantized tensors, but {what}{near}")
        if module_class(module) == EMBEDDING:
            raise CheckpointError(f"unsupported: {where}: a quantized embedding; planned")
        return layer

    def _rule(self, module: str) -> str | None:
        """Why a plain Linear module that no entry excludes is plain."""
        if self._said.layers is None:
            return None if self._said.whole is not None else "quant_algo is null: only the cache is quantized"
        layer = self._said.layer(module)
        if layer is None:
            return "not in quantized_layers"
        raise CheckpointError(
            f"{self.index.folder}: {module}: quantized_layers makes it {layer.algo}, but the file holds a plain weight"
        )

    def _refuse_stacked(self, table: ModuleTable) -> None:
        """Experts that are stacked in one parameter have no `.weight`: never take their codes for a plain tensor."""
        for module, tensors in table.items():
            for leaf, entry in tensors.items():
                if leaf != "weight" and f"{leaf}_weight_scale" in tensors and entry.dtype in CODES:
                    raise CheckpointError(
                        f"unsupported: {self.index.folder}: {module}.{leaf}: {entry.dtype} {list(entry.shape)}: "
                        f"experts stacked in one parameter; planned"
                    )

    def _rows(self, module: str) -> int | None:
        if module in self._modules:
            return self._modules[module].n
        entry = self.index.entries.get(f"{module}.weight")
        return entry.shape[0] if entry is not None and entry.shape else None

    def _warn(self, table: ModuleTable, skipped: GlobPatterns, entries: Mapping[str, str | None]) -> None:
        """Modules that are excluded but quantized, and every name in the configuration that stands for nothing."""
        both = [m for m in self._modules if entries[m] is not None]
        if both:
            more = f" (and {len(both) - 1} more)" if len(both) > 1 else ""
            warnings.warn(
                f"{self.index.folder}: {both[0]}{more}: excluded by exclude_modules {entries[both[0]]!r}, but the file "
                f"holds it quantized; it is read so",
                CheckpointWarning,
                stacklevel=3,
            )
        tied = ("lm_head", "model.lm_head", "language_model.lm_head") if self.config.tied else ()
        layers = GlobPatterns("quantized_layers", tuple(self._said.layers or ()), inside=True)
        for name in tied:
            skipped.find(name)
        for name in (*table, *tied) if layers.patterns else ():
            layers.find(name)
        for names in (skipped, layers):
            names.warn_unused(list(table))


def claim(files: Sequence[Path], model: Mapping[str, Any]) -> Claimed | None:
    """hf_quant_config.json where config.json has no section; None if it says that nothing is quantized."""
    section = load_json(files[0])
    inner = section.get("quantization")
    if isinstance(inner, dict) and inner.get("quant_algo") is None and inner.get("kv_cache_quant_algo") is None:
        return None
    return Claimed("modelopt", section, SIDE_FILE)


scheme = MappingScheme(
    ModelOptMapping,
    Family(
        "ModelOpt",
        "ModelOpt 0.23 to 0.47",
        tuple(ALGORITHMS),
        (
            "zero points (has_zero_point)",
            "quantized embeddings",
            "experts stacked in one parameter",
            "caches other than FP8 and NVFP4, quantized caches of latent attention",
        ),
    ),
)
