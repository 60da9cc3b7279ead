"""Quantized collectives a second time, in numpy: what every rank must get, and how far a sum may be from it.

Independent of `qhal.collectives` and `qhal.wire` on purpose; both follow the docstrings of `qhal.codecs` and of
`QuantOps.comm_quant`. With x_r the decoded codes of rank r:

    |y - ref| <= 1/2 ulp_out (1 + 2^-7) + (N - 1) * 2^-24 * sum_r |x_r| + what quantizing again may add

and 2 N - 1 roundings of 2^-11 or 2^-8 where codec.accumulate is fp16 or bf16. The last term is half a step of the codes
on the way back, or what the reference itself loses there where a rounded scale saturates, and the rounding of that
scale. Results that are only moved, and sums that are exact in any order, are compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from qhal.codecs import Codec
from qhal.elements import WIDE
from qhal.tensors import QTensor
from qhal_conformance import elements
from qhal_conformance.decode import decode
from qhal_conformance.elements import round_wide
from qhal_conformance.encode import quantize
from qhal_conformance.generator import F32, F64, I64
from qhal_conformance.tolerance import UNIT, ulp

_RUN = 64


@dataclass(frozen=True)
class Expected:
    """What one rank gets: value by the definition, in rank order; ref exactly; bound of |y - ref|."""

    value: F32
    ref: F64
    bound: F64

    @staticmethod
    def joined(parts: Sequence[Expected]) -> Expected:
        """Rows after rows."""
        return Expected(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("value", "ref", "bound")))


def shares(rows: int, world: int) -> list[int]:
    """Rows of every part without splits: as equal as they can be, the longer ones first."""
    return [len(part) for part in np.array_split(np.arange(rows), world)]


def encoded(x: F32, codec: Codec) -> tuple[QTensor, I64]:
    """A part as codes and scales, and where each column of x stands in them.

    order=parity: of 64 columns the even ones come first, then the odd ones, so that 32 and 32 share a scale.
    """
    columns = np.arange(x.shape[1])
    if codec.order == "sequential":
        return quantize(x, codec.format), columns
    wide = np.pad(x, ((0, 0), (0, -x.shape[1] % _RUN)))
    run, place = columns // _RUN, columns % _RUN
    where = run * _RUN + place % 2 * (_RUN // 2) + place // 2
    order = np.arange(wide.shape[1]).reshape(-1, _RUN // 2, 2).transpose(0, 2, 1).reshape(-1)
    return quantize(np.ascontiguousarray(wide[:, order]), codec.format), where


def received(x: F32, codec: Codec) -> F32:
    """What a part is worth after it has travelled."""
    q, where = encoded(x, codec)
    return np.asarray(decode(q).value[:, where])


def gathered(xs: Sequence[F32], codec: Codec, out: str) -> Expected:
    """Parts that are only moved: exact, then rounded once."""
    value = np.concatenate([received(x, codec) for x in xs])
    rounded = round_wide(out, value)
    return Expected(rounded, rounded.astype(np.float64), np.zeros(value.shape))


def reduced(parts: Sequence[F32], owner: int, codec: Codec, out: str, *, back: bool) -> Expected:
    """The sum of every rank's part, owned by rank `owner`; back: it travels to all ranks."""
    raw = not codec.quantize_own
    values = [x if raw and r == owner else received(x, codec) for r, x in enumerate(parts)]
    kind = codec.accumulate
    total = round_wide(kind, values[0])
    for value in values[1:]:
        total = round_wide(kind, total + round_wide(kind, value))
    ref = np.sum([v.astype(np.float64) for v in values], axis=0)
    size = np.sum([np.abs(v.astype(np.float64)) for v in values], axis=0)
    roundings = len(parts) - 1 if kind == "fp32" else 2 * len(parts) - 1
    room = roundings * UNIT[kind] * size
    if back and codec.requantize:
        again = _again(total, codec)
        value, room = received(total, codec), room + again
    else:
        value = total
    rounded = round_wide(out, value)
    bound = 0.5 * ulp(out, ref) * (1 + 2.0**-7) + room
    return Expected(rounded, ref, np.where((size == 0) & (room == 0), 0.0, bound))


def _again(total: F32, codec: Codec) -> F64:
    """What quantizing a sum may add, per element."""
    q, where = encoded(total, codec)
    f = codec.format
    lost = np.abs(decode(q).value[:, where].astype(np.float64) - total)
    if f.plain:
        return np.asarray(0.5 * ulp(f.element, total.astype(np.float64)))
    one = elements.nearest_code(f.element, np.ones(q.codes.shape))
    ones = torch.from_numpy(one.astype(np.uint8)).view(q.codes.dtype)
    unit = np.abs(decode(replace(q, codes=ones)).value[:, where].astype(np.float64))
    step = unit
    if not elements.is_integer(f.element):  # codes lie as far apart as the largest at or below the value and the next
        grid = np.unique(np.abs(elements.table(f.element)[elements.finite_codes(f.element)]))
        with np.errstate(divide="ignore", invalid="ignore"):
            place = np.searchsorted(grid, np.nan_to_num(np.abs(total) / unit), side="right")
        place = np.clip(place, 1, len(grid) - 1)
        step = (grid[place] - grid[place - 1]) * unit
    scale = f.scale.element if f.scale is not None and f.scale.plain else "bf16"
    rounded_scale = UNIT[scale] if scale in WIDE else 0.0
    return np.asarray(np.maximum(0.5 * step, lost) * (1 + 2.0**-7) + 2 * rounded_scale * np.abs(total))
