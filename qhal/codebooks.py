"""CodebookTensor: a vector-quantized weight (AQLM, VPTQ, QuIP#), the sibling of QTensor.

A weight is cut into small a x b vectors; each is a sum of entries of one or more codebooks:
w = sum over c of table_c[code_c] / divisor_c. Consecutive stored columns whose vectors share codebooks are a segment,
so outlier columns, column groups, residual stages and lattices are one loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qhal import lattices
from qhal.errors import FormatError, ShardError
from qhal.named_tables import NamedTables
from qhal.sharding import bounds

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
    """

    codes: Tensor
    tables: tuple[Tensor | str, ...]
    divisors: tuple[float, ...] = ()

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
        a, b = tables[0].shape[1:]
        named = tuple((t.shape[0], n if isinstance(n, str) else "") for t, n in zip(tables, self.tables, strict=True))
        return SegmentFormat(self.codes.shape[1] * b, (a, b), named, self.divisors)

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

    Rows past N are cut, segments join along K; then, in this order: row scale, permutation, column scale, column bias.

    scale         float [N/a] or [1]
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
            scale = self.scale.float().reshape(-1)
            w = w * scale.repeat_interleave(-(-n // scale.numel()))[:n, None]
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
        n, k = self.shape
        start, stop = bounds((n, k)[dim], rank, world, "rows" if dim == 0 else "columns")
        if dim == 0:
            a = max(s.format.vector[0] for s in self.segments)
            if any(start % s.format.vector[0] or (stop % s.format.vector[0] and stop != n) for s in self.segments):
                raise ShardError(f"row {start} or {stop} lies inside a codebook vector of {a} rows")
            segments = tuple(
                replace(s, codes=s.codes[start // s.format.vector[0] : -(-stop // s.format.vector[0])])
                for s in self.segments
            )
            scale = self.scale
            if scale is not None and scale.numel() > 1:
                per = -(-n // scale.numel())
                scale = scale.reshape(-1)[start // per : -(-stop // per)]
            return replace(self, shape=(stop - start, k), segments=segments, scale=scale)
        if self.permutation is not None:
            raise ShardError("columns of a permuted codebook weight cannot be cut: every segment spans the input")
        kept: list[CodebookSegment] = []
        at = 0
        for s in self.segments:
            f = s.format
            lo, hi = max(start, at) - at, min(stop, at + f.columns) - at
            if lo < hi:
                if lo % f.vector[1] or hi % f.vector[1]:
                    raise ShardError(f"column {start} or {stop} lies inside a codebook vector of {f.vector[1]} columns")
                kept.append(replace(s, codes=s.codes[:, lo // f.vector[1] : hi // f.vector[1]]))
            at += f.columns
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
