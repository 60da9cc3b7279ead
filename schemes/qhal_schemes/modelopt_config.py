"""The configuration of ModelOpt: hf_quant_config.json and its copy in config.json, merged into one description.

Both files say the same in other words: `exclude_modules` is `ignore`, `kv_cache_quant_algo` is `kv_cache_scheme`, and
only one of the two has `group_size`. What both say must agree; what one leaves out is taken from the other. Keys and
algorithms as in modelopt/torch/export (quant_utils.py, convert_hf_config.py), versions 0.23 to 0.47.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qhal.errors import CheckpointError
from qhal_schemes.base import CheckpointWarning
from qhal_schemes.config import CheckpointConfig, integer, names
from qhal_schemes.modelopt_algorithms import ALGORITHMS, CACHES, Algorithm
from qhal_schemes.strict_json import is_file, load_json

SIDE_FILE = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"
_KEYS = frozenset({
    "quant_algo", "kv_cache_quant_algo", "kv_cache_scheme", "group_size", "has_zero_point", "pre_quant_scale",
    "exclude_modules", "ignore", "quantized_layers", "config_groups", "lora_rank", "producer", "quant_method",
})  # fmt: skip
_LAYER_KEYS = frozenset({"quant_algo", "group_size", "has_zero_point", "pre_quant_scale", "lora_rank"})


@dataclass(frozen=True)
class Layer:
    """The algorithm of a module, and its group size if the configuration names one."""

    algo: str
    group: int = 0

    @property
    def algorithm(self) -> Algorithm:
        """The table's row."""
        return ALGORITHMS[self.algo]


@dataclass(frozen=True)
class Description:
    """What the configuration says. None: it does not say.

    whole     the algorithm of every quantized module; None also for mixed precision and for float weights
    layers    module (or a module that holds it) -> its algorithm, for mixed precision
    cache     kv_cache_quant_algo, "" for a cache that is not quantized
    excluded  names and globs of modules that stay plain
    algo      quant_algo as it stands there, "" for null
    """

    algo: str | None = None
    whole: Layer | None = None
    layers: Mapping[str, Layer] | None = None
    cache: str | None = None
    excluded: tuple[str, ...] | None = None

    def layer(self, module: str) -> Layer | None:
        """The algorithm of a module; None: the configuration leaves it plain."""
        if self.layers is None:
            return self.whole
        name = module
        while name and name not in self.layers:
            name = name.rpartition(".")[0]
        return self.layers.get(name)


def read_description(config: CheckpointConfig) -> Description:
    """The section that was found and, beside config.json's, hf_quant_config.json; CheckpointError if they disagree."""
    first = _describe(_inner(config))
    path = config.folder / SIDE_FILE
    if config.file != SIDE_FILE and is_file(path):
        side = _inner(replace(config, quantization=load_json(path), file=SIDE_FILE))
        first = _merge(config, first, _describe(side))
    if not first.algo and not first.cache:
        raise config.bad("quant_algo", f"one of {_known()}", None)
    if first.algo == MIXED and first.layers is None:
        raise config.bad("quantized_layers", f"an object of layers, as quant_algo is {MIXED}", None)
    return first


def _merge(config: CheckpointConfig, a: Description, b: Description) -> Description:
    """Two descriptions of one checkpoint, a from `config.file` and b from hf_quant_config.json."""

    def same(key: str, x: Any, y: Any) -> None:
        if x is not None and y is not None and x != y:
            raise CheckpointError(
                f"{config.folder}: {config.file} and {SIDE_FILE} disagree on {key}: {_short(x)} and {_short(y)}; one "
                f"of them belongs to other weights"
            )

    same("quant_algo", a.algo, b.algo)
    same("kv_cache_quant_algo", a.cache, b.cache)
    same("exclude_modules", *(None if d.excluded is None else sorted(set(d.excluded)) for d in (a, b)))
    if a.layers is not None and b.layers is not None:
        same("quantized_layers", sorted(a.layers), sorted(b.layers))
        for name in a.layers:
            same(f"quantized_layers.{name}", a.layers[name], b.layers[name])
    one, two = a.whole, b.whole
    if one is not None and two is not None and one.group and two.group:
        same("group_size", one.group, two.group)
    return Description(
        algo=b.algo if a.algo is None else a.algo,
        whole=one if two is None or (one is not None and one.group) else two,
        layers=b.layers if a.layers is None else a.layers,
        cache=b.cache if a.cache is None else a.cache,
        excluded=b.excluded if a.excluded is None else a.excluded,
    )


def _inner(config: CheckpointConfig) -> CheckpointConfig:
    """hf_quant_config.json, and old copies of it in config.json, keep everything under `quantization`."""
    section = config.quantization
    if "quantization" not in section and config.file != SIDE_FILE:
        return config
    inner = section.get("quantization")
    if not isinstance(inner, dict):
        raise config.bad("quantization", "an object", inner)
    return replace(config, quantization=inner)


