"""Codebook weights that are asked: the shapes of AQLM, VPTQ and QuIP#, and tensors of each built from chosen indices.

Every table, index and scale follows from the case's id. The value is computed a second time here, element by element
from the definition in the docstrings of `CodebookTensor`; nothing calls `dequantize`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from qhal.codebooks import CodebookSegment, CodebookTensor
from qhal.elements import WIDE
from qhal_conformance import vq_tables
from qhal_conformance.cases import Case
from qhal_conformance.decode import Decoded, numbers, significand
from qhal_conformance.elements import round_wide
from qhal_conformance.generator import F32, F64, I64, Stream

VQ_DATA: dict[str, str] = {
    "identity": "every entry spells its own index in seven-bit digits, every index occurs: an index off by one, a "
    "lost high bit, another book or a transposed vector is another number",
    "codes": "every index occurs, near-normal entries: additive books and residuals, lattice signs and shifts; "
    "products in which small errors are everywhere",
    "ends": "the first and the last entry of every table alternate: clamped and masked indices",
    "scales": "row and column scales over sixteen binades each: a neighbour's scale, a scale in the wrong step",
    "zero": "entries, rows and columns that must be exactly 0",
    "onehot": "one nonzero per row of x: every result is one weight",
}


@dataclass(frozen=True)
class Book:
    """entries: of a stored table; name: a structured one; divisor: of a residual stage."""

    entries: int
    name: str = ""
    divisor: float = 1.0


@dataclass(frozen=True)
class Part:
    """Columns (0: all that are left) whose vectors of (a, b) share books."""

    columns: int
    vector: tuple[int, int]
    books: tuple[Book, ...]


@dataclass(frozen=True)
class Kind:
    """A family's shape. scale: "" | one | row | vector (one per a rows); norm: column scale and bias."""

    parts: tuple[Part, ...]
    scale: str = ""
    permuted: bool = False
    norm: bool = False
    dtype: str = "fp16"


def _stored(columns: int, vector: tuple[int, int], *entries: int) -> Part:
    return Part(columns, vector, tuple(Book(v) for v in entries))


_E8P = Book(1 << 16, "e8p12")
KINDS: dict[str, Kind] = {
    "aqlm-1x16": Kind((_stored(0, (1, 8), 1 << 16),), scale="row"),
    "aqlm-2x8": Kind((_stored(0, (1, 8), 256, 256),), scale="row", dtype="bf16"),
    "aqlm-3x5-out2": Kind((_stored(0, (2, 4), 32, 32, 32),), scale="vector"),
    "vptq-11+8": Kind((_stored(0, (8, 1), 1 << 11, 1 << 8),), permuted=True, norm=True),
    "vptq-outliers": Kind(
        (_stored(6, (4, 1), 1 << 9), _stored(40, (8, 1), 1 << 7, 16), _stored(0, (8, 1), 1000, 16)),
        permuted=True,
        norm=True,
        dtype="bf16",
    ),
    "quip-e8p12": Kind((Part(0, (1, 8), (_E8P,)),)),
    "quip-rvq3": Kind((Part(0, (1, 8), (_E8P, Book(256, "e81b", 2.04))),), scale="one"),
    "quip-rvq4": Kind((Part(0, (1, 8), (_E8P, replace(_E8P, divisor=3.45))),)),
    "prime-97": Kind((_stored(0, (2, 4), 97),), scale="one", dtype="fp32"),
}
"""Index widths 4, 5, 7, 8, 9, 11 and 16 bits, and tables of 97 and 1000 entries, which end inside a power of two."""


