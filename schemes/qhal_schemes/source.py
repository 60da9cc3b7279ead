"""TensorIndex: what a folder of safetensors files holds, known from the headers alone, and read one tensor at a time.

Headers are parsed here, not trusted: a length, an offset or a name that does not fit the file is one CheckpointError.
Pickled weights are never opened. Specification of the file format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qhal.errors import CheckpointError
from qhal_schemes.strict_json import is_file, load_json, parse_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
}  # fmt: skip
"""Every dtype name of a header that torch can hold."""

WIDE = frozenset({"F32", "F16", "BF16"})
"""Plain floats: a tensor of these holds numbers, not codes."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl")
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the reference implementation
_LONGEST_NAME, _MOST_AXES = 1024, 32
_ONE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class TensorEntry(NamedTuple):
    """One tensor of the index: header values, the file that holds it and its bytes' place in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in the file, bytes."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class TensorIndex(Mapping[str, TensorEntry]):
    """Every tensor of a checkpoint by name, in the order of its files. Reading is lazy and per tensor.

    A format with files of another kind derives from this class and overrides `read_all` (see `claims.Claimed.index`).
    """

    folder: Path
    entries: dict[str, TensorEntry]
    unread: tuple[str, ...] = ()
    """weight files of the folder that this index does not name (pickles, copies in other layouts)"""
    source: str = ""
    """the file that was opened: an index of shards, or the one weight file"""
    _handles: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """files that were read from; they stay mapped as long as this index lives"""

    @staticmethod
    def open(folder: Path) -> TensorIndex:
        """Read and check the headers of `model.safetensors`, or of the shards that its index names.

        Where neither is there, any one index (`*.safetensors.index.json`) or one safetensors file will do.
        """
        files, weight_map, source = _files(folder)
        entries: dict[str, TensorEntry] = {}
        for name in files:
            for entry in read_header(inside(folder, name), name):
                if entry.name in entries:
                    first = entries[entry.name].file
                    raise CheckpointError(f"{folder}: tensor {entry.name} is duplicated, in {first} and in {name}")
                entries[entry.name] = entry
        if weight_map is not None:
            _agree(folder / source, weight_map, entries)
        others = [p.name for pattern in ("*.safetensors", *_PICKLED) for p in sorted(folder.glob(pattern))]
        return TensorIndex(folder, entries, tuple(name for name in others if name not in files), source)

    def __getitem__(self, name: str) -> TensorEntry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, name: str) -> Tensor:
        """One tensor; only its own bytes are read. CheckpointError if it is missing or the file changed."""
        return self.read_all((name,))[name]

    def read_all(self, names: Sequence[str], rows: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Several tensors; each file is opened once. rows: (first, count) of their first axis, only these are read."""
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in self.entries:
                raise CheckpointError(f"{self.folder}: tensor {name} is missing")
            entry = self.entries[name]
            try:
                if entry.file not in self._handles:
                    path = inside(self.folder, entry.file)
                    self._handles[entry.file] = safe_open(path, "pt", device="cpu")
                tensor = _part(self._handles[entry.file], name, rows)
            except (SafetensorError, OSError, AttributeError) as bad:
                raise CheckpointError(f"{self.folder / entry.file}: {name} cannot be read: {bad}") from None
            shape = entry.shape if rows is None else (rows[1], *entry.shape[1:])
            if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[entry.dtype]:
                raise CheckpointError(
                    f"{self.folder / entry.file}: {name} changed since the checkpoint was opened: "
                    f"expected {entry.dtype} {list(shape)}, found {tensor.dtype} {list(tensor.shape)}"
                )
            found[name] = tensor
        return found

    def read_ints(self, name: str) -> tuple[int, ...]:
        """The values of an I64 or I32 tensor of at most 8 elements: a shape stored as a tensor counts as metadata."""
        entry = self.entries[name]
        if entry.dtype not in ("I64", "I32") or prod(entry.shape) > 8:
            raise self.bad(name, "a shape (I64 [2])", f"{entry.dtype} {list(entry.shape)}")
        raw = self._metadata_bytes(entry)
        return struct.unpack(f"<{prod(entry.shape)}{'q' if entry.dtype == 'I64' else 'i'}", raw)

    def read_object(self, name: str) -> dict[str, Any]:
        """The JSON object in a U8 tensor of at most 4096 bytes: a description stored as a tensor counts as metadata."""
        entry = self.expect(name, ("U8",), (None,))
        if entry.nbytes > 4096:
            raise self.bad(name, "a JSON object of at most 4096 bytes", f"{entry.nbytes} bytes")
        try:
            value = parse_json(self._metadata_bytes(entry))
        except ValueError as bad:
            raise self.bad(name, "a JSON object", f"no JSON: {bad}") from None
        if not isinstance(value, dict):
            raise self.bad(name, "a JSON object", type(value).__name__)
        return value

    def metadata(self) -> dict[str, str]:
        """The free-form `__metadata__` of the headers, all files together; it is read again, as few formats need it."""
        found: dict[str, str] = {}
        for file in dict.fromkeys(entry.file for entry in self.entries.values()):
            value = _load_header(inside(self.folder, file))[0].get("__metadata__", {})
            if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
                raise CheckpointError(f"{self.folder / file}: __metadata__: expected an object of texts")
            found |= value
        return found

    def _metadata_bytes(self, entry: TensorEntry) -> bytes:
        try:
            with (self.folder / entry.file).open("rb") as f:  # the index checked the path when it was opened
                f.seek(entry.start)
                raw = f.read(entry.nbytes)
        except OSError as bad:
            raise CheckpointError(f"{self.folder / entry.file}: {entry.name} cannot be read: {bad}") from None
        if len(raw) != entry.nbytes:
            raise CheckpointError(f"{self.folder / entry.file}: {entry.name} cannot be read: the file was cut")
        return raw

    def expect(self, name: str, dtypes: Sequence[str], shape: Sequence[int | None]) -> TensorEntry:
        """The entry of a tensor that must be there with one of `dtypes` and this shape (None: any size)."""
        entry = self.entries.get(name)
        if entry is not None and entry.dtype in dtypes and _fits(entry.shape, shape):
            return entry
        wanted = f"{'|'.join(dtypes)} [{', '.join('*' if n is None else str(n) for n in shape)}]"
        if entry is not None:
            raise self.bad(name, wanted, f"{entry.dtype} {list(entry.shape)}")
        module = name.rpartition(".")[0]
        near = [n.rpartition(".")[2] for n in self.entries if n.rpartition(".")[0] == module]
        raise CheckpointError(
            f"{self.folder}: tensor {name} is missing, expected {wanted}; {module} has {', '.join(near) or 'none'}"
        )

    def bad(self, name: str, expected: str, found: str) -> CheckpointError:
        """The error about a tensor: file, name, expected, found."""
        file = self.entries[name].file if name in self.entries else ""
        return CheckpointError(f"{self.folder / file}: {name}: expected {expected}, found {found}")


