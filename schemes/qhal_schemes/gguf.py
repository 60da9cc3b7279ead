"""GGUF: one file (or its splits) with a type for every tensor, and metadata in the place of config.json.

Weights of blocks (Q4_0 to Q8_0, Q2_K to Q6_K, TQ1_0, TQ2_0, IQ4_NL, IQ4_XS, MXFP4) are quantized modules, F32, F16 and
BF16 ones plain. Tensors have transformers' names, experts one each, rows of Q and K the order of transformers
(`gguf_names.py`). A quantized embedding is listed too: where the file has no lm_head, it is the head. Inputs are not
quantized; llama.cpp rounds them to Q8 blocks, which belongs to its kernels, not to the file.
Compared with the gguf package on random blocks of every type, and with files that it wrote.
"""

from __future__ import annotations

import mmap
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qhal.errors import CheckpointError
from qhal.layer_formats import LinearFormat
from qhal.specs import LinearSpec
from qhal.tensors import QTensor
from qhal_schemes import checks
from qhal_schemes.base import CheckpointWarning, MappingScheme, SchemeMapping
from qhal_schemes.claims import Claimed
from qhal_schemes.config import CheckpointConfig
from qhal_schemes.evidence import Family
from qhal_schemes.gguf_blocks import TYPES, format_of, size_of, unpack
from qhal_schemes.gguf_file import GGUFHeader, read_gguf
from qhal_schemes.gguf_names import Names, stacks_experts
from qhal_schemes.matching import near_text
from qhal_schemes.modules import ModuleTable
from qhal_schemes.source import DTYPES, WIDE, TensorEntry, TensorIndex

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, eq=False)
class GGUFIndex(TensorIndex):
    """Tensors under their names in the model. The dtype of a quantized one is its GGML type, its shape [N, K]; reading
    gives the bytes of its rows, uint8 [N, bytes]. Rows of Q and K come in the model's order, plain ones and biases too.

    orders  row i of a tensor is row orders[name][i] of the file
    """

    orders: dict[str, Tensor] = field(default_factory=dict)

    def read_all(self, names: Sequence[str], rows: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Several tensors; only their bytes are read. rows: (first, count) of the first axis."""
        return {name: self._read(name, rows) for name in names}

    def _read(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        if name not in self.entries:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        entry, order = self.entries[name], self.orders.get(name)
        lines = entry.shape[0]
        first, count = (0, lines) if rows is None or order is not None else rows
        line = entry.nbytes // lines
        path = self.folder / entry.file  # its own name, never one that a file gives
        try:
            with path.open("rb") as stream:
                raw = _mapped(stream, entry.start + first * line, count * line)
        except OSError as bad:
            raise CheckpointError(f"{path}: {name} cannot be read: {bad.strerror}") from None
        except ValueError:  # longer than the file
            cut = "the file was cut since the checkpoint was opened"
            raise CheckpointError(f"{path}: {name} cannot be read: {cut}") from None
        if entry.dtype in DTYPES:
            tensor = raw.view(DTYPES[entry.dtype]).reshape(count, *entry.shape[1:])
        else:
            tensor = raw.reshape(count, *entry.shape[1:-1], -1)
        if order is None:
            return tensor
        return tensor[order if rows is None else order[rows[0] : sum(rows)]]


def _mapped(stream: BinaryIO, start: int, size: int) -> Tensor:
    """Bytes of a file, read when they are used, as safetensors does; what is written to them stays in memory."""
    page = start % mmap.ALLOCATIONGRANULARITY
    view = mmap.mmap(stream.fileno(), page + size, access=mmap.ACCESS_COPY, offset=start - page)
    return torch.frombuffer(view, dtype=torch.uint8, offset=page)


class GGUFMapping(SchemeMapping):
    """A GGUF file: whatever is stored in blocks is quantized."""

    def __init__(self, config: CheckpointConfig, index: TensorIndex) -> None:
        super().__init__(config, index)
        if not isinstance(index, GGUFIndex):
            raise config.bad("quant_method", "another method: the weights of this folder are no GGUF file", "gguf")
        why = config.quantization.get("names")
        if why:
            warnings.warn(
                f"{config.folder / config.file}: {why}; names and rows stay as they are in the file, where Q and K may "
                f"have another order than in the original model",
                CheckpointWarning,
                stacklevel=2,
            )
        blocks = {name: entry for name, entry in index.items() if entry.dtype not in DTYPES}
        odd = next((e for name, e in blocks.items() if not name.endswith(".weight") or len(e.shape) != 2), None)
        if odd is not None:
            raise CheckpointError(
                f"unsupported: {index.folder / odd.file}: {odd.name} is {odd.dtype} {list(odd.shape)}; of tensors in "
                f"blocks, weights with two axes can be read"
            )
        self._modules = {name.removesuffix(".weight"): entry for name, entry in blocks.items()}
        table = ModuleTable(index)
        self._excluded = {m: f"the file stores it as {table[m]['weight'].dtype}" for m in table.plain_linears()}

    @property
    def modules(self) -> Sequence[str]:
        """Modules with a weight in blocks, embeddings too."""
        return tuple(self._modules)

    @property
    def excluded(self) -> Mapping[str, str]:
        """Linear modules with a weight of plain numbers."""
        return self._excluded

    def layout(self, module: str) -> str:
        """The GGML type."""
        return self._modules[module].dtype

    def tensors(self, module: str) -> Sequence[str]:
        """The weight and a bias."""
        return [f"{module}.weight", *([f"{module}.bias"] if f"{module}.bias" in self.index else [])]

    def describe(self, module: str) -> LinearFormat:
        """The format, from the type and the shape."""
        entry = self._modules[module]
        bias = f"{module}.bias" in self.index
        if bias:
            self.index.expect(f"{module}.bias", tuple(WIDE), (entry.shape[0],))
        return LinearFormat(module, entry.shape[0], entry.shape[1], format_of(entry.dtype), bias=bias)

    def read(self, module: str) -> LinearSpec:
        """Unpack the blocks; scales and minima must be finite."""
        entry = self._modules[module]
        t = self.index.read_all(self.tensors(module))
        weight, bias = unpack(entry.dtype, t[entry.name]), t.get(f"{module}.bias")
        self._check(entry, weight)
        if bias is not None:
            checks.finite(self.index, f"{module}.bias", bias)
        return LinearSpec(weight, bias=None if bias is None else bias.float(), name=module)

    def _check(self, entry: TensorEntry, weight: QTensor) -> None:
        for name, plane in weight.planes().items():
            if plane.dtype == torch.float16 or (entry.dtype == "MXFP4" and name == "scale"):
                checks.scales(self.index, entry.name, plane, zero_ok=True)
        if entry.dtype == "TQ2_0" and int(weight.codes.amax()) > 1:
            raise self.index.bad(entry.name, "TQ2_0 codes 0 to 2", f"{int((weight.codes > 1).sum())} codes of 3")


def claim(files: Sequence[Path], model: Mapping[str, Any]) -> Claimed | None:
    """A GGUF file, or a folder of one (or of its splits) that has no other weights."""
    if model and any(files[0].parent.glob("*.safetensors")):
        return None  # a copy beside a model's own weights; it opens by its own path
    headers = [read_gguf(path) for path in _splits(files)]
    for i, header in enumerate(headers):
        said = [header.metadata.get(key, default) for key, default in (("split.no", 0), ("split.count", 0))]
        if said != [i, len(headers)] and (len(headers) > 1 or said[1] not in (0, 1)):
            raise header.bad("split.no, split.count", f"{i} and {len(headers)}, as its name says", said)
    first = replace(headers[0], tensors={})
    for header in headers:
        for name, entry in header.tensors.items():
            if name in first.tensors:
                raise CheckpointError(f"{header.path}: tensor {name} is duplicated, in {first.tensors[name].file} too")
            first.tensors[name] = entry
    total = first.metadata.get("split.tensors.count")
    if len(headers) > 1 and total != len(first.tensors):
        raise first.bad("split.tensors.count", f"{len(first.tensors)}, the tensors of all splits", total)
    names = Names.of(first)
    index = _index(first, names)
    section = {"quant_method": "gguf", "architecture": first.metadata["general.architecture"], "names": names.why}
    return Claimed("gguf", section, first.path.name, None if model else names.config(), lambda path: index)


def _splits(files: Sequence[Path]) -> list[Path]:
    """The files of one model: a single one, or all splits of a set, of which one may stand for all."""
    found = _SPLIT.match(files[0].name)
    if found is None and len(files) == 1:
        return [files[0]]
    count = int(found[3]) if found else 0
    parts = [files[0].with_name(f"{found[1]}-{i + 1:05d}-of-{found[3]}.gguf") for i in range(count)] if found else []
    if not set(files) <= set(parts):
        names = ", ".join(path.name for path in files[:4])
        raise CheckpointError(f"{files[0].parent}: {len(files)} GGUF files ({names}); open one of them by its own path")
    return parts


def _index(header: GGUFHeader, names: Names) -> GGUFIndex:
    """The tensors of the file under the model's names; those of several experts cut into one each."""
    entries: dict[str, TensorEntry] = {}
    orders: dict[str, Tensor] = {}
    for stored, entry in header.tensors.items():
        name = names.of_tensor(stored)
        if name is None:
            raise CheckpointError(
                f"unsupported: {header.path}: tensor {stored} is none of the architecture "
                f"{header.metadata['general.architecture']!r}{near_text(stored, list(header.tensors)[:2000])}"
            )
        order = names.row_order(stored, entry.shape[0])
        for new in _cut(stored, name, entry):
            if new.name in entries:
                raise CheckpointError(f"{header.path}: tensor {stored} is there twice, under another name too")
            entries[new.name] = new
            if order is not None:
                orders[new.name] = order
    return GGUFIndex(header.path.parent, entries, (), header.path.name, orders)


def _cut(stored: str, name: str, entry: TensorEntry) -> list[TensorEntry]:
    if not stacks_experts(stored):
        if name.endswith("shared_expert_gate.weight") and len(entry.shape) == 1:
            return [entry._replace(name=name, shape=(1, *entry.shape))]  # the file drops the axis of one row
        return [entry._replace(name=name)]
    if len(entry.shape) != 3:
        raise CheckpointError(f"{entry.file}: {stored}: expected [experts, rows, columns], found {list(entry.shape)}")
    count, shape = entry.shape[0], entry.shape[1:]
    size = size_of(entry.dtype, shape)
    starts = [entry.start + e * size for e in range(count)]
    return [
        TensorEntry(name.format(e=e), entry.dtype, shape, entry.file, start, start + size)
        for e, start in enumerate(starts)
    ]


scheme = MappingScheme(
    GGUFMapping,
    Family(
        "GGUF",
        "llama.cpp, gguf 0.19",
        tuple(kind.name for kind in TYPES.values() if kind.planes),
        (
            "the types " + ", ".join(kind.name for kind in TYPES.values() if not kind.readable),
            "big-endian files and version 1",
            "tensors that are none of the architecture",
            "blocks in tensors that are no weights with two axes",
        ),
    ),
)
