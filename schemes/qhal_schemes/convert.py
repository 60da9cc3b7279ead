"""convert: a checkpoint of any readable format written in another one, without a changed number or with the loss named.

Every quantized module is read as a LinearSpec and its weight is recoded (`qhal.recoding`) to the format that the target
would hold it in. What cannot be recoded, and what the target's files cannot say (a quantized input, a cache), is a
loss. Without `lossy` every loss of the whole model is listed and nothing is written; with it, weights are quantized
again from their decoded values by the target's usual rule, and the result tells how far each one moved. Asking for a
plain float type is asking for its rounding: there the weights' rounding is measured but is no reason to refuse.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhal.elements import WIDE
from qhal.encoding import encode
from qhal.errors import CheckpointError, FormatError
from qhal.layer_formats import KVFormat
from qhal.recoding import recode
from qhal.specs import LinearSpec
from qhal.tensors import QTensor
from qhal_schemes import claims
from qhal_schemes.attention import attention_layers
from qhal_schemes.awq_writer import AWQTarget
from qhal_schemes.checkpoint import Checkpoint, open_checkpoint
from qhal_schemes.compressed_tensors_target import CompressedTensorsTarget
from qhal_schemes.float_target import BF16Target, FloatTarget, FP16Target, FP32Target
from qhal_schemes.folder_writing import SHARD_BYTES, nbytes, write_folder
from qhal_schemes.gptq_writer import GPTQTarget
from qhal_schemes.losses import Change, Losses
from qhal_schemes.modelopt_target import ModelOptTarget
from qhal_schemes.modules import UNCLAIMED_SCALE
from qhal_schemes.quark_target import QuarkTarget
from qhal_schemes.target import Goal, Layer, Target
from qhal_schemes.writing import TensorLayout, layout_of

Progress = Callable[[int, int, str], None]

TARGETS: dict[str, type[Target]] = {
    t.name: t
    for t in (
        CompressedTensorsTarget,
        GPTQTarget,
        AWQTarget,
        ModelOptTarget,
        QuarkTarget,
        BF16Target,
        FP16Target,
        FP32Target,
    )
}
"""Every format that can be written, by the word after `--to`."""

_SIDE = ("quantization_config.json", "hf_quant_config.json", "recipe.yaml")
"""What says how the source was quantized, beside the files that claims look at."""


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    lossy: bool = False,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write `source` as a checkpoint of the format `to` (a key of TARGETS); returns a JSON-able summary.

    One module is in memory at a time; `out` appears whole or not at all. CheckpointError listing every loss if there
    is one and `lossy` is false, and every module that the target cannot hold at all.
    """
    if to not in TARGETS:
        raise FormatError(f"target {to!r}: choose one of {', '.join(TARGETS)}")
    ckpt = open_checkpoint(source)
    if not ckpt.modules(quantized=True):
        raise CheckpointError(f"{ckpt.path}: nothing is quantized; `qhal quantize` quantizes a float checkpoint")
    dtype = WIDE.get(to, ckpt.dtype)
    target = TARGETS[to](dtype)
    losses = Losses()
    layers = _layers(ckpt, target, losses)
    cache = _cache(ckpt, target, losses)
    if losses.found and not lossy:
        raise losses.error(ckpt.path, to, fatal=False)
    try:
        written = target.written(list(layers.values()), ckpt.excluded, cache)
    except FormatError as bad:
        raise CheckpointError(f"{ckpt.path} cannot be written as {to}; nothing was written: {bad}") from None
    units = _units(ckpt, target, layers, cache)
    changes: dict[tuple[str, str], Change] = {}
    done = 0

    def make(unit: str) -> Mapping[str, Tensor]:
        nonlocal done
        if unit not in layers:
            return _copied(ckpt, target, unit, cache)
        layer = layers[unit]
        made = _module(ckpt, target, layer, lossy, changes)
        done += 1
        if progress is not None:
            progress(done, len(layers), unit)
        return {layer.name(leaf): t for leaf, t in made.items()}

    files, left = write_folder(
        Path(source),
        Path(out),
        units,
        make,
        written.section,
        model=_model(ckpt, dtype),
        files=written.files,
        leave=(*_SIDE, *claims.side_files(ckpt.path)),
        shard_bytes=shard_bytes,
    )
    return {
        "out": str(out),
        "from": ckpt.method,
        "to": to,
        "exact": not losses.found and all(c.exact for c in changes.values()),
        "losses": losses.lines(),
        "changes": [c.record() for c in changes.values()],
        "modules": len(layers),
        "files": files,
        "left": [*left, *(name for name in ckpt.account.extra if name not in units)],
        "bytes": nbytes(units),
        "source_bytes": sum(ckpt.entry(name).nbytes for name in ckpt.tensor_names),
    }


def _layers(ckpt: Checkpoint, target: Target, losses: Losses) -> dict[str, Layer]:
    """Every quantized module with its goal; CheckpointError listing those that have none."""
    found: dict[str, Layer] = {}
    fatal = Losses()
    stacked = {module: g.count for g in ckpt.stacked.values() for module in g.modules()}
    for module in ckpt.modules(quantized=True):
        f = ckpt.format(module)
        try:
            if module in stacked and ckpt.config.get("model_type") not in target.stacks:
                raise FormatError(f"{target.name} files have a module for every expert, here a layer's are stacked")
            layer = Layer(module, f, target.goal(f), stacked.get(module, 0))
            target.layout(layer)
        except FormatError as bad:
            fatal.add(str(bad), module)
            continue
        for text in layer.goal.losses:
            losses.add(text, module)
        found[module] = layer
    if fatal.found:
        raise fatal.error(ckpt.path, target.name, fatal=True)
    return found


