"""The cache of compressed-tensors: `kv_cache_scheme`, with k_scale and v_scale stored on the attention module."""

from __future__ import annotations

from dataclasses import dataclass

from qhal.elements import dtype_name
from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import KVFormat
from qhal.specs import KVSpec, Operand
from qhal_schemes import checks
from qhal_schemes.attention import attention_layers, check_cache_rows
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.ct_config import Arguments, arguments, input_format
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.source import WIDE, TensorIndex


@dataclass(frozen=True, eq=False)
class CacheScheme:
    """How the caches of all layers are quantized. layers: layer number -> attention module."""

    config: CheckpointConfig
    index: TensorIndex
    arguments: Arguments
    layers: dict[int, str]

    @staticmethod
    def read(config: CheckpointConfig, index: TensorIndex) -> CacheScheme | None:
        """The cache scheme, its tensors checked by shape and dtype; None if the configuration has none."""
        a = arguments(config, config.quantization.get("kv_cache_scheme"), "kv_cache_scheme.")
        if a is None:
            return None
        known = a.bits == 8 and a.strategy in ("tensor", "attn_head") and not (a.kind == "float" and not a.symmetric)
        if a.dynamic is True:
            known = a.bits == 8 and a.strategy == "token"
        if not known or a.dynamic == "local":
            raise CheckpointError(
                f"unsupported: {config.folder / config.file}: kv_cache_scheme: {a.kind}{a.bits} per {a.strategy}, "
                f"dynamic {a.dynamic}; static int8 and fp8 per tensor or head can be read, others are planned"
            )
        layers = attention_layers(index)
        if not layers:
            raise CheckpointError(f"{index.folder}: kv_cache_scheme is given, but no attention module is in the file")
        scheme = CacheScheme(config, index, a, layers)
        for layer in scheme.layers:
            scheme._check_heads(layer)
            for name, dtypes in scheme._expected(layer):
                shape = index[name].shape if name in index else ()
                heads = config.kv_heads if a.strategy == "attn_head" else 1
                per_head = a.strategy == "attn_head" and len(shape) == 3
                wanted = (heads or None, 1, 1) if per_head else ((heads or None),)
                index.expect(name, dtypes, () if shape == () and heads == 1 and name in index else wanted)
        return scheme

    def _check_heads(self, layer: int) -> None:
        """The rows of k_proj against the heads of the configuration."""
        module = f"{self.layers[layer]}.k_proj"
        leaves = (self.index.entries.get(f"{module}.{leaf}") for leaf in ("weight", "weight_packed", "compressed"))
        check_cache_rows(self.config, module, next((e.shape[0] for e in leaves if e is not None and e.shape), None))

    def tensors(self, layer: int) -> list[str]:
        """The tensors of one layer's cache."""
        return [name for name, _ in self._expected(layer)]

    def _expected(self, layer: int) -> list[tuple[str, tuple[str, ...]]]:
        """The tensors of one layer's cache and the dtypes they may have; none for a dynamic cache."""
        module, a = self.layers[layer], self.arguments
        if a.dynamic is True:
            return []
        found: list[tuple[str, tuple[str, ...]]] = [(f"{module}.{p}_scale", tuple(WIDE)) for p in "kv"]
        for name in (f"{module}.{p}_zero_point" for p in "kv"):
            if not a.symmetric or name in self.index:
                found.append((name, ("I8",) if not a.symmetric else ("I8", "F8_E4M3", *WIDE)))
        return found

    def _format(self, layer: int, part: str) -> Format:
        name = f"{self.layers[layer]}.{part}_scale"
        stored = ELEMENT_OF[self.index[name].dtype] if name in self.index else dtype_name(self.config.dtype)
        return input_format(self.arguments, stored)

    def describe(self, layer: int) -> KVFormat:
        """The format of one layer's cache."""
        k, v, dim = self._format(layer, "k"), self._format(layer, "v"), self.config.head_dim
        return KVFormat("mha", k, v, heads=self.config.kv_heads, k_dim=dim, v_dim=dim, name=self.layers[layer])

    def spec(self, layer: int) -> KVSpec:
        """The formats and static scales of one layer's cache: scale [1], or [heads] per head."""
        dim = self.config.head_dim
        k, v = (self._operand(layer, part) for part in "kv")
        return KVSpec(k, v, heads=self.config.kv_heads, k_dim=dim, v_dim=dim, name=self.layers[layer])

    def _operand(self, layer: int, part: str) -> Operand:
        fmt, module = self._format(layer, part), self.layers[layer]
        if self.arguments.dynamic is True:
            return Operand(fmt)
        scale, zero_name = self.index.read(f"{module}.{part}_scale"), f"{module}.{part}_zero_point"
        checks.scales(self.index, f"{module}.{part}_scale", scale, positive=True)
        zero = self.index.read(zero_name) if zero_name in self.index else None
        if zero is not None and self.arguments.symmetric:
            if bool(zero.float().ne(0).any()):
                raise self.index.bad(zero_name, "0, as symmetric is true", str(zero.flatten().tolist()[:4]))
            zero = None
        return Operand(fmt, scale.flatten(), None if zero is None else zero.flatten())