def read_header(path: Path, file: str) -> list[TensorEntry]:
    """The entries of one safetensors file, in file order; every length and offset is checked against the file."""
    header, length, size = _load_header(path)
    header.pop("__metadata__", None)
    entries = sorted((_entry(path, file, n, e, 8 + length) for n, e in header.items()), key=lambda e: (e.start, e.stop))
    position = 8 + length
    for entry in entries:
        if entry.start != position:
            raise CheckpointError(f"{path}: {entry.name}: corrupt offsets: starts at {entry.start}, not at {position}")
        position = entry.stop
    if position != size:
        state = "truncated" if size < position else "longer than its header says"
        raise CheckpointError(f"{path}: {state}: expected {position} bytes, found {size}")
    return entries


def _load_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON object of a header, its length and that of the file, in bytes."""
    if not is_file(path):  # a pipe would be waited for without end
        raise CheckpointError(f"{path}: is {'no regular file' if path.exists() else 'missing'}")
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 0 < length <= min(size - 8, _HEADER_LIMIT):
                raise CheckpointError(
                    f"{path}: truncated or no safetensors file: {size} bytes, header of {length} bytes"
                )
            raw = f.read(length)
        header = parse_json(raw)
    except OSError as bad:
        raise CheckpointError(f"{path}: cannot be read: {bad.strerror}") from None
    except ValueError as bad:
        raise CheckpointError(f"{path}: corrupt safetensors header: {bad}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: corrupt safetensors header: expected an object")
    return header, length, size


def _entry(path: Path, file: str, name: str, e: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (start, stop) = e["dtype"], tuple(e["shape"]), e["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: {name[:200]!r}: corrupt header entry {str(e)[:80]!r}") from None
    if not (0 < len(name) <= _LONGEST_NAME and name.isprintable() and all(name.split("."))) or len(shape) > _MOST_AXES:
        raise CheckpointError(
            f"{path}: corrupt header entry {name[:200]!r}, a name of {len(name)} characters with {len(shape)} axes: "
            f"expected 1 to {_LONGEST_NAME} printable characters, no empty part and at most {_MOST_AXES} axes"
        )
    if type(dtype) is not str or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name}: unknown dtype {str(dtype)[:80]!r}; known: {', '.join(DTYPES)}")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, stop)):
        raise CheckpointError(f"{path}: {name}: corrupt header entry {str(e)[:200]!r}")
    if stop - start != prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{path}: {name}: {dtype} {list(shape)} needs {prod(shape) * DTYPES[dtype].itemsize} bytes, "
            f"the header gives {stop - start}"
        )
    return TensorEntry(name, dtype, shape, file, base + start, base + stop)


def _files(folder: Path) -> tuple[list[str], dict[str, str] | None, str]:
    """The files to read, for shards the map from tensor to file, and the index that holds it or the one file."""
    indices = sorted(p.name for p in folder.glob("*.safetensors.index.json"))
    if _INDEX_FILE in indices:
        files, weight_map = _indexed(folder, _INDEX_FILE)
        if is_file(folder / _ONE_FILE) and _ONE_FILE not in files:
            raise CheckpointError(f"{folder}: both {_ONE_FILE} and {_INDEX_FILE} are there; remove one set of weights")
        return files, weight_map, _INDEX_FILE
    if is_file(folder / _ONE_FILE):
        return [_ONE_FILE], None, _ONE_FILE
    if len(indices) == 1:
        return *_indexed(folder, indices[0]), indices[0]
    if indices:
        raise CheckpointError(f"{folder}: {' and '.join(indices)} are there; remove the other sets of weights")
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, None, found[0]
    if found:
        raise CheckpointError(
            f"{folder}: {len(found)} safetensors files but no {_INDEX_FILE}; found {', '.join(found)}"
        )
    pickled = sorted(p.name for pattern in _PICKLED for p in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder}: only pickled weights ({', '.join(pickled[:4])}), which can execute code and are never opened; "
            f"convert them to safetensors where you trust them"
        )
    raise CheckpointError(f"{folder}: no weights: expected {_ONE_FILE} or {_INDEX_FILE}")


def _indexed(folder: Path, file: str) -> tuple[list[str], dict[str, str]]:
    """The shards that an index names, in its order, and its map."""
    index = folder / file
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names")
    files = list(dict.fromkeys(weight_map.values()))
    for name in files:
        if not is_file(inside(folder, name)):
            raise CheckpointError(f"{index}: names the file {name}, which is missing")
    return files, weight_map


def inside(folder: Path, name: str) -> Path:
    """The path of a file that an index names; CheckpointError if it leaves the folder, by name or by a link."""
    path = folder / name
    if not name or Path(name).is_absolute() or "\\" in name or "\0" in name or ".." in Path(name).parts:
        raise CheckpointError(f"{folder}: file name {name!r} leads outside the checkpoint's folder")
    allowed = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":  # the hub's cache links every file of a snapshot to its blobs
        allowed.append(folder.absolute().parent.parent.resolve() / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as bad:  # a loop of links, a name that no file can have
        raise CheckpointError(f"{folder}: file name {name[:200]!r} cannot be followed: {bad}") from None
    if not any(target.is_relative_to(root) for root in allowed):
        raise CheckpointError(f"{folder}: {name} is a link to {target}, outside the checkpoint's folder")
    return path


def _agree(index: Path, weight_map: dict[str, str], entries: dict[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        entry = entries.get(name)
        if entry is None or entry.file != file:
            where = "no shard has it" if entry is None else f"{entry.file} has it"
            raise CheckpointError(f"{index}: tensor {name} is missing from {file}; {where}")
    for name, entry in entries.items():
        if name not in weight_map:
            raise CheckpointError(f"{index.parent / entry.file}: tensor {name} is extra: {index.name} does not list it")


def _part(handle: Any, name: str, rows: tuple[int, int] | None) -> Tensor:
    found: Tensor = handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows[0] : sum(rows)]
    return found


def _fits(found: Sequence[int], shape: Sequence[int | None]) -> bool:
    return len(found) == len(shape) and all(b is None or a == b for a, b in zip(found, shape, strict=True))
