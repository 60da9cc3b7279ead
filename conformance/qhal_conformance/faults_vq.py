"""Planted faults in how a codebook weight is read: indices, books, residuals, lattices, scales, permutation, norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.codebooks import CodebookSegment, CodebookTensor
from qhal.prepared import Prepared
from qhal_conformance.wrapping import Weight, WeightRequest, Wrapped

Spoil = Callable[[CodebookTensor], CodebookTensor | Tensor]


class _Codebooks(Wrapped):
    """Decodes and multiplies a spoiled weight; restore still gives the right one, so only numbers can show it."""

    _spoil: Spoil

    def prepare(self, w: Weight, request: WeightRequest, *, bias: Tensor | None = None, **how: Any) -> Prepared:
        """Remember the spoiled value beside what the inner backend makes."""
        made = self._inner.prepare(w, request, bias=bias, **how)
        if isinstance(w, CodebookTensor):
            spoiled = type(self)._spoil(w)
            value = spoiled if isinstance(spoiled, Tensor) else spoiled.dequantize()
            self._kept[made.handle] = (value, bias)
        return made

    def vq_decode(self, w: Prepared, *, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """The spoiled rows."""
        right = self._inner.vq_decode(w, rows=rows)
        y = self._kept[w.handle][0].to(right.dtype)
        y = y if rows is None else y[rows]
        return y if out is None else out.copy_(y)

    def gemm(self, x: Tensor, w: Prepared, *, out: Tensor | None = None, **how: Any) -> Tensor:  # type: ignore[override]
        """The exact product with the spoiled weight."""
        right = self._inner.gemm(x, w, **how)
        value, bias = self._kept[w.handle]
        y = x.double() @ value.double().T
        y = (y if bias is None else y + bias.double()).to(right.dtype)
        return y if out is None else out.copy_(y)

    @property
    def _kept(self) -> dict[int, tuple[Tensor, Tensor | None]]:
        kept: dict[int, tuple[Tensor, Tensor | None]] = self.__dict__.setdefault("_weights", {})
        return kept


def _vq(spoil: Spoil) -> type[Wrapped]:
    return type("VqFault", (_Codebooks,), {"_spoil": staticmethod(spoil)})


def _segments(change: Callable[[CodebookSegment], CodebookSegment]) -> type[Wrapped]:
    return _vq(lambda w: replace(w, segments=tuple(change(s) for s in w.segments)))


def _sizes(s: CodebookSegment) -> Tensor:
    return torch.tensor([s.table(i).shape[0] for i in range(len(s.tables))], dtype=torch.int32)


def _codes(change: Callable[[Tensor, Tensor], Tensor]) -> type[Wrapped]:
    """change(codes, entries per book) -> codes inside the books."""

    def segment(s: CodebookSegment) -> CodebookSegment:
        sizes = _sizes(s)
        spoiled = change(s.codes.clone(), sizes)
        return replace(s, codes=torch.minimum(spoiled.clamp(min=0), sizes - 1).to(torch.int32))

    return _segments(segment)


def _straddled(c: Tensor, sizes: Tensor) -> Tensor:
    """Every fifth index has the low bit of the one before, as a word boundary that is off by one bit would give."""
    flat = c.reshape(-1, c.shape[-1])
    flat[5::5] = (flat[5::5] & ~1) | (flat[4:-1:5] & 1)
    return flat.reshape(c.shape)


def _high_bit_lost(c: Tensor, sizes: Tensor) -> Tensor:
    top = torch.tensor([1 << (int(v) - 1).bit_length() - 1 for v in sizes], dtype=torch.int32)
    return c & (top - 1)


def _lowest_entry(t: Tensor) -> Tensor:
    """Index 32768, which has no magnitude in 16 bits, is read as 32767."""
    if len(t) > 1 << 15:
        t[1 << 15] = t[(1 << 15) - 1]
    return t


def _padding(w: CodebookTensor) -> Tensor:
    """A word of all ones, the last index of each of several books, is taken for padding: zeros."""
    return replace(w, segments=tuple(_without_last(s) for s in w.segments)).dequantize()


def _without_last(s: CodebookSegment) -> CodebookSegment:
    sizes = _sizes(s)
    ones = (s.codes == sizes - 1).all(-1)
    if len(s.tables) < 2 or not bool(ones.any()):
        return s
    tables = tuple(torch.cat([s.table(i).float(), torch.zeros(1, *s.vector)]) for i in range(len(s.tables)))
    return replace(s, codes=torch.where(ones[..., None], sizes.to(s.codes.dtype), s.codes), tables=tables)


def _books_rolled(s: CodebookSegment) -> CodebookSegment:
    """Index c is looked up in book c + 1."""
    if len(s.tables) < 2:
        return s
    sizes = _sizes(s).roll(-1)
    return replace(s, tables=(*s.tables[1:], s.tables[0]), codes=torch.minimum(s.codes, sizes - 1))


def _first_book(s: CodebookSegment) -> CodebookSegment:
    return replace(s, codes=s.codes[..., :1].contiguous(), tables=s.tables[:1], divisors=s.divisors[:1])


def _tables(change: Callable[[Tensor], Tensor], *, named: str = "") -> type[Wrapped]:
    """Spoil tables: stored ones, or those that are constructed under a name."""

    def segment(s: CodebookSegment) -> CodebookSegment:
        tables = tuple(
            change(s.table(i).clone()) if (t == named if isinstance(t, str) else not named) else t
            for i, t in enumerate(s.tables)
        )
        return replace(s, tables=tables)

    return _segments(segment)


def _parity_ignored(t: Tensor) -> Tensor:
    """The shift of a lattice vector is always +1/4."""
    bits = torch.arange(t.shape[0]) & 255
    odd = torch.tensor([bin(int(b)).count("1") % 2 for b in range(256)])[bits] == 1
    return torch.where(odd[:, None, None], t + 0.5, t)


def _last_sign(t: Tensor) -> Tensor:
    """The sign that follows from the evenness of the sum is taken as plus."""
    t[..., 7] = t[..., 7].abs()
    return t


def _vector_transposed(t: Tensor) -> Tensor:
    v, a, b = t.shape
    return t.transpose(1, 2).reshape(v, a, b).contiguous() if a > 1 and b > 1 else t


def _narrow_sum(w: CodebookTensor) -> Tensor:
    """The sum of books is rounded to fp16 before it is scaled."""
    bare = replace(w, scale=None, permutation=None, column_scale=None, column_bias=None).dequantize()
    one = CodebookSegment(torch.zeros(1, 1, 1, dtype=torch.int32), (bare.half()[None],))
    return replace(w, segments=(one,), scale=_by_row(w)).dequantize()


def _by_row(w: CodebookTensor) -> Tensor | None:
    if w.scale is None or w.scale.numel() == 1:
        return w.scale
    return w.scale.reshape(-1).repeat_interleave(-(-w.shape[0] // w.scale.numel()))[: w.shape[0]]


def _last_rows(w: CodebookTensor) -> Tensor:
    """Rows of a last vector that is partly used are taken from the vector before."""
    y, a = w.dequantize(), max(s.vector[0] for s in w.segments)
    rest = w.shape[0] % a
    if rest and w.shape[0] > a:
        y[-rest:] = y[-a - rest : -a].clone()
    return y


def _last_columns(w: CodebookTensor) -> Tensor:
    """Columns of a last vector that is partly used stay zero."""
    y, b = w.dequantize(), w.segments[-1].vector[1]
    if w.shape[1] % b:
        y[:, w.shape[1] // b * b :] = 0
    return y


def _inverse_order(w: CodebookTensor) -> CodebookTensor:
    return w if w.permutation is None else replace(w, permutation=torch.argsort(w.permutation))


def _norm_in_stored_order(w: CodebookTensor) -> CodebookTensor:
    """Column scale and bias are read in stored order."""
    if w.permutation is None or w.column_scale is None or w.column_bias is None:
        return w
    return replace(w, column_scale=w.column_scale[w.permutation], column_bias=w.column_bias[w.permutation])


def _bias_scaled(w: CodebookTensor) -> CodebookTensor:
    """The column bias is scaled too."""
    if w.column_scale is None or w.column_bias is None:
        return w
    return replace(w, column_bias=w.column_bias.float() * w.column_scale.float())


def _half_product(w: CodebookTensor) -> CodebookTensor | Tensor:
    """An entry times the scale of its row is formed in fp16, where what is subnormal becomes zero."""
    if w.scale is None or w.scale.numel() != w.shape[0]:
        return w
    y = w.dequantize()
    return torch.where(y.abs() < 2.0**-14, 0 * y, y)


def _guarded(s: Tensor) -> Tensor:
    """A scale of zero is replaced by 1, as before a division."""
    return torch.where(s == 0, torch.ones_like(s), s)


def _scale(change: Callable[[Tensor], Tensor]) -> type[Wrapped]:
    return _vq(lambda w: w if w.scale is None else replace(w, scale=change(w.scale.clone()).contiguous()))


class RowsIgnored(Wrapped):
    """rows= starts at the first row."""

    def vq_decode(self, w: Prepared, *, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """As many rows, from the top."""
        y = self._inner.vq_decode(w)
        y = y if rows is None else y[: rows.stop - rows.start]
        return y if out is None else out.copy_(y)


VQ_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
    ("vq-index-plus-one", "vq", "every index is read one too high", _codes(lambda c, n: c + 1)),
    ("vq-last-index", "vq", "the last entry of a table is read as the one before",
     _codes(lambda c, n: torch.minimum(c, n - 2))),
    ("vq-first-index", "vq", "index 0 is read as 1", _codes(lambda c, n: c.clamp(min=1))),
    ("vq-high-bit", "vq", "the highest bit of an index is lost", _codes(_high_bit_lost)),
    ("vq-straddling", "vq", _straddled.__doc__ or "", _codes(_straddled)),
    ("vq-sign-extended", "vq", "indices of 16 bits above 32767 are read as negative and clamped",
     _codes(lambda c, n: torch.where(c > 32767, c * 0, c))),
    ("vq-index-32768", "vq", _lowest_entry.__doc__ or "", _tables(_lowest_entry)),
    ("vq-lattice-32768", "vq", "index 32768 of a lattice is read as 32767", _tables(_lowest_entry, named="e8p12")),
    ("vq-padding", "vq", _padding.__doc__ or "", _vq(_padding)),
    ("vq-half-product", "vq", _half_product.__doc__ or "", _vq(_half_product)),
    ("vq-zero-scale", "vq", _guarded.__doc__ or "",
     _vq(lambda w: w if w.column_scale is None else replace(w, column_scale=_guarded(w.column_scale)))),
    ("vq-wrong-book", "vq", _books_rolled.__doc__ or "", _segments(_books_rolled)),
    ("vq-residual-dropped", "vq", "only the first book is read", _segments(_first_book)),
    ("vq-divisor-ignored", "vq", "the residual's divisor is taken for 1",
     _segments(lambda s: replace(s, divisors=()))),
    ("vq-sign-parity", "vq", _parity_ignored.__doc__ or "", _tables(_parity_ignored, named="e8p12")),
    ("vq-last-sign", "vq", _last_sign.__doc__ or "", _tables(_last_sign, named="e8p12")),
    ("vq-axes-sign", "vq", "the axes of the residual lattice point the other way",
     _tables(lambda t: torch.where(t.abs().amax((1, 2), keepdim=True) == 2, -t, t), named="e81b")),
    ("vq-vector-transposed", "vq", "vectors of several rows are read column by column", _tables(_vector_transposed)),
    ("vq-vector-reversed", "vq", "vectors are read from their end", _tables(lambda t: t.flip(-1))),
    ("vq-table-bf16", "vq", "tables are rounded to bf16", _tables(lambda t: t.bfloat16().float())),
    ("vq-sum-fp16", "vq", _narrow_sum.__doc__ or "", _vq(_narrow_sum)),
    ("vq-vectors-shifted", "vq", "indices of the vector row before",
     _segments(lambda s: replace(s, codes=s.codes.roll(1, 0)))),
    ("vq-segments-swapped", "vq", "outlier columns stand at the end",
     _vq(lambda w: replace(w, segments=(*w.segments[1:], w.segments[0])))),
    ("vq-last-rows", "vq", _last_rows.__doc__ or "", _vq(_last_rows)),
    ("vq-last-columns", "vq", _last_columns.__doc__ or "", _vq(_last_columns)),
    ("vq-scale-ignored", "vq", "scales are taken for 1", _scale(torch.ones_like)),
    ("vq-scale-shifted", "vq", "every row has the scale of the next", _scale(lambda s: s.roll(-1, 0))),
    ("vq-scale-last", "vq", "the last scale is that of the row before",
     _scale(lambda s: torch.cat([s[:-1], s[-2:-1]]) if s.numel() > 1 else s)),
    ("vq-permutation-ignored", "vq", "columns stay in stored order", _vq(lambda w: replace(w, permutation=None))),
    ("vq-permutation-inverse", "vq", "the permutation is applied the other way", _vq(_inverse_order)),
    ("vq-norm-ignored", "vq", "the column scale is not applied", _vq(lambda w: replace(w, column_scale=None))),
    ("vq-bias-ignored", "vq", "the column bias is not added", _vq(lambda w: replace(w, column_bias=None))),
    ("vq-bias-scaled", "vq", _bias_scaled.__doc__ or "", _vq(_bias_scaled)),
    ("vq-norm-first", "vq", _norm_in_stored_order.__doc__ or "", _vq(_norm_in_stored_order)),
    ("vq-rows-ignored", "vq", RowsIgnored.__doc__ or "", RowsIgnored),
)  # fmt: skip
"""(name, profile, what is wrong, class)"""
