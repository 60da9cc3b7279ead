"""The cache of Quark: output_tensors of k_proj and v_proj, with output_scale stored on those modules.

Quark's own fake quantization rounds the outputs of the projections, before the rotary embedding; engines use the same
scales for the rows of the cache, and so does the spec. Sources: amd-quark 0.13 (export), vLLM's Quark reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qhal.formats import Format
from qhal.layer_formats import KVFormat
from qhal.specs import KVSpec, Operand
from qhal_schemes import checks
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.quark_config import QuarkConfig, Record, unsupported
from qhal_schemes.source import WIDE, TensorIndex

PROJECTION = re.compile(r"(.*\.layers\.(\d+)\.(?:self_attn|attention|attn))\.([kv])_proj$")


@dataclass(frozen=True, eq=False)
class CacheScales:
    """Static scales of every layer's cache. layers: layer -> attention module; names: (layer, "k" or "v") -> tensor."""

    config: CheckpointConfig
    index: TensorIndex
    layers: Mapping[int, str]
    names: Mapping[tuple[int, str], str]
    elements: Mapping[tuple[int, str], str]

    @staticmethod
    def read(
        quark: QuarkConfig, index: TensorIndex, quantized: Mapping[str, tuple[Record, Mapping[str, str]]]
    ) -> CacheScales:
        """Caches of the quantized modules whose outputs are quantized. quantized: module -> record and its tensors."""
        config = quark.config
        if config.quantization.get("kv_cache_post_rope"):
            raise unsupported(config, "kv_cache_post_rope", "caches that are quantized after the rotary embedding")
        layers: dict[int, str] = {}
        names: dict[tuple[int, str], str] = {}
        elements: dict[tuple[int, str], str] = {}
        for module, (record, leaves) in quantized.items():
            spec, found = record.outputs, PROJECTION.match(module)
            if spec is None:
                continue
            if found is None:
                raise unsupported(config, f"{record.path}.output_tensors", f"quantized outputs of {module}")
            if (
                spec.dynamic
                or spec.qscheme != "per_tensor"
                or spec.dtype not in ("fp8_e4m3", "int8")
                or not spec.symmetric
            ):
                raise unsupported(
                    config, f"{record.path}.output_tensors", f"a cache of {spec}; static fp8_e4m3 and int8 per tensor"
                )
            layer, part = int(found[2]), found[3]
            name = leaves.get("output_scale", f"{module}.output_scale")
            index.expect(name, tuple(WIDE), () if name in index and index[name].shape == () else (1,))
            layers[layer], names[layer, part], elements[layer, part] = found[1], name, spec.element
        for layer, module in layers.items():
            for part in "kv":
                if (layer, part) not in names:
                    raise config.bad("kv_cache_quant_config", f"both caches of {module}", f"no {part}_proj")
        return CacheScales(config, index, dict(sorted(layers.items())), names, elements)

    def tensors(self, layer: int) -> Sequence[str]:
        """Both scales."""
        return [self.names[layer, part] for part in "kv"]

    def describe(self, layer: int) -> KVFormat:
        """The format of one layer's cache."""
        k, v = (self._format(layer, part) for part in "kv")
        dim = self.config.head_dim
        return KVFormat("mha", k, v, heads=self.config.kv_heads, k_dim=dim, v_dim=dim, name=self.layers[layer])

    def spec(self, layer: int) -> KVSpec:
        """The format and the static scales [1] of one layer's cache."""
        k, v = (self._operand(layer, part) for part in "kv")
        dim = self.config.head_dim
        return KVSpec(k, v, heads=self.config.kv_heads, k_dim=dim, v_dim=dim, name=self.layers[layer])

    def _format(self, layer: int, part: str) -> Format:
        stored = ELEMENT_OF[self.index[self.names[layer, part]].dtype]
        return Format.parse(f"{self.elements[layer, part]}.tensor*{stored}")

    def _operand(self, layer: int, part: str) -> Operand:
        name = self.names[layer, part]
        scale = self.index.read(name)
        checks.scales(self.index, name, scale, positive=True)
        return Operand(self._format(layer, part), scale.reshape(1))
