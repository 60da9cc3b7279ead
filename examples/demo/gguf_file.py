"""Reads one GGUF file: its metadata, and its F32, Q8_0 and Q4_1 tensors decoded to float32.

Layout (GGUF version 3, little endian): magic, version, counts, metadata, tensor table, padding, data. A block of 32
weights is Q8_0 = fp16 d, 32 int8 codes (w = d * q) or Q4_1 = fp16 d, fp16 m, 16 bytes (w = d * q + m; byte j holds
code j in its low nibble and code j + 16 in its high nibble).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BLOCK = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TYPES = {0: ("F32", 1, 4), 3: ("Q4_1", _BLOCK, 20), 8: ("Q8_0", _BLOCK, 34)}
"""GGML type number: name, weights per block, bytes per block."""


class GgufError(ValueError):
    """The file is not a GGUF file this reader understands; the message says where and what was found."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. `shape` is row-major, outermost axis first: a linear weight is [out, in]."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


class GgufFile:
    """An open file. `metadata` maps keys to Python values; `tensors` maps names to entries; `read` decodes one
    tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None
        if self._data is None or self._data[:4] != b"GGUF":
            raise GgufError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
        self._at = 4
        version = self._scalar("I")
        if version != 3:
            raise GgufError(f"{path}: GGUF version {version}; this reader knows version 3")
        tensors, entries = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        table = [self._entry() for _ in range(tensors)]
        align = int(self.metadata.get("general.alignment", 32))
        base = -(-self._at // align) * align
        self.tensors = {e.name: TensorEntry(e.name, e.shape, e.kind, base + e.start, e.nbytes) for e in table}
        for entry in self.tensors.values():
            if entry.start + entry.nbytes > len(self._data):
                raise GgufError(
                    f"{path}: truncated: tensor {entry.name!r} ends at byte {entry.start + entry.nbytes}, "
                    f"the file has {len(self._data)}"
                )

    def read(self, name: str) -> Tensor:
        """The tensor `name` as float32 in its row-major shape."""
        entry = self.tensors.get(name)
        if entry is None:
            raise GgufError(f"{self.path}: no tensor {name!r}")
        assert self._data is not None
        raw = torch.frombuffer(bytearray(self._data[entry.start : entry.start + entry.nbytes]), dtype=torch.uint8)
        if entry.kind == "F32":
            return raw.view(torch.float32).reshape(entry.shape)
        if entry.kind == "Q8_0":
            blocks = raw.view(-1, 34)
            d = blocks[:, :2].contiguous().view(torch.float16).float()
            return (blocks[:, 2:].contiguous().view(torch.int8).float() * d).reshape(entry.shape)
        blocks = raw.view(-1, 20)
        d = blocks[:, :2].contiguous().view(torch.float16).float()
        m = blocks[:, 2:4].contiguous().view(torch.float16).float()
        codes = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1)
        return (codes.float() * d + m).reshape(entry.shape)

    def _entry(self) -> TensorEntry:
        name = self._string()
        shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))[::-1]
        number, start = self._scalar("I"), self._scalar("Q")
        if number not in _TYPES:
            known = ", ".join(f"{n} ({k})" for k, (n, _, _) in _TYPES.items())
            raise GgufError(f"{self.path}: tensor {name!r} has GGML type {number}; this reader decodes {known}")
        kind, block, size = _TYPES[number]
        if not shape or shape[-1] % block:
            raise GgufError(f"{self.path}: tensor {name!r} of shape {shape} is not made of {kind} blocks of {block}")
        return TensorEntry(name, shape, kind, start, math.prod(shape) // block * size)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._scalar("I"), self._scalar("Q")
            if inner in _SCALARS:
                return list(self._unpack(f"<{count}{_SCALARS[inner]}"))
            return [self._value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise GgufError(f"{self.path}: unknown metadata type {kind} at byte {self._at}")
        return self._scalar(_SCALARS[kind])

    def _string(self) -> str:
        length = self._scalar("Q")
        return str(self._unpack(f"<{length}s")[0], "utf-8")

    def _scalar(self, code: str) -> Any:
        return self._unpack("<" + code)[0]

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        assert self._data is not None
        try:
            values = struct.unpack_from(layout, self._data, self._at)
        except struct.error as error:
            raise GgufError(f"{self.path}: truncated at byte {self._at}: {error}") from error
        self._at += struct.calcsize(layout)
        return values
