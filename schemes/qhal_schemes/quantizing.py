"""Quantizing a float checkpoint, module by module: into a checkpoint on disk, or on the way in. Same bits either way.

Round to nearest in float32, without calibration data. Scales have the divisors and exponents of compressed-tensors,
whose files are written (compressed_tensors/quantization/utils/helpers.py, calculate_qparams).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhal.elements import dtype_name
from qhal.encoding import encode
from qhal.errors import CheckpointError, FormatError
from qhal.formats import Format
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec, Operand
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.base import SchemeMapping
from qhal_schemes.compressed_tensors_writer import (
    POSSIBLE,
    Layout,
    dynamic_inputs,
    pack_tensors,
    plan_layout,
    tensor_layouts,
)
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.matching import Patterns, is_router
from qhal_schemes.modules import ModuleTable
from qhal_schemes.source import TensorIndex, _inside, load_json
from qhal_schemes.writing import AtomicDirectory, StreamingSafetensors, TensorLayout

Progress = Callable[[int, int, str], None]
"""Called after every quantized module with the number done, the number of all, and the module's name."""

WORDS: dict[str, tuple[str, str | None]] = {
    "int4": ("int4.g128*{scale}@qmax=7.5", None),
    "int8": ("int8.row*{scale}@qmax=127.5", "int8"),
    "fp8": ("e4m3fn.tensor*{scale}", "fp8"),
    "fp8_row": ("e4m3fn.row*{scale}", "fp8"),
    "fp8_block": ("e4m3fn.128x128*{scale}", "fp8_g128"),
    "mxfp8": ("e4m3fn.g32*e8m0@e8m0=up1.75", "mxfp8"),
    "mxfp4": ("e2m1.g32*e8m0@e8m0=up1.75", None),
    "nvfp4": ("e2m1.g16*(e4m3fn.tensor/fp32)", None),
}
"""What a bare word means for a whole checkpoint: the weights' format, and inputs quantized while running (None: not).
{scale} is the model's dtype. Besides, weights only: int<b>_g<k> and int<b>_row, asymmetric uint<b>_g<k>, uint<b>_row.
"""

_WORD = re.compile(r"(u?)int([2-8])_(?:g(\d+)|row|channel)")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_CHUNK = 1 << 19  # weights that are encoded at once; bounds the float32 temporaries


def resolve_format(name: str | Format, dtype: torch.dtype) -> Layout:
    """What `name` means for a model of `dtype`: a word of WORDS, or a weight format by its own name (weights only)."""
    if isinstance(name, Format):
        return plan_layout(name)
    word, scale = name.strip(), dtype_name(dtype)
    found = _WORD.fullmatch(word)
    if found:
        u, bits, size = found.groups()
        b, block = int(bits), f"g{size}" if size else "row"
        text = f"int{b}-int{b}.{block}*{scale}@domain=minmax" if u else f"int{b}.{block}*{scale}@qmax={(2**b - 1) / 2}"
        return plan_layout(Format.parse(text))
    if word in WORDS:
        text, inputs = WORDS[word]
        return plan_layout(Format.parse(text.format(scale=scale)), dynamic_inputs(inputs) if inputs else None)
    try:
        fmt = Format.parse(word)
    except FormatError as bad:
        raise FormatError(f"{bad}; words for a checkpoint: {', '.join(WORDS)}, int<b>_g<k>, uint<b>_g<k>") from None
    if fmt.plain:
        raise FormatError(
            f"format {name!r} is a bare element: words for a checkpoint are {', '.join(WORDS)}, int<b>_g<k>, "
            f"int<b>_row, uint<b>_g<k>, uint<b>_row; weight formats: {POSSIBLE}"
        )
    return plan_layout(fmt)


@dataclass(frozen=True)
class Choice:
    """Which Linear modules are quantized, in file order, and by which rule each of the others stays plain."""

    modules: tuple[str, ...]
    left: dict[str, str]
    ignore: tuple[str, ...]
    """every name that the written configuration must ignore: the plain modules, and a head that the file shares"""


