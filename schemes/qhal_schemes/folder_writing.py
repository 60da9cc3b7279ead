"""Writing a checkpoint folder: shards, their index, config.json and the files around them; whole or not at all.

What a tensor of the source becomes is a unit: the tensors that take its place, announced before the first byte is
written and made when their turn comes, so that one unit is in memory at a time.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qhal_schemes.source import inside
from qhal_schemes.strict_json import is_file
from qhal_schemes.writing import AtomicDirectory, StreamingSafetensors, TensorLayout, apart

Units = Mapping[str, Mapping[str, TensorLayout]]
"""unit (a tensor or a module of the source) -> the tensors that take its place"""

SHARD_BYTES = 5_000_000_000
_REPLACED = (".safetensors", ".safetensors.index.json")
_WEIGHTS = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_TEMPLATES = "additional_chat_templates"
_SECTIONS = ("quantization_config", "compression_config", "quip_params")


def write_folder(
    source: Path,
    out: Path,
    units: Units,
    make: Callable[[str], Mapping[str, Tensor]],
    section: Mapping[str, Any] | None,
    *,
    model: Mapping[str, Any],
    files: Mapping[str, Any] | None = None,
    leave: Collection[str] = (),
    shard_bytes: int = SHARD_BYTES,
) -> tuple[list[str], list[str]]:
    """Write `out` like `source` with other weights; returns the names of its files, and what stays behind.

    source   the checkpoint's folder; of a single file nothing beside it belongs to the checkpoint
    make     the tensors of a unit, as `units` announces them
    section  the quantization_config of config.json; None: a checkpoint without one
    model    config.json of the source; its quantization sections are left out
    files    further JSON files by name
    leave    files of the source that are not copied, beside its weights and config.json

    CheckpointError for an existing target, one inside the source, and a full disk; whatever `make` raises leaves
    nothing behind.
    """
    apart(out, source)
    shards = _shards(units, shard_bytes)
    needed = nbytes(units)
    names = _file_names(len(shards))
    with AtomicDirectory(out, needed=needed) as folder:
        copied, left = _copy_others(source, folder.path, {*leave, *(files or {})})
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
        stored = copy.deepcopy(dict(model))
        for place in (stored, stored.get("text_config")):
            if isinstance(place, dict):
                for key in _SECTIONS:
                    place.pop(key, None)
        _json(folder.path / "config.json", stored if section is None else {**stored, "quantization_config": section})
    return [*names, *copied, *(files or {})], left


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


def _copy_others(source: Path, target: Path, leave: Collection[str]) -> tuple[list[str], list[str]]:
    """Tokenizer, templates, generation settings and the like; no weights, no hidden files. (copied, left behind)"""
    copied: list[str] = []
    left: list[str] = []
    if is_file(source):
        return copied, left
    for path in sorted(source.iterdir()):
        name = path.name
        if name == "config.json" or name in leave or name.startswith(".") or name.endswith(_REPLACED):
            continue
        if path.is_dir() and name == _TEMPLATES:
            (target / name).mkdir()
            for one in sorted(path.glob("*.jinja")):
                shutil.copyfile(inside(source, f"{name}/{one.name}"), target / name / one.name)
                copied.append(f"{name}/{one.name}")
        elif path.is_dir() or name.endswith(_WEIGHTS):
            left.append(f"{name}/" if path.is_dir() else name)
        elif path.is_file():
            shutil.copyfile(inside(source, name), target / name)
            copied.append(name)
    return copied, left


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
