"""Writing a quantized checkpoint: a float checkpoint streamed into a standard compressed-tensors folder.

The bits are those of `quantizing.py`; here are shards, the files around the weights, and the order of things:
everything is checked before the first byte is written, and the folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qhal.elements import dtype_name
from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal_schemes import checks
from qhal_schemes.checkpoint import Checkpoint
from qhal_schemes.compressed_tensors_writer import Layout, pack_tensors, tensor_layouts
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.quantizing import Choice, QuantizingMapping, quantize_weight, resolve_format
from qhal_schemes.source import TensorIndex, _inside
from qhal_schemes.strict_json import load_json
from qhal_schemes.writing import AtomicDirectory, StreamingSafetensors, TensorLayout

Progress = Callable[[int, int, str], None]
"""Called after every quantized module with the number done, the number of all, and the module's name."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    format: str | Format,
    *,
    ignore: Sequence[str] = ("lm_head",),
    progress: Progress | None = None,
    shard_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Quantize a float checkpoint into a standard compressed-tensors checkpoint; returns a JSON-able summary.

    format       a word (int4_g32, int8, fp8, mxfp4, ... see WORDS) or a weight format (int4.g32*bf16@qmax=7.5)
    ignore       module names or `re:` patterns that stay plain; routers and embeddings always do
    shard_bytes  a larger checkpoint is split into files of at most this size

    One module is in memory at a time. `out` appears whole or not at all, see `AtomicDirectory`. FormatError for a
    format that no such checkpoint holds; CheckpointError for a source that is already quantized, shapes that do not
    divide into groups (all are listed, before anything is written), NaN or Inf, an existing target, a full disk.
    """
    source, out = Path(source), Path(out)
    config = CheckpointConfig.read(source)
    index = config.index(source)
    layout = resolve_format(format, config.dtype)
    mapping = QuantizingMapping(config, index, layout, ignore)
    Checkpoint(mapping)  # what could not be read back is refused before anything is written
    choice = mapping.choice
    shards = _shards(index, choice, layout, shard_bytes)
    needed = sum(one.nbytes for shard in shards for unit in shard.values() for one in unit.values())
    done, chosen = 0, set(choice.modules)
    with AtomicDirectory(out, needed=needed) as folder:
        copied = _copy_others(source, folder.path)
        names = _file_names(len(shards))
        for file, shard in zip(names, shards, strict=True):
            header = {name: one for unit in shard.values() for name, one in unit.items()}
            with StreamingSafetensors(folder.path / file, header) as target:
                for name in shard:
                    module = name.removesuffix(".weight")
                    if module not in chosen or module == name:
                        tensor = index.read(name)
                        if name.removesuffix(".bias") in chosen and name.endswith(".bias"):
                            checks.finite(index, name, tensor)
                        target.write(name, tensor)
                        continue
                    for part, tensor in pack_tensors(module, quantize_weight(index, module, layout), layout).items():
                        target.write(part, tensor)
                    done += 1
                    if progress is not None:
                        progress(done, len(choice.modules), module)
        _write_json(folder.path, config, layout, choice, dict(zip(names, shards, strict=True)), needed)
    weights = sum(index[f"{m}.weight"].shape[0] * index[f"{m}.weight"].shape[1] for m in choice.modules)
    fmt = layout.input(dtype_name(config.dtype))
    return {
        "out": str(out),
        "format": str(layout.weight),
        "input": None if fmt is None else str(fmt),
        "modules": len(choice.modules),
        "weights": weights,
        "plain": choice.left,
        "files": [*names, *copied],
        "bytes": needed,
        "source_bytes": sum(entry.nbytes for entry in index.values()),
    }


Shard = dict[str, dict[str, TensorLayout]]
"""Tensor of the source -> the tensors that take its place; a copied one stands for itself."""


def _shards(index: TensorIndex, choice: Choice, layout: Layout, limit: int) -> list[Shard]:
    chosen = set(choice.modules)
    shards: list[Shard] = [{}]
    size = 0
    for name, entry in index.entries.items():
        module = name.removesuffix(".weight")
        unit = {name: TensorLayout(entry.dtype, entry.shape)}
        if name.endswith(".weight") and module in chosen:
            unit = tensor_layouts(module, entry.shape[0], entry.shape[1], layout)
        clash = [part for part in unit if part != name and part in index]
        if clash:
            raise CheckpointError(f"{index.folder}: {clash[0]} is there already, beside the float weight {name}")
        nbytes = sum(one.nbytes for one in unit.values())
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = unit
        size += nbytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _copy_others(source: Path, target: Path) -> list[str]:
    """Tokenizer, generation settings and the like; no weights, no hidden files, no folders."""
    copied = []
    for path in sorted(source.iterdir()):
        name = path.name
        if name == "config.json" or name.startswith(".") or name.endswith(_WEIGHTS) or not path.is_file():
            continue
        shutil.copyfile(_inside(source, name), target / name)
        copied.append(name)
    return copied


def _write_json(
    folder: Path, config: CheckpointConfig, layout: Layout, choice: Choice, files: Mapping[str, Shard], total: int
) -> None:
    if len(files) > 1:
        weight_map = {part: file for file, shard in files.items() for unit in shard.values() for part in unit}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    model = load_json(config.folder / "config.json")
    model["quantization_config"] = layout.section(choice.ignore)
    text = json.dumps(model, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