def _describe(config: CheckpointConfig) -> Description:
    section = config.quantization
    _warn_unknown(config, section, _KEYS, "")
    algo = None
    if "quant_algo" in section:
        algo = "" if section["quant_algo"] is None else _algorithm(config, section["quant_algo"], "quant_algo")
    layers = _layers(config) if algo == MIXED else None
    whole = Layer(algo, _group(config, section, "")) if algo and algo != MIXED else None
    _no_zero_points(config, section, "")
    excluded: tuple[str, ...] | None = None
    for key in ("exclude_modules", "ignore"):
        if section.get(key) is not None:
            found = config.names(key)
            if excluded is not None and set(found) != set(excluded):
                raise config.bad(key, "the same modules as exclude_modules", list(found))
            excluded = found
    described = Description(algo, whole, layers, _cache(config), excluded)
    return _with_groups(config, described)


def _layers(config: CheckpointConfig) -> dict[str, Layer] | None:
    value = config.quantization.get("quantized_layers")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise config.bad("quantized_layers", "an object of layers", value)
    found = {}
    for name, layer in value.items():
        path = f"quantized_layers.{name[:200]}."
        if not isinstance(layer, dict):
            raise config.bad(path[:-1], "an object with quant_algo", layer)
        _warn_unknown(config, layer, _LAYER_KEYS, path)
        _no_zero_points(config, layer, path)
        algo = _algorithm(config, layer.get("quant_algo"), f"{path}quant_algo", whole=False)
        found[name] = Layer(algo, _group(config, layer, path))
    return found


def _algorithm(config: CheckpointConfig, value: object, key: str, *, whole: bool = True) -> str:
    if not isinstance(value, str) or not value:
        raise config.bad(key, f"one of {_known()}", value)
    name = {"NVFP4_SVDQUANT": "NVFP4_SVD"}.get(value.upper(), value.upper())
    if name in ALGORITHMS or (whole and name == MIXED):
        return name
    raise CheckpointError(f"unsupported: {config.folder / config.file}: {key}: {value[:80]!r}; can be read: {_known()}")


def _group(config: CheckpointConfig, section: Mapping[str, Any], path: str) -> int:
    """group_size, 0 where it is not named; ModelOpt writes 0 for algorithms without groups."""
    if section.get("group_size") in (None, 0) and not isinstance(section.get("group_size"), bool):
        return 0
    return integer(config, section, "group_size", path=path)


def _no_zero_points(config: CheckpointConfig, section: Mapping[str, Any], path: str) -> None:
    for key in ("has_zero_point", "pre_quant_scale"):
        if not isinstance(section.get(key), bool | None):
            raise config.bad(path + key, "true or false", section[key])
    if section.get("has_zero_point"):
        raise CheckpointError(f"unsupported: {config.folder / config.file}: {path}has_zero_point true; planned")


def _cache(config: CheckpointConfig) -> str | None:
    """The cache's algorithm by either key: a name, or for FP8 an object of num_bits and type."""
    section, found = config.quantization, None
    for key in ("kv_cache_quant_algo", "kv_cache_scheme"):
        if key not in section:
            continue
        value = section[key]
        if isinstance(value, dict):
            bits, kind = value.get("num_bits"), value.get("type")
            if value.get("dynamic", False) is not False or type(bits) is not int or kind != "float":
                raise config.bad(key, "a name, or an object with num_bits, type float and dynamic false", value)
            value = {8: "FP8", 4: "NVFP4"}.get(bits, f"float{bits}")
        if value is not None and (not isinstance(value, str) or value.upper() not in CACHES):
            raise CheckpointError(
                f"unsupported: {config.folder / config.file}: {key}: {_short(value)}; can be read: {', '.join(CACHES)}"
            )
        name = "" if value is None else value.upper()
        if found is not None and found != name:
            raise config.bad(key, f"what kv_cache_quant_algo says ({found or 'null'})", value)
        found = name
    return found


def _with_groups(config: CheckpointConfig, d: Description) -> Description:
    """config_groups repeat the algorithm as widths and group sizes: they must agree, and may be all that has a size."""
    groups = config.quantization.get("config_groups")
    if groups is None:
        return d
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise config.bad("config_groups", "an object of groups", groups)
    for name, group in groups.items():
        path = f"config_groups.{name[:200]}."
        weights = group.get("weights")
        if weights is None:
            continue
        if not isinstance(weights, dict):
            raise config.bad(f"{path}weights", "an object", weights)
        size = _group(config, weights, f"{path}weights.")
        for target in names(config, group, "targets", path) if d.algo == MIXED else ("Linear",):
            layer = (d.layers or {}).get(target) if d.algo == MIXED else d.whole
            if layer is None:
                if d.layers is None:
                    continue
                raise config.bad(f"{path}targets", "names of quantized_layers", target)
            bits = layer.algorithm.bits
            if weights.get("num_bits", bits) != bits:
                raise config.bad(
                    f"{path}weights.num_bits", f"{bits}, as quant_algo is {layer.algo}", weights["num_bits"]
                )
            if size and layer.group and size != layer.group:
                raise config.bad(f"{path}weights.group_size", f"{layer.group}, as group_size says", size)
            if size and d.whole is layer:
                d = replace(d, whole=replace(layer, group=size))
    return d


def _warn_unknown(config: CheckpointConfig, section: Mapping[str, Any], known: frozenset[str], path: str) -> None:
    unknown = [key for key in section if key not in known]
    if unknown:
        warnings.warn(
            f"{config.folder / config.file}: {path}{unknown[0][:80]}: no key of ModelOpt that is known here; it is not "
            f"looked at",
            CheckpointWarning,
            stacklevel=2,
        )


def _known() -> str:
    return ", ".join((*ALGORITHMS, MIXED))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
