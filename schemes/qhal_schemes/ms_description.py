"""quant_model_description.json of ModelSlim: a quantization type for every tensor of the files, and a few global keys.

Types are per tensor; `model_quant_type` only summarizes them. Keys as written by msmodelslim 26.1.0 (format version
1.0.0) and by the older writer without a `version`, whose files carry the type in their names.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qhal.errors import CheckpointError
from qhal_schemes.base import CheckpointWarning
from qhal_schemes.claims import Claimed
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.matching import near_text
from qhal_schemes.source import TensorIndex
from qhal_schemes.strict_json import load_json

VERSION = "1.0.0"
_FILE = "quant_model_description.json"
_GLOBAL = frozenset({"version", "model_quant_type", "metadata", "group_size", "optional", "kv_cache_type"}) | {
    "kv_quant_type", "fa_quant_type", "reduce_quant_type",
}  # fmt: skip
ROTATIONS: dict[str, tuple[str, ...]] = {
    "heads_rotation": ("heads_rotation",),
    "kronecker_rotation": ("kronecker_rotation_m", "kronecker_rotation_n"),
}
"""Online rotations: key of metadata.quarot -> the tensors of a listed layer. They have no entry of their own."""


@dataclass(frozen=True, eq=False)
class Description:
    """The description of one checkpoint.

    types       tensor -> quantization type
    attention   attention module -> how its operands are quantized ("INT8", "Q_FP8_DYNAMIC_KV_FP8")
    rotated     layers with an online rotation, by key of ROTATIONS
    group_size  columns that share a scale, of the last grouped type that was written; 0: none
    packed      whether int4 codes are stored in pairs: the older writer stores one in a byte
    """

    types: Mapping[str, str]
    attention: Mapping[str, str]
    rotated: Mapping[str, tuple[str, ...]]
    group_size: int
    packed: bool

    @staticmethod
    def read(config: CheckpointConfig, index: TensorIndex) -> Description:
        """Read and compare with the tensors: each is named by both, or it is an error."""
        types: dict[str, str] = {}
        attention: dict[str, str] = {}
        for key, value in config.quantization.items():
            if key in _GLOBAL:
                continue
            if "." not in key and key not in index:
                _unknown(config, key)
            elif not isinstance(value, str) or not value:
                raise config.bad(key, "the name of a quantization type", value)
            elif key.endswith(".quant_type") and key not in index:
                attention[key.removesuffix(".quant_type")] = value
            else:
                types[key] = value
        version = config.quantization.get("version")
        if version not in (None, VERSION):
            if not isinstance(version, str):
                raise config.bad("version", f"{VERSION} or no such key", version)
            _unknown(config, f"version {version}", f"{VERSION} is known here")
        if config.quantization.get("reduce_quant_type") is not None:
            _unknown(config, "reduce_quant_type", "the format of collectives is chosen where they are called")
        size = config.quantization.get("group_size", 0)
        if type(size) is not int or size < 0:
            raise config.bad("group_size", "0 or a positive integer", size)
        for key in ("kv_cache_type", "kv_quant_type"):
            if config.quantization.get(key) not in (None, "C8"):
                raise config.bad(key, "C8 or no such key", config.quantization[key])
        found = Description(types, attention, _rotated(config), size, version is not None)
        found._compare(config, index)
        return found

    def _compare(self, config: CheckpointConfig, index: TensorIndex) -> None:
        rotations = {f"{m}.{leaf}" for key, layers in self.rotated.items() for m in layers for leaf in ROTATIONS[key]}
        where = f"{config.folder / config.file}"
        for name in (*self.types, *sorted(rotations)):
            if name not in index and not (name == "lm_head.weight" and config.tied and self.types[name] == "FLOAT"):
                unread = f"; not read: {', '.join(index.unread[:4])}" if index.unread else ""
                raise CheckpointError(f"{where}: tensor {name} is missing from the weight files{unread}")
        for name, entry in index.items():
            if name not in self.types and name not in rotations:
                raise CheckpointError(
                    f"{index.folder / entry.file}: tensor {name} is extra: {config.file} does not say how it is "
                    f"quantized{near_text(name, list(self.types)[:2000])}"
                )


def claim(files: Sequence[Path], model: Mapping[str, Any]) -> Claimed:
    """A folder with a description: the plain name wins, else there must be one file with a type in its name."""
    names = [path.name for path in files]
    if _FILE not in names and len(files) > 1:
        raise CheckpointError(f"{files[0].parent}: {' and '.join(names)} are there; keep the one that belongs to it")
    path = files[names.index(_FILE)] if _FILE in names else files[0]
    return Claimed("modelslim", load_json(path), path.name)


def _rotated(config: CheckpointConfig) -> dict[str, tuple[str, ...]]:
    """metadata.quarot: the layers of each online rotation."""
    metadata = config.quantization.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise config.bad("metadata", "an object", metadata)
    section = metadata.get("quarot") or {}
    if not isinstance(section, dict):
        raise config.bad("metadata.quarot", "an object", section)
    unknown = sorted(set(section) - {*ROTATIONS, "max_tp_size"})
    if unknown:
        _unknown(config, f"metadata.quarot.{unknown[0]}")
    found = {}
    for key in ROTATIONS:
        part = section.get(key) or {}
        layers = part.get("layers", []) if isinstance(part, dict) else None
        if not isinstance(layers, list) or not all(isinstance(n, str) and n for n in layers):
            raise config.bad(f"metadata.quarot.{key}", 'an object with "layers", a list of names', part)
        found[key] = tuple(layers)
    return found


def _unknown(config: CheckpointConfig, key: str, why: str = "no key of ModelSlim that is known here") -> None:
    warnings.warn(
        f"{config.folder / config.file}: {key[:80]}: {why}; it is not looked at", CheckpointWarning, stacklevel=4
    )
