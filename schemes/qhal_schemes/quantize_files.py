"""Writing a quantized checkpoint: a float checkpoint streamed into a standard compressed-tensors folder.

The bits are those of `quantizing.py`, the folder that of `folder_writing.py`; everything is checked before the first
byte is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qhal.elements import dtype_name
from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal_schemes import checks
from qhal_schemes.checkpoint import Checkpoint
from qhal_schemes.compressed_tensors_writer import Layout, pack_tensors, tensor_layouts
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.folder_writing import SHARD_BYTES, nbytes, write_folder
from qhal_schemes.quantizing import Choice, QuantizingMapping, quantize_weight, resolve_format
from qhal_schemes.source import TensorIndex
from qhal_schemes.writing import TensorLayout

Progress = Callable[[int, int, str], None]
"""Called after every quantized module with the number done, the number of all, and the module's name."""


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    format: str | Format,
    *,
    ignore: Sequence[str] = ("lm_head",),
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
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
    chosen = {f"{m}.weight": m for m in choice.modules}
    done = 0

    def make(name: str) -> Mapping[str, Tensor]:
        nonlocal done
        if name not in chosen:
            tensor = index.read(name)
            if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in chosen:
                checks.finite(index, name, tensor)
            return {name: tensor}
        module = chosen[name]
        made = pack_tensors(module, quantize_weight(index, module, layout), layout)
        done += 1
        if progress is not None:
            progress(done, len(chosen), module)
        return made

    units = _units(index, choice, layout)
    section = layout.section(choice.ignore)
    files, left = write_folder(source, out, units, make, section, model=config.model, shard_bytes=shard_bytes)
    weights = sum(index[name].shape[0] * index[name].shape[1] for name in chosen)
    fmt = layout.input(dtype_name(config.dtype))
    return {
        "out": str(out),
        "format": str(layout.weight),
        "input": None if fmt is None else str(fmt),
        "modules": len(choice.modules),
        "weights": weights,
        "plain": choice.left,
        "files": files,
        "left": left,
        "bytes": nbytes(units),
        "source_bytes": sum(entry.nbytes for entry in index.values()),
    }


def _units(index: TensorIndex, choice: Choice, layout: Layout) -> dict[str, dict[str, TensorLayout]]:
    """Tensor of the source -> the tensors that take its place; a copied one stands for itself."""
    chosen = set(choice.modules)
    units: dict[str, dict[str, TensorLayout]] = {}
    for name, entry in index.entries.items():
        module = name.removesuffix(".weight")
        unit = {name: TensorLayout(entry.dtype, entry.shape)}
        if name.endswith(".weight") and module in chosen:
            unit = tensor_layouts(module, entry.shape[0], entry.shape[1], layout)
        clash = [part for part in unit if part != name and part in index]
        if clash:
            raise CheckpointError(f"{index.folder}: {clash[0]} is there already, beside the float weight {name}")
        units[name] = unit
    return units