def build(case: Case) -> CodebookTensor:
    """The weight of a case: [n, k], the last vectors of rows and columns partly used where they do not fit."""
    kind, n, k = KINDS[case.subject], case.size("n"), case.size("k")
    segments, left = [], k
    for i, part in enumerate(kind.parts):
        columns = part.columns or left
        segments.append(_segment(case, f"segment{i}", part, kind.dtype, n, columns))
        left -= columns
    g = Stream(case.id, "scales")
    count = {"": 0, "one": 1, "row": n, "vector": -(-n // kind.parts[0].vector[0])}[kind.scale]
    return CodebookTensor(
        (n, k),
        tuple(segments),
        scale=_scales(case, g, count, kind.dtype) if count else None,
        permutation=torch.from_numpy(Stream(case.id, "order").permutation(k)) if kind.permuted else None,
        column_scale=_scales(case, g, k, kind.dtype) if kind.norm else None,
        column_bias=_wide(kind.dtype, _bias(case, g, k)) if kind.norm else None,
    )


def _segment(case: Case, name: str, part: Part, dtype: str, n: int, columns: int) -> CodebookSegment:
    (a, b), g = part.vector, Stream(case.id, f"{name}.codes")
    rows, vectors = -(-n // a), -(-columns // b)
    codes, tables = [], []
    for c, book in enumerate(part.books):
        if case.data == "ends":
            found = (g.integers(0, 2, (rows * vectors,)) * (book.entries - 1)).astype(np.int64)
        else:
            found = g.permutations(-(-rows * vectors // book.entries), book.entries).reshape(-1)[: rows * vectors]
        codes.append(found.reshape(rows, vectors))
        tables.append(book.name or _wide(dtype, _entries(case, f"{name}.table{c}", book, c, (a, b))))
    divisors = tuple(book.divisor for book in part.books)
    index = torch.from_numpy(np.stack(codes, -1).astype(np.int32))
    return CodebookSegment(index, tuple(tables), divisors if set(divisors) != {1.0} else ())


def _entries(case: Case, name: str, book: Book, number: int, vector: tuple[int, int]) -> F32:
    shape, g = (book.entries, *vector), Stream(case.id, name)
    if case.data in ("identity", "ends"):
        place = np.arange(vector[0] * vector[1]).reshape(1, *vector)
        digit = np.arange(book.entries).reshape(-1, 1, 1) >> (7 * (place % 3)) & 127
        return np.asarray(np.ldexp(128.0 + digit, (place % 5) - 8 * number - 8), dtype=np.float32)
    values: F32 = g.normal(shape) * np.float32(2.0 ** (-2 - 3 * number))
    if case.data == "zero":
        values = np.where(g.integers(0, 4, (book.entries, 1, 1)) > 0, np.float32(0), values)
    return values


def _scales(case: Case, g: Stream, count: int, dtype: str) -> torch.Tensor:
    values = g.mantissas(10 if dtype == "fp16" else 7, (count,)).astype(np.float64)
    if case.data == "scales":
        values = np.ldexp(values, np.resize([-8, 7, 0, -3, 5], count))
    if case.data == "zero":
        values = np.where(np.arange(count) % 3 == 1, 0.0, values) if count > 1 else values
    return _wide(dtype, values.astype(np.float32))


def _bias(case: Case, g: Stream, count: int) -> F32:
    bias: F32 = g.normal((count,)) * np.float32(2.0**-3)
    if case.data == "zero":
        return np.where(np.arange(count) % 2 == 0, np.float32(0), bias)
    return bias


def _wide(dtype: str, values: F32) -> torch.Tensor:
    return torch.from_numpy(round_wide(dtype, np.ascontiguousarray(values, np.float32))).to(WIDE[dtype])


@dataclass(frozen=True)
class Dense:
    """What a codebook weight is: by float32 steps as defined, exactly, and in magnitude; how many steps round."""

    value: F32
    exact: F64
    magnitude: F64
    steps: int

    @property
    def decoded(self) -> Decoded:
        """For products; equal numbers of a row round equally to 16 bits."""
        return Decoded(self.value, self.magnitude, significand(self.value), np.zeros(self.value.shape, np.int64))


def dense(w: CodebookTensor) -> Dense:
    """Decode: entries by index arithmetic, then scale, permutation, column scale and bias."""
    n, k = w.shape
    parts = [_decode(s, n) for s in w.segments]
    v: F32 = np.concatenate([p[0] for p in parts], axis=1)[:, :k]
    e, m = (np.concatenate([p[i] for p in parts], axis=1)[:, :k] for i in (1, 2))
    steps = max(p[3] for p in parts)
    if w.scale is not None:
        scale = numbers(w.scale).reshape(-1)
        heights = w.segments[0].vector[0] if scale.size not in (1, n) else 1
        rows: I64 = np.zeros(n, np.int64) if scale.size == 1 else np.arange(n) // heights
        column = scale[rows][:, None]
        v, e, m, steps = v * column, e * column, m * np.abs(column), steps + 1
    if w.permutation is not None:
        back = np.argsort(w.permutation.cpu().numpy())  # input column j was stored at back[j]
        v, e, m = v[:, back], e[:, back], m[:, back]
    if w.column_scale is not None:
        row = numbers(w.column_scale)
        v, e, m, steps = v * row, e * row, m * np.abs(row), steps + 1
    if w.column_bias is not None:
        row = numbers(w.column_bias)
        v, e, m, steps = v + row, e + row, m + np.abs(row), steps + 1
    return Dense(v.astype(np.float32), e, m, steps)


def _decode(s: CodebookSegment, n: int) -> tuple[F32, F64, F64, int]:
    """(float32 steps, exact, magnitude) [n, columns] of a segment, and its roundings."""
    a, b = s.vector
    codes = s.codes.cpu().numpy().astype(np.int64)
    i, j = np.indices((n, codes.shape[1] * b))
    value: F32 = np.zeros(i.shape, np.float32)
    exact, magnitude = np.zeros(i.shape), np.zeros(i.shape)
    rounded = len(s.tables) - 1
    for c, t in enumerate(s.tables):
        table = vq_tables.table(t) if isinstance(t, str) else numbers(t)
        entry = table[codes[i // a, j // b, c], i % a, j % b]
        divisor = s.divisors[c] if s.divisors else 1.0
        rounded += divisor != 1.0
        stage = entry / np.float32(divisor)
        value = stage if c == 0 else value + stage
        exact += entry.astype(np.float64) / float(np.float32(divisor))
        magnitude += np.abs(stage.astype(np.float64))
    return value, exact, magnitude, rounded
