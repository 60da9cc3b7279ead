"""Writing a checkpoint folder: shards, their index, config.json and the files around them; whole or not at all.

What a tensor of the source becomes is a unit: the tensors that take its place, announced before the first byte is
written and made when their turn comes, so that one unit is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qhal_schemes.source import inside
from qhal_schemes.strict_json import is_file, load_json
from qhal_schemes.writing import AtomicDirectory, StreamingSafetensors, TensorLayout

Units = Mapping[str, Mapping[str, TensorLayout]]
"""unit (a tensor or a module of the source) -> the tensors that take its place"""

SHARD_BYTES = 5_000_000_000
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_SECTIONS = ("quantization_config", "compression_config", "quip_params")


def write_folder(
    source: Path,
    out: Path,
    units: Units,
    make: Callable[[str], Mapping[str, Tensor]],
    section: Mapping[str, Any] | None,
    *,
    values: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
    leave: Collection[str] = (),
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write `out` like `source` with other weights; returns the names of its files.

    make     the tensors of a unit, as `units` announces them
    section  the quantization_config of config.json; None: a checkpoint without one
    values   further keys of config.json
    files    further JSON files by name
    leave    files of the source that are not copied, beside its weights and config.json

    CheckpointError for an existing target and a full disk; whatever `make` raises leaves nothing behind.
    """
    shards = _shards(units, shard_bytes)
    needed = nbytes(units)
    names = _file_names(len(shards))
    with AtomicDirectory(out, needed=needed) as folder:
        copied = _copy_others(source, folder.path, {*leave, *(files or {})})
        for file, shard in zip(names, shards, strict=True):
            header = {name: one for unit in shard.values() for name, one in unit.items()}
            with StreamingSafetensors(folder.path / file, header) as target:
                for unit in shard:
                    for name, tensor in make(unit).items():
                        target.write(name, tensor)
        if len(shards) > 1:
            weight_map = {
                name: file for file, s in zip(names, shards, strict=True) for unit in s.values() for name in unit
            }
            _json(
                folder.path / "model.safetensors.index.json",
                {"metadata": {"total_size": needed}, "weight_map": weight_map},
            )
        for name, value in (files or {}).items():
            _json(folder.path / name, value)
        stored = source / "config.json"  # some formats have none
        model = load_json(stored) if is_file(stored) else {}
        for place in (model, model.get("text_config")):
            if isinstance(place, dict):
                for key in _SECTIONS:
                    place.pop(key, None)
        model |= values or {}
        _json(folder.path / "config.json", model if section is None else {**model, "quantization_config": section})
    return [*names, *copied, *(files or {})]


def nbytes(units: Units) -> int:
    """Bytes of every tensor of these units."""
    return sum(one.nbytes for unit in units.values() for one in unit.values())


def _shards(units: Units, limit: int) -> list[dict[str, Mapping[str, TensorLayout]]]:
    shards: list[dict[str, Mapping[str, TensorLayout]]] = [{}]
    size = 0
    for name, unit in units.items():
        own = nbytes({name: unit})
        if shards[-1] and size + own > limit:
            shards.append({})
            size = 0
        shards[-1][name] = unit
        size += own
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _copy_others(source: Path, target: Path, leave: Collection[str]) -> list[str]:
    """Tokenizer, generation settings and the like; no weights, no hidden files, no folders."""
    copied = []
    for path in sorted(source.iterdir()):
        name = path.name
        skipped = name == "config.json" or name in leave or name.startswith(".") or name.endswith(_WEIGHTS)
        if skipped or not path.is_file():
            continue
        shutil.copyfile(inside(source, name), target / name)
        copied.append(name)
    return copied


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
