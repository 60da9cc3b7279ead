"""The header of a GGUF file: metadata, and where its tensors lie. Every count, length and offset is checked.

Little endian: "GGUF", version, counts of tensors and keys, keys with values, the tensor table, padding, then the data,
every tensor at a multiple of general.alignment. Nothing is allocated from a number in the file: reading stops where
the bytes end. Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qhal.errors import CheckpointError
from qhal_schemes.gguf_blocks import TYPES, size_of
from qhal_schemes.source import TensorEntry
from qhal_schemes.strict_json import is_file

_SCALARS = {kind: struct.Struct(f"<{code}") for kind, code in {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d",
}.items()}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_HEADER_LIMIT = 1 << 26  # bytes; vocabularies of today take some 10 MB
_STRING_LIMIT = 1 << 24  # bytes of one key or text
_KEPT = 4096  # numbers of an array that are kept; vocabularies are counted only
_LONGEST_NAME, _MOST_AXES, _BIGGEST_AXIS = 1024, 4, 1 << 40


@dataclass(frozen=True)
class Array:
    """An array of the metadata. values: its numbers, where they are at most 4096; texts are only counted."""

    count: int
    values: tuple[Any, ...] | None = None


@dataclass(frozen=True, eq=False)
class GGUFHeader:
    """metadata: number, text, truth value or Array by key. tensors: by name, in file order, shapes row-major."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    def bad(self, key: str, expected: str, found: object) -> CheckpointError:
        """The error about a value of the metadata."""
        return CheckpointError(f"{self.path}: {key}: expected {expected}, found {str(found)[:160]}")

    def count(self, key: str) -> int | None:
        """A count of the metadata; None where it is not there, or 0."""
        value = self.metadata.get(key, 0)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self.bad(key, "a count", value)
        return value or None


def read_gguf(path: Path) -> GGUFHeader:
    """Read and check the header of one file; CheckpointError for whatever does not fit."""
    if not is_file(path):
        raise CheckpointError(f"{path}: is {'no regular file' if path.exists() else 'missing'}")
    try:
        with path.open("rb") as stream:
            return _Reader(path, stream, path.stat().st_size).header()
    except OSError as bad:
        raise CheckpointError(f"{path}: cannot be read: {bad.strerror}") from None


