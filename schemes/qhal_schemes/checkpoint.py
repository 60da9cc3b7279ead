"""Checkpoint: one quantized model on disk. Opened from its configuration and headers alone, read module by module."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qhal.errors import CheckpointError, ShardError
from qhal.layer_formats import ExpertsFormat, KVFormat, LayerFormat, LinearFormat
from qhal.specs import ExpertsSpec, KVSpec, LinearSpec
from qhal_schemes import experts as expert_modules
from qhal_schemes.allocator import Loading
from qhal_schemes.base import SchemeMapping
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Form, form
from qhal_schemes.experts import Group, Source, StackedExperts
from qhal_schemes.matching import fused_parts, near_text
from qhal_schemes.modules import Account, account
from qhal_schemes.plain import PlainMapping, describe_plain, read_plain
from qhal_schemes.registry import load_scheme
from qhal_schemes.source import TensorEntry
from qhal_schemes.summary import summarize

if TYPE_CHECKING:
    from qhal.interface import QuantOps
    from qhal.prepared import PreparedExperts, PreparedLinear

_LAYER = re.compile(r"(.*?\blayers)\.(\d+)\.")
_TOWERS = re.compile(r"vis|audio|image|encoder|mtp|draft")  # their layers are counted by other keys


def open_checkpoint(path: str | Path, quantize: str | None = None) -> Checkpoint:
    """Open a checkpoint from its JSON files and the headers of its weights; no weight is read, nothing is executed.

    path      a folder, or a single file where a format keeps everything in one
    quantize  the name of a format: a checkpoint without quantization is quantized as its modules are read

    CheckpointError for an unknown quant_method (listing the known ones), files that are missing, corrupt or pickled,
    tensors that are missing, extra or of a wrong shape or dtype, and modules that are neither quantized nor excluded
    by a named rule. What only values can show (NaN scales, group indices) is found when a module is read.
    """
    if not isinstance(path, str | PathLike):
        raise CheckpointError(f"open_checkpoint({path!r}): give the path of a checkpoint")
    folder = Path(path)
    config = CheckpointConfig.read(folder)
    index = config.index(folder)
    if quantize is None:
        mapping = load_scheme(config.method).open(config, index) if config.method else PlainMapping(config, index)
    else:
        if config.method:
            raise CheckpointError(
                f"{folder}: quantize={quantize!r} needs a checkpoint without quantization; this one is {config.method}"
            )
        from qhal_schemes.quantizing import quantizing_mapping

        mapping = quantizing_mapping(config, index, quantize)
    return Checkpoint(mapping)


class Checkpoint:
    """An opened checkpoint. Module names are those of the file; every method that takes one explains a wrong one."""

    def __init__(self, mapping: SchemeMapping) -> None:
        self._mapping = mapping
        self._index = mapping.index
        self._loading = Loading()
        self._formats: dict[str, LinearFormat] = {m: mapping.describe(m) for m in mapping.modules}
        empty = next((f for f in self._formats.values() if f.n < 1 or f.k < 1), None)
        if empty is not None:
            raise CheckpointError(
                f"{self.path}: {empty.name}: a quantized weight of shape [{empty.n}, {empty.k}] is empty"
            )
        self._account: Account = account(mapping)
        self._plain = {m: describe_plain(self._index, m) for m in mapping.excluded}
        self._stacked = {m: group.count for group in mapping.stacked.values() for m in group.modules()}
        place = {name: i for i, name in enumerate(self._index)}
        order = {name.rpartition(".")[0]: i for name, i in reversed(place.items())}
        order |= {m: min(place[name] for name in mapping.tensors(m)) for m in self._stacked}
        last = len(self._index)
        self._all = {**dict.fromkeys(sorted([*self._formats, *self._plain], key=lambda m: order.get(m, last)), None)}
        self._check_layers()
        self._groups: dict[str, Group] = {**expert_modules.find_groups(self._all), **mapping.stacked}

    # ---------------------------------------------------------------- what it is

    @property
    def path(self) -> Path:
        """The folder."""
        return self._index.folder

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        return self._mapping.config.model

    @property
    def method(self) -> str:
        """The quant_method, "" for a checkpoint without quantization."""
        return self._mapping.config.method

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's activations."""
        return self._mapping.config.dtype

    @property
    def weights_file(self) -> str:
        """The file of the folder that leads to the weights: an index of shards, or the one weight file."""
        return self._index.source

    def modules(self, *, quantized: bool | None = None) -> tuple[str, ...]:
        """Every Linear module in the order of the file; only the quantized or only the plain ones if asked."""
        return tuple(m for m in self._all if quantized is None or (m in self._formats) == quantized)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Plain Linear modules and the named rule that keeps each of them plain."""
        return self._mapping.excluded

    @property
    def account(self) -> Account:
        """Where every tensor of the files went."""
        return self._account

    @property
    def stacked(self) -> Mapping[str, StackedExperts]:
        """Experts that the file holds in two stacked modules, by the prefix that `load_experts` takes."""
        return self._mapping.stacked

    def format(self, name: str) -> LinearFormat:
        """The format of a Linear module, or of one expert of a stacked one; reads no data."""
        self._known(name)
        return self._formats.get(name) or self._plain[name]

    def form(self, name: str) -> Form:
        """The form of a quantized module: layout and arithmetic, what evidence is about."""
        self._known(name)
        if name not in self._formats:
            raise CheckpointError(f"{self.path}: {name} is not quantized: {self.excluded[name]}")
        return form(self._formats[name], self._mapping.layout(name))

    def compared(self, name: str) -> bool:
        """Whether modules of the form of `name` were compared with what the form's own tool computes."""
        self._known(name)
        return name not in self._formats or self._mapping.compared(name)

    def layer_formats(self) -> list[LayerFormat]:
        """Every quantized layer, in the order of the file: linears, expert groups (stacked), caches.

        Plain layers are not here: an engine runs those by itself. `format` describes them too.
        """
        found: list[LayerFormat] = []
        grouped = {m: g for g in self._groups.values() for m in g.modules()}
        seen: set[str] = set()
        for module in self._all:
            group = grouped.get(module)
            if not self.format(module).quantized:
                continue
            if group is None:
                found.append(self.format(module))
            elif group.prefix not in seen:
                seen.add(group.prefix)
                found.append(self.experts_format(group.prefix))
        return [*found, *self.kv_formats().values()]

    def kv_formats(self) -> dict[int, KVFormat]:
        """The cache format of every layer whose cache the checkpoint quantizes, by layer number; reads no data."""
        found = ((layer, self._mapping.kv_format(layer)) for layer in self._mapping.kv_layers)
        return {layer: f for layer, f in found if f is not None}

    # ---------------------------------------------------------------- reading

    def tensor(self, name: str) -> Tensor:
        """One tensor of the file as it is stored."""
        return self._index.read(self.entry(name).name)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Every tensor of the files, in their order."""
        return tuple(self._index)

    @property
    def kv_layers(self) -> Mapping[int, str]:
        """Layers with a quantized cache: layer number -> attention module."""
        return self._mapping.kv_layers

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place of one tensor of the file; reads no data."""
        if name not in self._index:
            raise CheckpointError(f"{self.path}: no tensor {name!r}{near_text(name, self._index)}")
        return self._index[name]

    def spec(self, name: str) -> LinearSpec:
        """What the checkpoint says a Linear module is, its tensors read and checked. Stacked experts: [E, N, K]."""
        self._known(name)
        if name not in self._formats:
            return read_plain(self._index, name)
        if name in self._stacked:
            return self._checked(name, self._mapping.read_experts(name, 0, self._stacked[name]))
        return self._checked(name, self._mapping.read(name))

    def _checked(self, name: str, spec: LinearSpec) -> LinearSpec:
        described = self._formats[name]
        if described.clip and not spec.format.clip:  # a ratio that turns out to be 1 clips nothing
            described = replace(described, clip=False)
        if spec.format != described:
            raise CheckpointError(
                f"{self.path}: {name}: the scheme {self.method!r} described {described} but read "
                f"{spec.format}; this is a bug of the scheme"
            )
        return spec

    def dequantize(self, name: str) -> Tensor:
        """float32 [out, in], the effective weight: y = x @ w.T (+ bias) before activation quantization.

        Stacked experts: [E, out, in], rows in the order of the file. Every online rotation, pre-scale and low-rank
        branch is folded in (in float64, rounded once).
        """
        return self.spec(name).effective()

    def stored(self, name: str) -> Tensor:
        """float32 [out, in], the weight as stored, in its rotated or scaled basis."""
        return self.spec(name).stored()

    def linear_spec(self, names: str | Sequence[str], shard: tuple[int, int, int] | None = None) -> LinearSpec:
        """The spec of a module, or of several fused along their outputs; shard = (dim, rank, world).

        A fused name that the file does not have (`qkv_proj`) stands for its parts. Each part is cut before they are
        joined, so that every rank holds its own slice of each projection.
        """
        if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise CheckpointError(f"{self.path}: {names!r}: give a module's name, or a list of names to fuse")
        wanted = [names] if isinstance(names, str) else list(names)
        parts = [p for name in wanted for p in self._parts(name)]
        if not parts:
            raise CheckpointError(f"{self.path}: no module names were given")
        for part in parts:
            if part in self._stacked:
                prefix = next(p for p, g in self._groups.items() if part in g.modules())
                raise CheckpointError(
                    f"{self.path}: {part} holds {self._stacked[part]} experts and is no single layer; "
                    f"use load_experts({prefix!r})"
                )
        specs = [self.spec(part) for part in parts]
        if shard is not None:
            if not isinstance(shard, tuple) or [type(n) for n in shard] != [int, int, int] or shard[0] not in (0, 1):
                raise ShardError(f"shard={shard!r}: give (dim, rank, world), dim 0 for rows or 1 for columns")
            dim, rank, world = shard
            specs = [spec.shard(dim, rank, world) for spec in specs]
        return LinearSpec.concat(specs)

    def load_linear(
        self,
        names: str | Sequence[str],
        ops: QuantOps,
        shard: tuple[int, int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> PreparedLinear:
        """A layer on `ops`: rotations, activation quantization and bias included. dtype: of x, default the model's."""
        from qhal.layers import prepare_linear

        layer = prepare_linear(self.linear_spec(names, shard), ops, dtype=dtype or self.dtype)
        self._loading.add(layer.nbytes)
        return layer

    def experts_format(self, prefix: str) -> ExpertsFormat:
        """The format of the experts under `prefix`, a module each or stacked in the file; reads no data."""
        return expert_modules.describe_group(self._group(prefix), self._source())

    def experts_spec(self, prefix: str, experts: range | tuple[int, int] | None = None) -> ExpertsSpec:
        """Experts stacked: [E, 2I, K] gate rows first, [E, K, I]. experts: range or (first, count), default all."""
        group = self._group(prefix)
        if isinstance(experts, range) and experts.step == 1:
            experts = (experts.start, len(experts))
        pair = (0, group.count) if experts is None else experts
        if not isinstance(pair, tuple) or [type(n) for n in pair] != [int, int]:
            raise CheckpointError(f"{prefix}: experts={experts!r}: give a range of step 1, or (first, count)")
        first, count = pair
        return expert_modules.read_group(group, self._source(), first, count)

    def load_experts(
        self,
        prefix: str,
        ops: QuantOps,
        experts: range | tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        **groups: Any,
    ) -> PreparedExperts:
        """The experts of one layer on `ops`. experts: range or (first, count) for expert parallelism.

        groups: `groups` and `top_k` as in `qhal.layers.expert_requests`.
        """
        from qhal.layers import prepare_experts

        layer = prepare_experts(self.experts_spec(prefix, experts), ops, dtype=dtype or self.dtype, **groups)
        self._loading.add(layer.nbytes)
        return layer

    def kv_format(self, layer: int) -> KVSpec | None:
        """How the cache of a layer is quantized, static scales read; None: the checkpoint does not quantize it."""
        count = self._mapping.config.value("num_hidden_layers")
        if type(layer) is not int or layer < 0 or (type(count) is int and layer >= count):
            raise CheckpointError(f"{self.path}: no layer {layer!r}; layers are 0..{count - 1 if count else '?'}")
        return self._mapping.kv(layer)

    # ---------------------------------------------------------------- accounts

    def summary(self) -> dict[str, Any]:
        """JSON-able account: method, formats with counts and bytes, excluded modules and rules, cache, totals."""
        return summarize(self._mapping, self._formats, self._account, self._groups)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {self.method or 'no'} quantization, {len(self._formats)} quantized modules>"

    def _parts(self, name: str) -> Sequence[str]:
        parts = fused_parts(name)
        return parts if name not in self._all and parts and all(p in self._all for p in parts) else (name,)

    def _known(self, name: str) -> None:
        if name in self._all:
            return
        near = difflib.get_close_matches(name, list(self._all)[:5000], 3, 0.6)
        text = f" (near: {', '.join(near)})" if near else near_text(name, self._all)
        raise CheckpointError(f"{self.path}: no Linear module {name!r}{text}; it has {len(self._all)}")

    def _source(self) -> Source:
        def read_range(name: str, first: int, count: int) -> LinearSpec:
            return self._checked(name, self._mapping.read_experts(name, first, count))

        return Source(self._mapping.config, self.format, self.spec, read_range)

    def _group(self, prefix: str) -> Group:
        if prefix not in self._groups:
            known = ", ".join(list(self._groups)[:3]) or "none"
            raise CheckpointError(
                f"{self.path}: no experts {prefix!r}; expected <prefix>.<e>.gate_proj and so on, found {known}"
            )
        return self._groups[prefix]

    def _check_layers(self) -> None:
        """Every decoder layer that config.json counts must have tensors."""
        count = self._mapping.config.value("num_hidden_layers")
        present: dict[str, set[int]] = {}
        for name in self._index:
            match = _LAYER.match(name)
            if match and not _TOWERS.search(match[1]):
                present.setdefault(match[1], set()).add(int(match[2]))
        if type(count) is not int or not present:
            return
        prefix = max(present, key=lambda p: len(present[p]))
        missing = list(islice((i for i in range(count) if i not in present[prefix]), 8))
        if missing:
            raise CheckpointError(
                f"{self.path}: config.json counts {count} layers, but {prefix} has no tensor of layer "
                f"{', '.join(map(str, missing))}"
            )
