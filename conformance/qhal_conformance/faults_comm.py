"""Planted faults in quantized collectives: lost ranks, codes, scales, sums, the way back, buffers.

Each changes one thing of `faults_ranks.Together` or `Kept`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.codecs import Codec
from qhal.collectives import part_rows
from qhal.formats import Format
from qhal.tensors import QTensor
from qhal.wire import encode_part
from qhal_conformance.faults_ranks import Call, Kept, Together
from qhal_conformance.wrapping import Wrapped


class RankMissing(Together):
    """The last rank's numbers do not enter the sum."""

    def _spoil(self, call: Call) -> Any:
        if not call.sums or len(call.xs) < 2:
            return call.results()[call.rank]
        return call.changed(xs=[*call.xs[:-1], torch.zeros_like(call.xs[-1])])[call.rank]


class RankTwice(Together):
    """Rank 0's numbers enter the sum twice, the last rank's not."""

    def _spoil(self, call: Call) -> Any:
        return (call.changed(xs=[*call.xs[:-1], call.xs[0]]) if call.sums else call.results())[call.rank]


class RanksReversed(Together):
    """Moved rows come in the reverse order of the ranks."""

    def _spoil(self, call: Call) -> Any:
        y = call.results()[call.rank]
        if call.sums or not isinstance(y, Tensor) or len({len(x) for x in call.xs}) > 1:
            return y
        return torch.cat(list(y.split(-(-len(y) // len(call.xs)) or 1))[::-1])


class PartOneRowLate(Together):
    """A rank's part of the sum starts one row late."""

    def _spoil(self, call: Call) -> Any:
        results = call.results()
        if call.collective != "reduce_scatter":
            return results[call.rank]
        first = sum(len(y) for y in results[: call.rank])
        return torch.cat(results).roll(-1, 0)[first : first + len(results[call.rank])]


class LastPartNotReduced(Together):
    """The last rows are the owner's alone."""

    def _spoil(self, call: Call) -> Any:
        y = call.results()[call.rank]
        if call.collective == "all_reduce" and isinstance(y, Tensor):
            y = y.reshape(-1, y.shape[-1])
            rows = part_rows(len(y), len(call.xs))[-1]
            if rows:
                y[-rows:] = call.xs[-1].reshape(-1, y.shape[-1])[-rows:]
            y = y.reshape(call.xs[0].shape)
        return y


class ScaleOfOtherRank(Together):
    """A rank's codes are read with the scales of the rank after it."""

    def _spoil(self, call: Call) -> Any:
        f = call.codec.format
        if f.plain or call.codec.order != "sequential" or len({x.shape for x in call.xs}) > 1 or not call.xs[0].numel():
            return call.results()[call.rank]
        coded = [encode_part(x.reshape(-1, x.shape[-1]), call.codec) for x in call.xs]
        wrong = [replace(q, scale=coded[(r + 1) % len(coded)].scale) for r, q in enumerate(coded)]
        xs = [q.dequantize(x.dtype).reshape(x.shape) for q, x in zip(wrong, call.xs, strict=True)]
        return call.changed(xs=xs)[call.rank]


class RanksDiffer(Together):
    """On the last rank one number is the next one of its type."""

    def _spoil(self, call: Call) -> Any:
        y = call.results()[call.rank]
        if isinstance(y, Tensor) and y.numel() and call.rank and call.rank == len(call.xs) - 1:
            flat = y.reshape(-1)
            flat[0] = torch.nextafter(flat[0], torch.full_like(flat[0], torch.inf))
        return y


class NotQuantizedAlone(Together):
    """One rank alone hands its numbers through as they are."""

    def _spoil(self, call: Call) -> Any:
        return (call.xs if len(call.xs) == 1 else call.results())[call.rank]


class Options(Together):
    """Another codec than the one that was asked for."""

    def _codec(self, c: Codec) -> Codec:
        return c

    def _spoil(self, call: Call) -> Any:
        return call.changed(codec=self._codec(call.codec))[call.rank]


class OwnPartRaw(Options):
    """A rank's own part is not quantized."""

    def _codec(self, c: Codec) -> Codec:
        return replace(c, quantize_own=False)

    def _spoil(self, call: Call) -> Any:
        return call.results()[call.rank] if call.collective == "all_gather" else super()._spoil(call)


class OwnPartCoded(Options):
    """A rank's own part is quantized although it should enter as it is."""

    def _codec(self, c: Codec) -> Codec:
        return replace(c, quantize_own=True)


class BackInFloat(Options):
    """The sum is not quantized for the way back."""

    def _codec(self, c: Codec) -> Codec:
        return replace(c, requantize=False)


class BackInCodes(Options):
    """The sum is quantized for the way back although it should travel in its own type."""

    def _codec(self, c: Codec) -> Codec:
        return replace(c, requantize=True)


class ParityIgnored(Options):
    """Groups are consecutive columns although even and odd ones have their own."""

    def _codec(self, c: Codec) -> Codec:
        return replace(c, order="sequential")


class NarrowSum(Options):
    """Sums are in bf16."""

    def _codec(self, c: Codec) -> Codec:
        return replace(c, accumulate="bf16")


class _Rule(Options):
    """Codes or scales by another rule."""

    _fields: dict[str, Any] = {}  # noqa: RUF012 - never written

    def _codec(self, c: Codec) -> Codec:
        f = c.format
        return c if f.plain else replace(c, format=replace(f, rule=replace(f.rule, **self._fields)))


class ScaleByReciprocal(_Rule):
    """Scales are amax * (1 / qmax)."""

    _fields = {"scale": "rcp"}  # noqa: RUF012


class HalfAway(_Rule):
    """Codes are rounded half away from zero."""

    _fields = {"round": "away"}  # noqa: RUF012


class WiderGroups(Options):
    """Groups are twice as wide."""

    def _codec(self, c: Codec) -> Codec:
        b = c.format.block
        if b is None or b.kind != "group" or c.order != "sequential" or not c.format.scale or not c.format.scale.plain:
            return c
        return replace(c, format=Format.parse(str(c.format).replace(f"g{b.cols}", f"g{2 * b.cols}")))


class QuantizedBeforeCut(Together):
    """The whole tensor is quantized and then cut: blocks reach into other parts."""

    def _spoil(self, call: Call) -> Any:
        if call.collective != "all_to_all" or not call.decode:
            return call.results()[call.rank]
        whole = [encode_part(x, call.codec).dequantize() for x in call.xs]
        y = call.changed(xs=whole, codec=Codec(Format("fp32")))[call.rank]
        return y.to(call.xs[0].dtype)


class LastRowLost(Together):
    """The rest of rows that do not divide by the ranks stays zero."""

    def _spoil(self, call: Call) -> Any:
        y = call.results()[call.rank]
        rest = call.xs[0].shape[0] % len(call.xs)
        if isinstance(y, Tensor) and call.collective == "all_reduce" and rest:
            y[-rest:] = 0
        return y


class LastColumnLost(Together):
    """Columns past the last whole group stay zero."""

    def _spoil(self, call: Call) -> Any:
        y, b = call.results()[call.rank], call.codec.format.block
        if isinstance(y, Tensor) and b is not None and b.kind == "group" and y.shape[-1] % b.cols:
            y[..., y.shape[-1] // b.cols * b.cols :] = 0
        return y


class SplitsIgnored(Together):
    """Parts are as equal as they can be although splits were given."""

    def _spoil(self, call: Call) -> Any:
        return (call.changed(splits=None) if call.collective == "reduce_scatter" else call.results())[call.rank]


class CodesWanted(Together):
    """decode=False is ignored."""

    def _spoil(self, call: Call) -> Any:
        return call.changed(decode=True)[call.rank]


class CodesOfFirst(Together):
    """With decode=False every part has the scales of the first row."""

    def _spoil(self, call: Call) -> Any:
        y = call.results()[call.rank]
        if isinstance(y, QTensor) and isinstance(y.scale, Tensor) and y.scale.numel():
            return replace(y, scale=y.scale[:1].expand_as(y.scale).contiguous())
        return y


class MutatesX(Kept):
    """x holds the result afterwards."""

    def _after(self, x: Tensor, y: Any) -> Any:
        if isinstance(y, Tensor) and y.shape == x.shape:
            x.copy_(y)
        return y


class IgnoresOut(Kept):
    """`out` is not written."""

    _out = False


class Float32Result(Kept):
    """The result is float32."""

    def _after(self, x: Tensor, y: Any) -> Any:
        return y.float() if isinstance(y, Tensor) else y


class NoHandle(Kept):
    """async_op returns the result, not a handle."""

    _async = False


COMM_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = tuple(
    (name, "comm", kind.__doc__ or "", kind)
    for name, kind in (
        ("comm-rank-missing", RankMissing),
        ("comm-rank-twice", RankTwice),
        ("comm-ranks-reversed", RanksReversed),
        ("comm-part-late", PartOneRowLate),
        ("comm-last-part", LastPartNotReduced),
        ("comm-scale-of-rank", ScaleOfOtherRank),
        ("comm-ranks-differ", RanksDiffer),
        ("comm-alone", NotQuantizedAlone),
        ("comm-own-raw", OwnPartRaw),
        ("comm-own-coded", OwnPartCoded),
        ("comm-back-in-float", BackInFloat),
        ("comm-back-in-codes", BackInCodes),
        ("comm-parity-ignored", ParityIgnored),
        ("comm-narrow-sum", NarrowSum),
        ("comm-scale-reciprocal", ScaleByReciprocal),
        ("comm-half-away", HalfAway),
        ("comm-wider-groups", WiderGroups),
        ("comm-before-cut", QuantizedBeforeCut),
        ("comm-last-row", LastRowLost),
        ("comm-last-columns", LastColumnLost),
        ("comm-splits-ignored", SplitsIgnored),
        ("comm-decoded", CodesWanted),
        ("comm-scales-of-first", CodesOfFirst),
        ("comm-mutates-x", MutatesX),
        ("comm-ignores-out", IgnoresOut),
        ("comm-float32", Float32Result),
        ("comm-no-handle", NoHandle),
    )
)
"""(name, profile, what is wrong, class)"""
