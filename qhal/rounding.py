"""Rounding a real number to an element's code: half to even (or away from zero), saturating, NaN kept where it exists.

Exact by construction: inputs are fp32, midpoints between neighbouring codes are representable, comparisons are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhal.elements import MINI, Element, decode, lookup, values
from qhal.errors import FormatError


def to_codes(q: Tensor, e: Element, mode: str = "even", table: Tensor | None = None) -> Tensor:
    """The code of element `e` nearest to each float32 in `q`, in `e.storage`; out of range saturates.

    NaN becomes the NaN of a float8 or wide float, and code 0 elsewhere (the caller's scale is NaN then). Tables (nf4,
    lut8): the nearest value, of two equally near ones the smaller; `mode` has no meaning for them.
    """
    if e.integer:
        rounded = torch.round(q) if mode == "even" else _away(q)
        whole = rounded.clamp_(e.smallest, e.largest).nan_to_num_(nan=0.0)
        if e.kind == "uint":
            whole = whole.to(torch.int32)  # torch has no vector code from float32 to uint8
        return whole.to(e.storage)
    if e.kind == "float":
        if mode == "even" or e.wide:
            clamped = q if e.wide else q.clamp(e.smallest, e.largest)  # NaN passes a clamp
            return clamped.to(e.storage)
        return _float8_away(q, e)
    if e.kind == "mini":
        return _mini(q, e, mode)
    if e.kind == "lut":
        lut = table if table is not None else lookup(e.name)
        if lut is None:
            raise FormatError(f"{e.name} needs a table to round to; none was given")
        order = torch.argsort(lut)
        ranked = lut[order].to(q.device).double()  # middles of float32 values are exact in float64
        upper = torch.bucketize(q.double(), (ranked[1:] + ranked[:-1]) / 2)
        return torch.where(torch.isnan(q), 0, order.to(q.device)[upper]).to(e.storage)
    raise FormatError(f"{e.name} holds exponents: it is a scale's type, not an element to round values to")


def to_plane(numbers: Tensor, e: Element) -> Tensor:
    """Given (static) scales or zero points as a plane of type `e`: wide floats as they are, others as codes.

    FormatError for an e8m0 plane of numbers that are no powers of two: rounding a given scale would change it.
    """
    if e.wide:
        return numbers
    if e.kind != "exponent":
        return to_codes(numbers.float(), e)
    mantissa, exponent = torch.frexp(numbers.float())
    if not bool((mantissa == 0.5).all()):
        raise FormatError(f"{e.name} holds powers of two from 2^-127 to 2^127, not {numbers.flatten()[:4].tolist()}")
    return (exponent + 126).clamp(0, 254).to(e.storage)


def _away(q: Tensor) -> Tensor:
    whole = torch.floor(q.abs())  # the fraction below is exact, so a value just under a tie stays under it
    return torch.copysign(whole + (q.abs() - whole >= 0.5), q)


def _mini(q: Tensor, e: Element, mode: str) -> Tensor:
    q = torch.nan_to_num(q, nan=0.0)
    code = _mini_even(q, e) if mode == "even" else _mini_away(q, e)
    sign = q.view(torch.int32).bitwise_right_shift(31).bitwise_and_(1 << (e.bits - 1))
    return code.bitwise_or_(sign).to(e.storage)


def _mini_even(q: Tensor, e: Element) -> Tensor:
    """The magnitude's code, int32, half to even: float32 addition rounds so, at the unit in the last place of its sum.

    Let p be the power of two at or below the magnitude, at least the smallest normal number. Codes of the binade that
    starts at p are p / 2^m apart, which is the unit of p * 2^(23-m) + magnitude: the sum's mantissa is the magnitude
    in such steps, rounded once, and its exponent counts the binades, of 2^m codes each.
    """
    _, m, bias = MINI[e.name]
    magnitude = q.abs().clamp_(max=e.largest)
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0 ** (1 - bias))
    total = power.mul_(2.0 ** (23 - m)).add_(magnitude).view(torch.int32)
    total -= (1 - bias + 23 - m + 127) << 23  # the exponent of the lowest binade
    return (total >> (23 - m)).add_(total).bitwise_and_((1 << (e.bits - 1)) - 1)


def _mini_away(q: Tensor, e: Element) -> Tensor:
    magnitudes = values(e.name)
    assert magnitudes is not None
    grid = magnitudes[: 1 << (e.bits - 1)].to(q.device)  # in rising order: a code is its rank
    return _nearest_away(q.abs().clamp(max=e.largest), grid).int()


def _float8_away(q: Tensor, e: Element) -> Tensor:
    codes = torch.arange(128, dtype=torch.uint8, device=q.device).view(e.storage)
    grid = decode(e.name, codes)
    grid = grid[torch.isfinite(grid)]
    magnitude = _nearest_away(q.abs().clamp(max=e.largest), grid).to(torch.uint8).view(e.storage)
    signed = torch.copysign(decode(e.name, magnitude), q)
    return torch.where(torch.isnan(q), q, signed).to(e.storage)


def _nearest_away(magnitude: Tensor, grid: Tensor) -> Tensor:
    """Index of the nearest grid value; a tie goes upwards."""
    middle = (grid[1:] + grid[:-1]) / 2
    # `bucketize` leaves a tie below; a boundary one step lower lifts it above, which is exact for fp32 inputs
    return torch.bucketize(magnitude, torch.nextafter(middle, torch.zeros_like(middle)))
