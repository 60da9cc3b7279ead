"""What a VPTQ configuration says of one module: its sizes, its codebooks, and which optional tensors it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qhal.errors import CheckpointError
from qhal_schemes.config import CheckpointConfig, integer

_KEYS = frozenset({
    "vector_lens", "num_centroids", "num_res_centroids", "group_num", "group_size", "outlier_size", "indices_as_float",
    "enable_norm", "enable_perm", "is_indice_packed", "bias", "in_features", "out_features", "vector_quant_dim",
    "enable_residual", "norm_dim", "debug", "enable_proxy_error",
})  # fmt: skip
_MOST_BITS = 16


@dataclass(frozen=True)
class Layer:
    """One module. n, k: out and in features; vector: rows of one entry; residual, outliers: 0 for none.

    group_size  columns of one group as they are stored; the last group may go past k
    floats      indices are stored under the names of float dtypes of their width
    """

    n: int
    k: int
    vector: int
    centroids: int
    residual: int
    groups: int
    group_size: int
    outliers: int
    outlier_vector: int
    outlier_centroids: int
    norm: bool
    perm: bool
    packed: bool
    floats: bool
    bias: bool

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (self.centroids - 1).bit_length()

    @property
    def residual_bits(self) -> int:
        """Bits of a residual index, 0 without one."""
        return (self.residual - 1).bit_length() if self.residual else 0


def layer_of(config: CheckpointConfig, module: str) -> Layer:
    """The sizes of a module from config_for_layers, or from shared_layer_config by the last part of its name."""
    section, path = _section(config, module)

    def flag(key: str, default: bool) -> bool:
        value = section.get(key, default)
        if not isinstance(value, bool):
            raise config.bad(f"{path}{key}", "true or false", value)
        return value

    unknown = sorted(set(section) - _KEYS)
    if unknown:
        raise config.bad(f"{path}{unknown[0]}", "no such key: its meaning for the tensors is not known", "it")
    if section.get("vector_quant_dim", "out") != "out":
        raise config.bad(f"{path}vector_quant_dim", "out, the only one that VPTQ writes", section["vector_quant_dim"])
    outlier_vector, vector = _pair(config, section, "vector_lens", path)
    outlier_books, books = _pair(config, section, "num_centroids", path)
    outlier_residual, residual = _pair(config, section, "num_res_centroids", path)
    if vector < 1 or not 2 <= books <= 1 << _MOST_BITS:
        raise config.bad(f"{path}num_centroids", f"vectors and 2 to {1 << _MOST_BITS} entries of them", (vector, books))
    if residual != 0 and not 2 <= residual <= 1 << _MOST_BITS:
        raise config.bad(f"{path}num_res_centroids", f"-1, or 2 to {1 << _MOST_BITS} entries", residual)
    if outlier_residual > 0:
        raise config.bad(f"{path}num_res_centroids", "-1 for outliers: VPTQ has no residual there", outlier_residual)
    outliers = 0
    if outlier_vector > 1 and outlier_books > 0:  # the tool's own test: a vector of one row means none
        outliers = integer(config, section, "outlier_size", path=path)
        if not 2 <= outlier_books <= 1 << _MOST_BITS:
            raise config.bad(f"{path}num_centroids", f"2 to {1 << _MOST_BITS} entries for outliers", outlier_books)
    else:
        integer(config, section, "outlier_size", (0, -1), 0, path)
    k = integer(config, section, "in_features", path=path)
    groups = integer(config, section, "group_num", path=path, default=1)
    size = section.get("group_size", -1)
    size = -(-(k - outliers) // groups) if size == -1 else integer(config, section, "group_size", path=path)
    if outliers >= k or not (groups - 1) * size < k - outliers <= groups * size:
        raise config.bad(f"{path}group_size", f"{groups} groups that cover {k - outliers} columns", size)
    if outliers + groups * size != k and flag("enable_perm", False):
        raise config.bad(f"{path}group_size", f"groups of exactly {k - outliers} columns, as they are permuted", size)
    return Layer(
        n=integer(config, section, "out_features", path=path),
        k=k,
        vector=vector,
        centroids=books,
        residual=residual,
        groups=groups,
        group_size=size,
        outliers=outliers,
        outlier_vector=outlier_vector if outliers else 0,
        outlier_centroids=outlier_books if outliers else 0,
        norm=flag("enable_norm", False),
        perm=flag("enable_perm", False),
        packed=flag("is_indice_packed", True),
        floats=flag("indices_as_float", False),
        bias=flag("bias", False),
    )


def _section(config: CheckpointConfig, module: str) -> tuple[Mapping[str, Any], str]:
    leaf = module.rpartition(".")[2]
    for key, name in (("config_for_layers", module), ("shared_layer_config", leaf)):
        layers = config.quantization.get(key) or {}
        if not isinstance(layers, dict):
            raise config.bad(key, "an object of modules", layers)
        if name in layers:
            if not isinstance(layers[name], dict):
                raise config.bad(f"{key}.{name}", "an object of settings", layers[name])
            return layers[name], f"{key}.{name}."
    raise CheckpointError(
        f"{config.folder / config.file}: {module} is quantized in the file, but neither config_for_layers names it nor "
        f"shared_layer_config {leaf!r}"
    )


def _pair(config: CheckpointConfig, section: Mapping[str, Any], key: str, path: str) -> tuple[int, int]:
    """[of outliers, of the rest]; -1 and 0 are none and become 0."""
    value = section.get(key, [-1, -1])
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and -1 <= n < 1 << 31 for n in value):
        raise config.bad(f"{path}{key}", "[for outliers, for the rest], -1 for none", value)
    return max(value[0], 0), max(value[1], 0)