class _Reader:
    """A cursor over the header."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self.path, self.stream, self.size, self.at = path, stream, size, 0

    def header(self) -> GGUFHeader:
        magic = self.take(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path}: no GGUF file: it starts with {magic!r}")
        version = self.number(_U32)
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
            what = f"big endian, version {swapped}" if swapped in (2, 3) else f"version {version}"
            raise CheckpointError(f"unsupported: {self.path}: GGUF of {what}; little endian, versions 2 and 3 are read")
        tensors, keys = self.number(_U64), self.number(_U64)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text("a key")
            if key in metadata:
                raise self.corrupt(f"key {key[:200]!r} is duplicated")
            metadata[key] = self.value(key, self.number(_U32))
        table: dict[str, tuple[tuple[int, ...], str, int]] = {}
        for _ in range(tensors):
            name, *rest = self.entry()
            if name in table:
                raise self.corrupt(f"tensor {name} is duplicated")
            table[name] = tuple(rest)  # type: ignore[assignment]
        return GGUFHeader(self.path, metadata, self.place(table, metadata.get("general.alignment", 32)))

    def place(self, table: dict[str, tuple[tuple[int, ...], str, int]], alignment: object) -> dict[str, TensorEntry]:
        """Offsets from the start of the file; tensors follow each other with nothing but padding between them."""
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.corrupt(f"general.alignment: expected a power of two from 8, found {str(alignment)[:80]}")
        base = position = -(-self.at // alignment) * alignment
        found: dict[str, TensorEntry] = {}
        for name, (shape, kind, offset) in sorted(table.items(), key=lambda item: item[1][2]):
            start = -(-position // alignment) * alignment
            if base + offset != start:
                raise self.corrupt(f"{name}: corrupt offset: starts at {base + offset}, not at {start}")
            position = start + size_of(kind, shape)
            found[name] = TensorEntry(name, kind, shape, self.path.name, start, position)
        if found and not position <= self.size < position + alignment:
            state = "truncated" if self.size < position else "longer than its header says"
            raise CheckpointError(f"{self.path}: {state}: expected {position} bytes, found {self.size}")
        return found

    def entry(self) -> tuple[str, tuple[int, ...], str, int]:
        """Name, shape, type and offset of one tensor."""
        name, axes = self.text("a tensor name"), self.number(_U32)
        printable = 0 < len(name) <= _LONGEST_NAME and name.isprintable() and all(name.split("."))
        if not printable or not 0 < axes <= _MOST_AXES:
            raise self.corrupt(
                f"tensor {name[:200]!r}, a name of {len(name)} characters with {axes} axes: expected 1 to "
                f"{_LONGEST_NAME} printable characters, no empty part and 1 to {_MOST_AXES} axes"
            )
        shape = tuple(self.number(_U64) for _ in range(axes))[::-1]
        number, offset = self.number(_U32), self.number(_U64)
        kind = TYPES.get(number)
        if kind is None:
            raise CheckpointError(f"unsupported: {self.path}: {name} has GGML type {number}, which is not known here")
        if not kind.readable:
            raise CheckpointError(
                f"unsupported: {self.path}: {name} is {kind.name}; can be read: "
                f"{', '.join(k.name for k in TYPES.values() if k.readable)}"
            )
        if not all(0 < n <= _BIGGEST_AXIS for n in shape) or shape[-1] % kind.elements:
            raise self.corrupt(f"{name}: {kind.name} {list(shape)} is not made of blocks of {kind.elements} elements")
        if size_of(kind.name, shape) > self.size:
            raise CheckpointError(
                f"{self.path}: truncated: {name}: {kind.name} {list(shape)} takes {size_of(kind.name, shape)} bytes, "
                f"the file has {self.size}"
            )
        return name, shape, kind.name, offset

    def value(self, key: str, kind: int) -> Any:
        """One value; numbers of long arrays and texts of any array are passed over."""
        if kind == _STRING:
            return self.text(key)
        if kind in _SCALARS:
            number = self.number(_SCALARS[kind])
            return bool(number) if kind == _BOOL else number
        if kind != _ARRAY:
            raise self.corrupt(f"{key[:200]}: unknown type {kind}")
        inner, count = self.number(_U32), self.number(_U64)
        if inner == _STRING:
            for _ in range(count):
                self.skip(self.number(_U64))
            return Array(count)
        if inner not in _SCALARS:
            raise self.corrupt(f"{key[:200]}: an array of type {inner}: expected numbers or texts")
        layout = _SCALARS[inner]
        if count > _KEPT:
            self.skip(count * layout.size)
            return Array(count)
        return Array(count, tuple(self.number(layout) for _ in range(count)))

    def text(self, what: str) -> str:
        length = self.number(_U64)
        if length > _STRING_LIMIT:
            raise self.corrupt(f"{what[:200]}: a text of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as bad:
            raise self.corrupt(f"{what[:200]}: no UTF-8: {bad.reason}") from None

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def take(self, count: int) -> bytes:
        raw = self.stream.read(count) if self._fits(count) else b""
        if len(raw) != count:
            raise CheckpointError(f"{self.path}: truncated or no GGUF file: {self.size} bytes end inside the header")
        self.at += count
        return raw

    def skip(self, count: int) -> None:
        if not self._fits(count):
            raise CheckpointError(f"{self.path}: truncated or no GGUF file: {self.size} bytes end inside the header")
        self.stream.seek(count, 1)
        self.at += count

    def _fits(self, count: int) -> bool:
        if self.at + count <= self.size and self.at + count > _HEADER_LIMIT:
            raise self.corrupt(f"more than {_HEADER_LIMIT} bytes of header")
        return self.at + count <= self.size

    def corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: corrupt GGUF header before byte {self.at}: {what}")
