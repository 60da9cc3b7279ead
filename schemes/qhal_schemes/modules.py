"""ModuleTable: the tensors of an index by module, and the account of those that no quantized module consumes.

Every tensor is consumed, belongs to a plain module, or is a named leftover; anything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from qhal.errors import CheckpointError
from qhal_schemes.base import SchemeMapping
from qhal_schemes.matching import LINEAR, module_class
from qhal_schemes.source import WIDE, TensorEntry, TensorIndex

QUANTIZED_SUFFIXES = frozenset({
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_shape",
    "weight_g_idx", "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "input_offset",
    "qweight", "qzeros", "g_idx", "compressed", "bitmask", "row_offsets", "scale_packed", "meta", "weight_offset",
    "deq_scale", "quant_bias", "absmax", "quant_map", "SCB", "Qidxs", "pre_quant_scale",
})  # fmt: skip
"""Tensor names that only quantized modules have: one that nothing consumes is a mistake, never a leftover."""

_CODES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "I32"})
_CACHE = frozenset({"k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point"})
_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.position_ids|num_batches_tracked)$")


class ModuleTable(Mapping[str, dict[str, TensorEntry]]):
    """module -> {last part of the tensor's name: entry}, in the order of the file."""

    def __init__(self, index: TensorIndex) -> None:
        self._table: dict[str, dict[str, TensorEntry]] = {}
        for name, entry in index.entries.items():
            module, _, leaf = name.rpartition(".")
            if module:  # a parameter of the model itself belongs to no module
                self._table.setdefault(module, {})[leaf] = entry

    def __getitem__(self, module: str) -> dict[str, TensorEntry]:
        return self._table[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def having(self, suffixes: Iterable[str]) -> list[str]:
        """Modules with at least one tensor of these names."""
        wanted = frozenset(suffixes)
        return [m for m, tensors in self._table.items() if not wanted.isdisjoint(tensors)]

    def plain_linears(self) -> list[str]:
        """Modules with a plain 2-D weight that are no embedding."""
        return [m for m, t in self._table.items() if is_plain(t) and module_class(m) == LINEAR]


def is_plain(tensors: Mapping[str, TensorEntry]) -> bool:
    """Whether a module holds a 2-D weight of plain floats."""
    weight = tensors.get("weight")
    return weight is not None and len(weight.shape) == 2 and weight.dtype in WIDE


UNCLAIMED_SCALE = "a cache scale, but the configuration quantizes no cache"


@dataclass(frozen=True)
class Account:
    """Where every tensor of a checkpoint went.

    consumed  tensor -> the quantized module or cache that reads it (the first, where several share it)
    plain     tensors of modules that are not quantized
    extra     tensor -> why nothing needs it
    """

    consumed: dict[str, str] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)


def account(mapping: SchemeMapping) -> Account:
    """Place every tensor of the index; CheckpointError for one that looks quantized and is read by nothing, and for a
    plain Linear module that no rule excludes."""
    index, result = mapping.index, Account()
    quantized = set(mapping.modules)
    for module in mapping.modules:
        for name in mapping.tensors(module):
            result.consumed.setdefault(name, module)
    for layer, module in mapping.kv_layers.items():
        for name in mapping.kv_tensors(layer):
            result.consumed.setdefault(name, module)
    for name, entry in index.entries.items():
        if name in result.consumed:
            continue
        module, _, leaf = name.rpartition(".")
        owner = next((m for m in _ancestors(module) if m in quantized or m in result.consumed), None)
        if owner is not None:
            owner = result.consumed.get(owner, owner)
            raise CheckpointError(
                f"{index.folder / entry.file}: tensor {name} is extra: {mapping.config.method or 'a float model'} has "
                f"{', '.join(n.rpartition('.')[2] for n in mapping.tensors(owner))} of the quantized module {owner}"
            )
        if leaf in _CACHE:
            result.extra[name] = UNCLAIMED_SCALE
            continue
        if leaf in QUANTIZED_SUFFIXES or (entry.dtype in _CODES and (leaf == "weight" or entry.dtype != "I32")):
            why = mapping.excluded.get(module)
            reader = f"no module that {mapping.config.method} reads"
            reader = reader if mapping.config.method else "the checkpoint has no quantization section"
            rule = f"{module} is excluded by {why}" if why else reader
            raise CheckpointError(
                f"{index.folder / entry.file}: tensor {name} ({entry.dtype} {list(entry.shape)}) is extra: it looks "
                f"quantized, but {rule}"
            )
        if _BUFFERS.match(name):
            result.extra[name] = "a buffer that the model computes itself"
        else:
            if leaf == "weight" and module and module not in mapping.excluded and _is_linear(module, entry):
                raise CheckpointError(
                    f"{index.folder / entry.file}: {module}: a Linear module with a plain weight, but the scheme "
                    f"{mapping.config.method!r} neither quantizes it nor names a rule that excludes it: a bug "
                    "of the scheme"
                )
            result.plain.append(name)
    return result


def _is_linear(module: str, weight: TensorEntry) -> bool:
    return is_plain({"weight": weight}) and module_class(module) == LINEAR


def _ancestors(module: str) -> Iterable[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]
