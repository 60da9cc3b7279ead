"""CodebookTensor: a vector-quantized weight (AQLM, VPTQ, QuIP#), the sibling of QTensor.

A weight is cut into small a x b vectors; each is a sum of entries of one or more codebooks:
w = sum over c of table_c[code_c] / divisor_c. Consecutive stored columns whose vectors share codebooks are a segment,
so outlier columns, column groups, residual stages and lattices are one loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qhal import lattices
from qhal.errors import FormatError, ShardError
from qhal.named_tables import NamedTables
from qhal.sharding import bounds, check_axis

STRUCTURED = NamedTables({name: partial(lattices.load, name) for name in lattices.TABLE_SHA256})
"""Named codebooks that are constructed, not stored: name -> function that gives the table [V, a, b]."""


@dataclass(frozen=True)
class SegmentFormat:
    """Frozen summary of a segment: columns, vector (a, b), and per codebook its entries and name ("" if stored)."""

    columns: int
    vector: tuple[int, int]
    codebooks: tuple[tuple[int, str], ...]
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True)
class CodebookFormat:
    """Frozen summary of a CodebookTensor, for requests; hashable and without tensors."""

    segments: tuple[SegmentFormat, ...]
    scale: bool = False
    permutation: bool = False
    column_scale: bool = False
    column_bias: bool = False

    def __str__(self) -> str:
        def one(s: SegmentFormat) -> str:
            books = "+".join(f"{name or v}" for v, name in s.codebooks)
            return f"vq{s.vector[0]}x{s.vector[1]}[{books}]"

        flags = [n for n in ("scale", "permutation", "column_scale", "column_bias") if getattr(self, n)]
        return "|".join(one(s) for s in self.segments) + (f"*{','.join(flags)}" if flags else "")

    @property
    def bits(self) -> float:
        """Index bits per weight; codebooks and scales, which do not grow with the weight, are not counted."""
        total = sum(s.columns for s in self.segments)
        used = 0.0
        for s in self.segments:
            used += s.columns * sum((v - 1).bit_length() for v, _ in s.codebooks) / (s.vector[0] * s.vector[1])
        return used / total if total else 0.0


@dataclass(frozen=True, eq=False)
class CodebookSegment:
    """Consecutive stored columns whose vectors share codebooks.

    codes     int32 [ceil(N/a), columns/b, C]
    tables    C tables [V, a, b], or the name of a structured one
    divisors  per codebook, default 1: residual stages such as (1, 3.45)

    Construction checks dtypes and shapes (FormatError), never values.
    """

    codes: Tensor
    tables: tuple[Tensor | str, ...]
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        codes, count = self.codes, len(self.tables)
        if codes.dtype != torch.int32 or codes.dim() != 3 or count == 0 or codes.shape[-1] != count:
            found = f"{codes.dtype} {tuple(codes.shape)}"
            raise FormatError(f"codes of {count} codebooks are {found}, must be int32 [rows, vectors, {count}]")
        shapes = [tuple(self.table(i).shape) for i in range(count)]
        if any(len(s) != 3 for s in shapes) or len({s[1:] for s in shapes}) > 1:
            raise FormatError(f"codebooks of one segment have vectors of one size [V, a, b], not {shapes}")
        if self.divisors and (len(self.divisors) != count or not all(0 < abs(d) < math.inf for d in self.divisors)):
            raise FormatError(
                f"divisors {self.divisors}: none, or a finite number that is not 0 for each of {count} codebooks"
            )

    @property
    def vector(self) -> tuple[int, int]:
        """Rows a and columns b of one entry."""
        a, b = self.table(0).shape[1:]
        return a, b

    def table(self, index: int) -> Tensor:
        """Codebook `index`, [V, a, b]."""
        table = self.tables[index]
        if isinstance(table, Tensor):
            return table
        if table not in STRUCTURED:
            raise FormatError(f"unknown structured codebook {table!r}; known: {', '.join(STRUCTURED) or 'none'}")
        return STRUCTURED[table]()

    @property
    def format(self) -> SegmentFormat:
        """The frozen summary."""
        tables = [self.table(i) for i in range(len(self.tables))]
        named = tuple((t.shape[0], n if isinstance(n, str) else "") for t, n in zip(tables, self.tables, strict=True))
        return SegmentFormat(self.codes.shape[1] * self.vector[1], self.vector, named, self.divisors)

    def dequantize(self) -> Tensor:
        """float32 [ceil(N/a)*a, columns]: the sum of the codebook entries, in codebook order."""
        rows, vectors, _ = self.codes.shape
        total: Tensor | None = None
        for i in range(len(self.tables)):
            entry = self.table(i).to(self.codes.device, torch.float32)[self.codes[..., i].long()]
            if self.divisors and self.divisors[i] != 1:
                entry = entry / self.divisors[i]
            total = entry if total is None else total + entry
        assert total is not None
        a, b = total.shape[-2:]
        return total.permute(0, 2, 1, 3).reshape(rows * a, vectors * b)


@dataclass(frozen=True, eq=False)
class CodebookTensor:
    """Vector-quantized weight [N, K].

    Rows past N are cut, segments join along K, columns past K are cut; then, in this order: row scale, permutation,
    column scale, column bias. fp32, each step rounded once.

    scale         float [1], [N], or [ceil(N/a)] for the rows of vectors (all segments then have one a)
    permutation   int64 [K]: stored column j is input column permutation[j]
    column_scale  float [K], after un-permutation
    column_bias   float [K]
    """

    shape: tuple[int, int]
    segments: tuple[CodebookSegment, ...]
    scale: Tensor | None = None
    permutation: Tensor | None = None
    column_scale: Tensor | None = None
    column_bias: Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.shape
        columns = sum(s.codes.shape[1] * s.vector[1] for s in self.segments)
        rows = [(s.codes.shape[0], -(-n // s.vector[0])) for s in self.segments]
        if columns < k or any(have != need for have, need in rows):
            found = [tuple(s.codes.shape) for s in self.segments]
            vectors = [s.vector for s in self.segments]
            raise FormatError(f"codes {found} of vectors {vectors} do not cover a weight [{n}, {k}]")
        self._rows_per_scale()
        for name in ("permutation", "column_scale", "column_bias"):
            t = getattr(self, name)
            if t is not None and tuple(t.shape) != (k,):
                raise FormatError(f"the {name} of a codebook weight [{n}, {k}] is {tuple(t.shape)}, must be [{k}]")

    def _rows_per_scale(self) -> int:
        """How many rows share one value of `scale`."""
        n, count = self.shape[0], 1 if self.scale is None else self.scale.numel()
        heights = {s.vector[0] for s in self.segments}
        if count == 1:
            return n
        if count == n:
            return 1
        if len(heights) != 1 or count != -(-n // min(heights)):
            raise FormatError(f"{count} row scales do not fit {n} rows of vectors {sorted(heights)} high")
        return min(heights)

    @property
    def format(self) -> CodebookFormat:
        """The frozen summary for requests."""
        return CodebookFormat(
            tuple(s.format for s in self.segments),
            *(x is not None for x in (self.scale, self.permutation, self.column_scale, self.column_bias)),
        )

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self.segments[0].codes.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """float32 [N, K] by the definition above, rounded once to `dtype`."""
        n, k = self.shape
        w = torch.cat([s.dequantize()[:n] for s in self.segments], 1)[:, :k]
        if self.scale is not None:
            w = w * self.scale.float().reshape(-1).repeat_interleave(self._rows_per_scale())[:n, None]
        if self.permutation is not None:
            back = torch.empty_like(w)
            back[:, self.permutation.long()] = w
            w = back
        if self.column_scale is not None:
            w = w * self.column_scale.float()
        if self.column_bias is not None:
            w = w + self.column_bias.float()
        return w.to(dtype)

    def planes(self) -> dict[str, Tensor]:
        """Every tensor by dotted name: "segments.0.codes", "segments.0.table.1", "scale", ..."""
        found: dict[str, Tensor] = {}
        for i, s in enumerate(self.segments):
            found[f"segments.{i}.codes"] = s.codes
            found.update({f"segments.{i}.table.{j}": t for j, t in enumerate(s.tables) if isinstance(t, Tensor)})
        for name in ("scale", "permutation", "column_scale", "column_bias"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of every plane."""
        return sum(t.numel() * t.element_size() for t in self.planes().values())

    def shard(self, dim: int, rank: int, world: int) -> CodebookTensor:
        """Part `rank` of `world` along N or K; a cut through a vector, a permutation or a segment is refused."""
        check_axis(dim)
        n, k = self.shape
        start, stop = bounds((n, k)[dim], rank, world, f"{'rows' if dim == 0 else 'columns'} of {self.format}")
        if world == 1:
            return self
        if dim == 0:
            for a in {s.vector[0] for s in self.segments}:
                if start % a or (stop % a and stop != n):
                    raise ShardError(f"{self.format}: row {start} or {stop} lies inside a codebook vector of {a} rows")
            segments = tuple(
                replace(s, codes=s.codes[start // s.vector[0] : -(-stop // s.vector[0])]) for s in self.segments
            )
            scale = self.scale
            if scale is not None and scale.numel() > 1:
                per = self._rows_per_scale()
                scale = scale.reshape(-1)[start // per : -(-stop // per)]
            return replace(self, shape=(stop - start, k), segments=segments, scale=scale)
        if self.permutation is not None:
            raise ShardError(f"{self.format}: columns of a permuted weight cannot be cut: segments span the input")
        kept: list[CodebookSegment] = []
        at = 0
        for s in self.segments:
            b = s.vector[1]
            columns = s.codes.shape[1] * b
            lo, hi = max(start, at) - at, min(stop, at + columns) - at
            if lo < hi:
                if lo % b or (hi % b and stop != k):
                    cut = f"column {start} or {stop} lies inside a codebook vector of {b} columns"
                    raise ShardError(f"{self.format}: {cut}")
                kept.append(replace(s, codes=s.codes[:, lo // b : -(-hi // b)]))
            at += columns
        column_scale = None if self.column_scale is None else self.column_scale[start:stop]
        column_bias = None if self.column_bias is None else self.column_bias[start:stop]
        return replace(
            self, shape=(n, stop - start), segments=tuple(kept), column_scale=column_scale, column_bias=column_bias
        )

    @staticmethod
    def concat(parts: list[CodebookTensor], dim: int) -> CodebookTensor:
        """Refused: codebooks are fitted per projection, so fused projections would need a codebook index per row."""
        if len(parts) == 1:
            return parts[0]
        raise ShardError("codebook weights cannot be fused: each part has codebooks of its own; load them one by one")