def choose(config: CheckpointConfig, index: TensorIndex, layout: Layout, ignore: Sequence[str]) -> Choice:
    """Pick the modules: 2-D float weights that are no embedding, router or ignored; refuses shapes that do not fit."""
    if config.method:
        raise CheckpointError(
            f"{config.folder}: already quantized ({config.method}); quantize the checkpoint that it was made from"
        )
    patterns = Patterns("ignore", ignore)
    linears = ModuleTable(index).plain_linears()
    left: dict[str, str] = {}
    for module in linears:
        rule = patterns.find(module)
        if rule is not None:
            left[module] = f"ignore {rule!r}"
        elif is_router(module):
            left[module] = "a router is not quantized"
        elif 0 in index[f"{module}.weight"].shape:
            left[module] = "an empty weight"
    modules = tuple(m for m in linears if m not in left)
    shared = ["lm_head"] if config.tied and "lm_head.weight" not in index else []
    for name in ("lm_head", *shared):
        patterns.used.add(name)  # a head may be absent: the default ignores it everywhere
    patterns.warn_unused(linears)
    if not modules:
        raise CheckpointError(
            f"{config.folder}: nothing to quantize: {len(linears)} Linear weights, all are left plain"
        )
    _check_shapes(config, index, modules, layout)
    return Choice(modules, left, (*left, *shared))


def _check_shapes(config: CheckpointConfig, index: TensorIndex, modules: Sequence[str], layout: Layout) -> None:
    size = layout.group.weights.group_size
    wrong = {m: k for m in modules if size > 0 and (k := index[f"{m}.weight"].shape[1]) % size}
    if not wrong:
        return
    listed = ", ".join(f"{m} (K={k})" for m, k in list(wrong.items())[:12])
    more = f" and {len(wrong) - 12} more" if len(wrong) > 12 else ""
    fits = [g for g in (128, 64, 32, 16) if g < size and not any(k % g for k in wrong.values())]
    hint = f"a group of {fits[0]} would fit all; or " if fits and layout.group.format == "pack-quantized" else ""
    raise CheckpointError(
        f"{config.folder}: {layout.weight}: K does not divide into groups of {size} in {listed}{more}; nothing was "
        f"written. {hint}name these modules in `ignore` to keep them plain"
    )


