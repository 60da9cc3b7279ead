"""The cache of ModelOpt: `kv_cache_quant_algo`, with k_scale on k_proj and v_scale on v_proj.

The scale multiplies, in both formats. FP8: value = code * k_scale. NVFP4: value = code * block scale * k_scale, the
block scales computed under that outer value; versions before 0.42 wrote amax/2688 there and later ones amax/448, which
needs no case here: the stored number is the outer level either way. A cache calibrated by its constant range
(the exporter's *_cast recipes, amax 448) stores no scale, which stands for 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import KVFormat
from qhal.specs import KVSpec, Operand
from qhal_schemes import checks
from qhal_schemes.attention import attention_layers, check_cache_rows
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.modelopt_algorithms import CACHES
from qhal_schemes.source import TensorIndex


@dataclass(frozen=True, eq=False)
class Cache:
    """How the caches of all layers are quantized. layers: layer number -> attention module; none for a plain cache."""

    config: CheckpointConfig
    index: TensorIndex
    layers: Mapping[int, str]
    format: Format
    stored: bool

    @staticmethod
    def read(config: CheckpointConfig, index: TensorIndex, algo: str, rows: Callable[[str], int | None]) -> Cache:
        """Match kv_cache_quant_algo with the scales of the file. rows: of a module, None if the file has none."""
        layers = attention_layers(index) if algo else {}
        cache = Cache(config, index, layers, Format.parse(CACHES.get(algo, "fp32")), any(map(_is_scale, index)))
        if algo and not layers:
            raise CheckpointError(f"{index.folder}: kv_cache_quant_algo is {algo}, but no attention is in the file")
        if algo and config.value("kv_lora_rank") is not None:
            raise CheckpointError(
                f"unsupported: {config.folder / config.file}: kv_cache_quant_algo {algo} of latent attention: the file "
                f"does not say whether k_scale is that of the latent row or of the keys; planned"
            )
        for layer, module in layers.items():
            check_cache_rows(config, f"{module}.k_proj", rows(f"{module}.k_proj"))
            for name in cache.tensors(layer):
                index.expect(name, ("F32",), (1,) if name in index and index[name].shape == (1,) else ())
        return cache

    def tensors(self, layer: int) -> tuple[str, ...]:
        """k_scale and v_scale of one layer; none where the file stores no scale of any cache."""
        return tuple(f"{self.layers[layer]}.{p}_proj.{p}_scale" for p in "kv") if self.stored else ()

    def describe(self, layer: int) -> KVFormat:
        """The format of one layer's cache."""
        heads, dim = self.config.kv_heads, self.config.head_dim
        return KVFormat("mha", self.format, self.format, heads=heads, k_dim=dim, v_dim=dim, name=self.layers[layer])

    def spec(self, layer: int) -> KVSpec:
        """The format and the static scales [1] of one layer's cache."""
        scales = [torch.ones(1), torch.ones(1)]
        if self.stored:
            scales = [self.index.read(name).reshape(1) for name in self.tensors(layer)]
            for name, scale in zip(self.tensors(layer), scales, strict=True):
                checks.scales(self.index, name, scale, positive=True)
        k, v = (Operand(self.format, scale) for scale in scales)
        f = self.describe(layer)
        return KVSpec(k, v, heads=f.heads, k_dim=f.k_dim, v_dim=f.v_dim, name=f.name)


def _is_scale(name: str) -> bool:
    return name.endswith((".k_scale", ".v_scale"))