def _cache(ckpt: Checkpoint, target: Target, losses: Losses) -> KVFormat | None:
    """The cache format of all layers, None if there is none or the target cannot say it."""
    formats = {f for f in ckpt.layer_formats() if isinstance(f, KVFormat)}
    kinds = {replace(f, name="") for f in formats}
    if not kinds:
        return None
    try:
        if len(kinds) > 1:
            raise FormatError(f"layers have {len(kinds)} cache formats; one can be written")
        attention = attention_layers(ckpt.tensor_names)
        plain = sorted(attention.keys() - ckpt.kv_layers.keys())
        if plain:
            raise FormatError(f"the caches of layers {plain} are plain; a file has one setting for all")
        unknown = [module for layer, module in ckpt.kv_layers.items() if attention.get(layer) != module]
        if unknown:
            raise FormatError(f"{unknown[0]} is none of the attention modules whose caches files name")
        cache = kinds.pop()
        quantized = set(ckpt.modules(quantized=True))
        names = (f"{module}.{part}_proj" for module in attention.values() for part in "kv")
        target.cache_goal(cache, {name: name in quantized for name in names})
        return cache
    except FormatError as bad:
        losses.add(str(bad), next(iter(formats)).name)
        return None


def _units(
    ckpt: Checkpoint, target: Target, layers: Mapping[str, Layer], cache: KVFormat | None
) -> dict[str, dict[str, TensorLayout]]:
    """Plain tensors by name, quantized modules and caches by module, in the order of the source."""
    units: dict[str, dict[str, TensorLayout]] = {}
    consumed = ckpt.account.consumed
    for name in ckpt.tensor_names:
        owner = consumed.get(name, "")
        if owner in layers and owner not in units:
            layer = layers[owner]
            units[owner] = {layer.name(leaf): t for leaf, t in target.layout(layer).items()}
        elif not owner and ckpt.account.extra.get(name) != UNCLAIMED_SCALE:
            entry = ckpt.entry(name)
            units[name] = {name: TensorLayout(entry.dtype, entry.shape)}
    for module, layer_number in (_cache_modules(ckpt) if cache is not None else {}).items():
        spec = ckpt.kv_format(layer_number)
        assert spec is not None
        units[module] = {n: layout_of(t) for n, t in target.cache_tensors(module, spec).items()}
    return units


def _copied(ckpt: Checkpoint, target: Target, unit: str, cache: KVFormat | None) -> dict[str, Tensor]:
    """A plain tensor as it is, or the scales of an attention module's cache."""
    caches = _cache_modules(ckpt) if cache is not None else {}
    if unit not in caches:
        return {unit: ckpt.tensor(unit)}
    spec = ckpt.kv_format(caches[unit])
    assert spec is not None
    return target.cache_tensors(unit, spec)


def _module(
    ckpt: Checkpoint, target: Target, layer: Layer, lossy: bool, changes: dict[tuple[str, str], Change]
) -> dict[str, Tensor]:
    spec = ckpt.spec(layer.module)
    pair = str(layer.format.weight), str(layer.goal.weight.storage)
    change = changes.setdefault(pair, Change(*pair))
    change.modules += 1
    if isinstance(target, FloatTarget):
        before = spec.effective()
        rounded = before.to(target.dtype)
        weight: QTensor | Tensor = rounded
        change.add(before, rounded.float())
        change.exact = change.exact and change.max_abs == 0
    else:
        weight = _weight(ckpt, spec, layer, lossy, change)
        scale = weight.scale
        if isinstance(scale, Tensor) and scale.dtype.itemsize > 1 and bool((scale == 0).any()):
            raise CheckpointError(
                f"{ckpt.path}: {layer.module}: has scales of 0, which {target.name} files may not have; nothing was "
                "written\n  do: --to bf16 writes its zeros"
            )
    kept = spec.bias is None or torch.equal(spec.bias.to(target.dtype).float(), spec.bias)
    if not (kept or lossy or isinstance(target, FloatTarget)):
        raise CheckpointError(
            f"{ckpt.path}: {layer.module}.bias: {target.dtype} does not hold its values; nothing was written\n"
            "  do: --lossy (lossy=True) rounds them"
        )
    try:
        return target.tensors(layer, replace(spec, weight=weight))
    except FormatError as bad:
        raise CheckpointError(f"{ckpt.path}: {layer.module}: {bad}; nothing was written") from None


def _weight(ckpt: Checkpoint, spec: LinearSpec, layer: Layer, lossy: bool, change: Change) -> QTensor:
    goal: Goal = layer.goal
    assert isinstance(spec.weight, QTensor)
    try:
        return recode(spec.weight, goal.weight)
    except FormatError as bad:
        if not lossy:
            raise CheckpointError(
                f"{ckpt.path}: {layer.module}: {bad}; nothing was written\n"
                "  do: --lossy (lossy=True) quantizes such weights again and says how far they moved"
            ) from None
        change.exact, change.why = False, str(bad)
    before = spec.weight.dequantize()
    try:
        made = recode(spec.weight, goal.weight, nearly=True)
    except FormatError:
        made = encode(before, goal.weight)
    change.add(before, made.dequantize())
    return made


def _cache_modules(ckpt: Checkpoint) -> dict[str, int]:
    """attention module -> layer, of every quantized cache."""
    return {module: layer for layer, module in ckpt.kv_layers.items()}


def _model(ckpt: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """config.json; where the model's dtype changes, every key that names it says the new one."""
    model = copy.deepcopy(dict(ckpt.config))
    if dtype == ckpt.dtype:
        return model
    text = model.get("text_config")
    keys = ((p, k) for p in (model, text) if isinstance(p, dict) for k in ("dtype", "torch_dtype") if k in p)
    for place, key in list(keys) or [(model, "dtype")]:
        place[key] = str(dtype).removeprefix("torch.")
    return model