def encode_weight(weight: Tensor, fmt: Format) -> QTensor:
    """`encode`, some rows at a time: the same bits in bounded memory. weight: float [N, K]."""
    assert fmt.block is not None
    scale: Tensor | None = None
    if _tensor_wide(fmt):  # the outermost level looks at the whole weight: find it first, then it is static
        probe = torch.zeros(1, max(2, fmt.block.cols))
        lo, hi = torch.aminmax(weight)
        probe[0, 0], probe[0, 1] = lo.float(), hi.float()
        outer = encode(probe, fmt).scale
        outer = outer.scale if isinstance(outer, QTensor) else outer
        assert isinstance(outer, Tensor)
        scale = outer
    step = max(fmt.block.rows, _CHUNK // max(weight.shape[1], 1) // fmt.block.rows * fmt.block.rows)
    codes: Tensor | None = None
    scales: list[Tensor | QTensor] = []
    zeros: list[Tensor] = []
    for start, rows in zip(range(0, weight.shape[0], step), weight.split(step), strict=True):
        part = encode(rows, fmt, scale=scale)
        if rows.shape == weight.shape:
            return part
        codes = torch.empty(weight.shape, dtype=part.codes.dtype) if codes is None else codes
        codes[start : start + step] = part.codes
        if part.scale is not None:
            scales.append(part.scale)
        if isinstance(part.zero, Tensor):
            zeros.append(part.zero)
    assert codes is not None
    return QTensor(fmt, codes, scale=_join(scales, fmt), zero=torch.cat(zeros) if zeros else None)


def _join(parts: Sequence[Tensor | QTensor], fmt: Format) -> Tensor | QTensor:
    if fmt.block is not None and fmt.block.kind == "tensor":
        return parts[0]  # static: the same in every part
    nested = [p for p in parts if isinstance(p, QTensor)]
    return QTensor.concat(nested, 0) if nested else torch.cat([p for p in parts if isinstance(p, Tensor)])


def _tensor_wide(fmt: Format) -> bool:
    while fmt.scale is not None and not fmt.scale.plain:
        fmt = fmt.scale
    return fmt.block is not None and fmt.block.kind == "tensor"


def quantize_weight(index: TensorIndex, module: str, layout: Layout) -> QTensor:
    """Read and encode the weight of one module; CheckpointError naming the tensor for NaN, Inf or a scale overflow."""
    name = f"{module}.weight"
    weight = index.read(name)
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):  # a NaN shows in both; no temporaries
        checks.finite(index, name, weight)
    q = encode_weight(weight, layout.weight)
    scale = q.scale
    if isinstance(scale, Tensor) and scale.is_floating_point():
        if not bool(torch.isfinite(scale).all()):
            raise index.bad(
                name, f"values whose scale fits {layout.weight}", f"a peak of {weight.abs().max().item():g}"
            )
        # A block too small for its scale's dtype has scale 0 and codes that decode to 0. Readers refuse scales of 0.
        q = replace(q, scale=torch.where(scale == 0, torch.ones_like(scale), scale))
    elif isinstance(scale, QTensor) and isinstance(scale.scale, Tensor) and not bool(torch.isfinite(scale.scale).all()):
        raise index.bad(name, f"values whose scale fits {layout.weight}", f"a peak of {weight.abs().max().item():g}")
    return replace(q, format=layout.stored)


class QuantizingMapping(SchemeMapping):
    """A float checkpoint whose modules are quantized as they are read: what the written checkpoint would hold."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex, layout: Layout, ignore: Sequence[str]) -> None:
        super().__init__(config, index)
        self._layout = layout
        self._choice = choose(config, index, layout, ignore)

    @property
    def modules(self) -> Sequence[str]:
        """Every module that is quantized."""
        return self._choice.modules

    @property
    def excluded(self) -> Mapping[str, str]:
        """Linear modules that stay plain."""
        return self._choice.left

    def describe(self, module: str) -> LinearFormat:
        """The format, as a reader of the written checkpoint would describe it."""
        n, k = self.index[f"{module}.weight"].shape
        fmt = self._layout.input(dtype_name(self.config.dtype))
        return LinearFormat(module, n, k, self._layout.stored, input=fmt, bias=f"{module}.bias" in self.index)

    def read(self, module: str) -> LinearSpec:
        """Read and quantize one module."""
        fmt = self._layout.input(dtype_name(self.config.dtype))
        bias = None
        if f"{module}.bias" in self.index:
            bias = self.index.read(f"{module}.bias").float()
            checks.finite(self.index, f"{module}.bias", bias)
        weight = quantize_weight(self.index, module, self._layout)
        return LinearSpec(weight, input=None if fmt is None else Operand(fmt), bias=bias, name=module)

    def tensors(self, module: str) -> Sequence[str]:
        """The weight and a bias."""
        return [f"{module}.{leaf}" for leaf in ("weight", "bias") if f"{module}.{leaf}" in self.index]


def quantizing_mapping(
    config: CheckpointConfig, index: TensorIndex, quantize: str | Format, ignore: Sequence[str] = ("lm_head",)
) -> QuantizingMapping:
    """A float checkpoint, quantized on the way in; see `resolve_format` for the names."""
    return QuantizingMapping(config, index, resolve_format(quantize, config.dtype), ignore)


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
    config, index = CheckpointConfig.read(source), TensorIndex.open(source)
    layout = resolve_format(format, config.dtype)
    choice = choose(config, index, layout, ignore)
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
                        target.write(name, index.read(name))
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
