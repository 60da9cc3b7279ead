"""The cache of compressed-tensors: `kv_cache_scheme`, with k_scale and v_scale stored on the attention module."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qhal.elements import dtype_name
from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import KVFormat
from qhal.specs import KVSpec, Operand
from qhal_schemes import checks
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.ct_config import Arguments, arguments, input_format
from qhal_schemes.plain import ELEMENT_OF
from qhal_schemes.source import WIDE, TensorIndex

_ATTENTION = re.compile(
    r"(.*\.layers\.(\d+)\.(?:self_attn|attention|attn))\.(?:[kv]_scale|[qkvo]_proj\..*|qkv_proj\..*)$"
)


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
        layers: dict[int, str] = {}
        for name in index:
            found = _ATTENTION.match(name)
            if found:
                layers.setdefault(int(found[2]), found[1])
        if not layers:
            raise CheckpointError(f"{index.folder}: kv_cache_scheme is given, but no attention module is in the file")
        scheme = CacheScheme(config, index, a, dict(sorted(layers.items())))
        for layer in scheme.layers:
            scheme._check_heads(layer)
            for name, dtypes in scheme.names(layer):
                shape = index[name].shape if name in index else ()
                heads = config.kv_heads if a.strategy == "attn_head" else 1
                per_head = a.strategy == "attn_head" and len(shape) == 3
                wanted = (heads or None, 1, 1) if per_head else ((heads or None),)
                index.expect(name, dtypes, () if shape == () and heads == 1 and name in index else wanted)
        return scheme

    def _check_heads(self, layer: int) -> None:
        """Heads times features must be the rows of k_proj, whose output is what the cache holds."""
        heads, dim, module = self.config.kv_heads, self.config.head_dim, f"{self.layers[layer]}.k_proj"
        leaves = (self.index.entries.get(f"{module}.{leaf}") for leaf in ("weight", "weight_packed", "compressed"))
        rows = next((e.shape[0] for e in leaves if e is not None and e.shape), None)
        if heads and dim and rows is not None and rows != heads * dim:
            raise CheckpointError(
                f"{self.config.folder / 'config.json'}: num_key_value_heads {heads} and head_dim {dim} need a k_proj "
                f"of {heads * dim} rows, {module} has {rows}"
            )

    def names(self, layer: int) -> list[tuple[str, tuple[str, ...]]]:
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
