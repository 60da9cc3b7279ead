"""encode: choose codes and scales from data. The definition of every field of `Rule`, and of `QuantOps.quantize`.

Scales are computed from the outermost level in. In fp32 (or rounded to bf16 after every step, `arith=bf16`):
  peak   amax of the block (minmax: max(hi, 0) - min(lo, 0); signed: the value of largest magnitude)
  scale  peak / qmax, rounded to the scale's type (e8m0: an exponent, see `qhal.exponents`; nested: peak / qmax in
         units of an outer scale that is peak / (qmax * largest inner scale) over its own block; the largest inner scale
         of a wide float or an e8m0 is 1). A scale that divides (`/`) is stored as qmax / peak
  offset minmax: what the smallest code has to add; mean: one value, the exact mean of the tensor rounded once, and
         everything above is of x - offset. A nested scale with an offset is `encode` of the scales peak / qmax
  code   round(x / scale + zero), saturated
Only peaks and codes look at every element; both go over x some rows at a time, so that temporaries stay in the cache
and memory stays near the size of the result. Blocks are never mixed: the parts change no bit.
Sources: OCP Microscaling Formats v1.0 section 6.3 (MX, `floor`); the tools' rules were measured on their own files.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from qhal.elements import Element, decode, dynamic_map, element
from qhal.errors import FormatError
from qhal.exponents import exponent_codes, reach
from qhal.formats import Format
from qhal.parts import at, parts, stacked
from qhal.rounding import to_codes, to_plane
from qhal.rules import Rule
from qhal.tensors import QTensor

_TINY = torch.finfo(torch.float32).eps
_SHORT = 32  # elements of a block along which `amax` is no longer slow


def encode(
    x: Tensor,
    to: Format,
    *,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    clip: tuple[float, float] = (1.0, 1.0),
) -> QTensor:
    """Quantize a float tensor [..., N, K] (activations [T, K]: rows are tokens) to `to`; exact by its rule.

    scale, zero  static: fix the outermost level, numbers (not codes), one or one per block in its grid's order
    clip         (low, high) fractions of the range that are kept, see Rule.clip
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise FormatError(f"quantize to {to}: x is {x.dtype} {tuple(x.shape)}, must be float [..., N, K]")
    x, rule, e = x.detach(), to.rule, element(to.element)
    if to.block is None or to.scale is None:
        if to.zero is not None:
            raise FormatError(f"quantize to {to}: a zero point without a scale cannot be computed")
        return QTensor(to, to_codes(_clean(x, to), e, rule.round), table=_table(e, x.device))
    numbers: dict[str, Tensor] = {}
    offset: Tensor | QTensor | None = None
    if rule.domain == "mean":
        offset = _mean_plane(_arith(_clean(x, to), rule), to)
        numbers["mean"] = _number(offset, to.offset)
    lo, hi = _range(x, to, clip, numbers)
    peak = _peak(lo, hi, rule)
    divisor = 1.0 if scale is not None and to.scale.plain else _divisor(to)  # a static scale asks for no largest code
    plane = _scale_plane(peak, divisor, to, rule, scale)
    number = numbers["scale"] = _number(plane, to.scale)
    zeros: Tensor | None = None
    if to.zero is not None:
        zeros = _zero_plane(to, lo, number, None if zero is None else _static(zero, to, peak))
        numbers["zero"] = _number(zeros, to.zero)
    if to.offset is not None and offset is None:
        offset = _offset_plane(to, lo, number)
        numbers["offset"] = _number(offset, to.offset)
    if rule.clip == "range":
        numbers |= {"lo": lo, "hi": hi}
    return QTensor(to, _codes(x, to, numbers), plane, zeros, offset, table=_table(e, x.device))


def _range(x: Tensor, to: Format, clip: tuple[float, float], numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The lowest and the highest number of every block, on its grid; both ranges include 0."""
    assert to.block is not None
    block, shape = to.block, x.shape[:-2]
    shared = block.kind in ("tensor", "head", "col")  # see Block.split: these span the leading axes
    grid = block.grid(*x.shape[-2:])
    found = torch.zeros(2, 1 if shared else shape.numel(), *grid, dtype=torch.float32, device=x.device)
    lo, hi = found
    planes = {name: stacked(plane) for name, plane in numbers.items()}
    for part, place in parts(x, block):
        blocks = block.split(_read(part, to, {name: at(plane, place) for name, plane in planes.items()}))
        low, high = at(lo, place), at(hi, place)
        torch.minimum(low, -_highest(-blocks) if blocks.shape[-1] < _SHORT else blocks.amin(-1), out=low)
        torch.maximum(high, _highest(blocks), out=high)
    if clip != (1.0, 1.0):
        lo *= clip[0]
        hi *= clip[1]
    found += 0.0  # there is one zero, and one NaN: which of them a maximum gives depends on its place in a register
    found.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)
    lead = [1] * len(shape) if shared else shape
    return lo.reshape(*lead, *grid), hi.reshape(*lead, *grid)


def _read(x: Tensor, to: Format, numbers: dict[str, Tensor]) -> Tensor:
    """x as everything sees it: float32, its special values as the format says, rounded, less a mean."""
    x = _arith(_clean(x, to), to.rule)
    return _without(x, numbers["mean"], to) if "mean" in numbers else x


def _highest(blocks: Tensor) -> Tensor:
    """`blocks.amax(-1)`; of short blocks as a pooling, which is several times as fast. NaN wins in both."""
    if blocks.shape[-1] >= _SHORT:
        return blocks.amax(-1)
    rows = blocks.flatten(-2).flatten(0, -2)
    return max_pool1d(rows, blocks.shape[-1]).reshape(blocks.shape[:-1])


def _codes(x: Tensor, to: Format, numbers: dict[str, Tensor]) -> Tensor:
    """The code of every element, from the numbers on the grid of its block."""
    assert to.block is not None
    e, block = element(to.element), to.block
    planes = {name: stacked(plane) for name, plane in numbers.items()}
    codes = torch.empty(x.shape, dtype=e.storage, device=x.device)
    for part, place in parts(x, block):
        here = {name: at(plane, place) for name, plane in planes.items()}
        made = to_codes(_quotient(_read(part, to, here), to, here), e, to.rule.round)
        if place is None:
            return made.reshape(x.shape)
        stacked(codes)[place[:2]] = made
    return codes


def _quotient(x: Tensor, to: Format, numbers: dict[str, Tensor]) -> Tensor:
    """What is rounded to a code: x / scale + zero, of an x less its offset. x: float32 whole blocks."""
    assert to.block is not None
    rule, expand = to.rule, to.block.expand
    per = {name: expand(plane, x.shape) for name, plane in numbers.items() if name != "mean"}
    s = per["scale"]
    if "lo" in per:  # a number inside keeps its bits, -0 too
        x = torch.where(x < per["lo"], per["lo"], torch.where(x > per["hi"], per["hi"], x))
    if "offset" in per:
        x = _without(x, per["offset"], to)
    if to.op == "*" and rule.apply == "div":
        q = _arith(x / s, rule)
    else:
        q = _arith(x * (s if to.op == "/" else 1.0 / s), rule)
    if _some(numbers["scale"] == 0):
        q = torch.where(s == 0, torch.where(torch.isnan(x), x, torch.zeros_like(x)), q)
    return _arith(q + per["zero"], rule) if "zero" in per else q


def _some(mask: Tensor) -> bool:
    """Whether any is set; a device is not asked, since that would wait for it."""
    return not mask.is_cpu or bool(mask.any())


def _scale_plane(
    peak: Tensor, divisor: float, to: Format, rule: Rule, static: Tensor | None, unit: float = 1.0
) -> Tensor | QTensor:
    """The plane whose value is peak / divisor (its reciprocal for `/`), in the format `to.scale`.

    static  fixes the outermost level
    unit    what peak is divided by to be in units of `to`: 1 for the tensor itself, the levels below for a scale
    """
    fmt = to.scale
    assert fmt is not None
    if fmt.plain:
        e = element(fmt.element)
        if static is not None:
            return to_plane(_static(static, to, peak), e)
        if to.op == "/":
            return _reciprocal_plane(peak, divisor, to, rule, unit)
        if e.kind == "exponent":
            return exponent_codes(peak if unit == 1 else peak / unit, to, rule)
        raw = _divide(peak, divisor, rule)
        if rule.empty != "zero":
            raw = torch.where(peak == 0, 1.0 if rule.empty == "one" else _TINY, raw)
        return to_codes(raw, e, "even")
    if to.op == "/":
        raise FormatError(f"{to}: a dividing scale must be a plain number")
    assert fmt.block is not None
    if fmt.offset is not None:
        return encode(_divide(peak, divisor, rule), fmt, scale=static)
    inner = element(fmt.element)
    blocks = fmt.block.split(peak.abs())
    outer_peak = blocks.amax(-1) if blocks.shape[-1] else blocks.new_zeros(blocks.shape[:-1])
    outer = _scale_plane(outer_peak, divisor * reach(fmt, inner), fmt, fmt.rule, static, divisor)
    value = fmt.block.expand(_number(outer, fmt.scale), peak.shape)
    if inner.kind == "exponent":
        rest = peak / value if fmt.op == "*" else peak * value
        return QTensor(fmt, exponent_codes(torch.where(peak == 0, 0.0, rest), to, rule), outer)
    wanted = _divide(peak, divisor, rule)
    ratio = wanted / value if fmt.op == "*" else wanted * value
    ratio = torch.where(peak == 0, 0.0, ratio)  # an all-zero block has scale code 0 under any outer scale
    return QTensor(fmt, to_codes(ratio, inner, fmt.rule.round), outer, table=_table(inner, peak.device))


def _reciprocal_plane(peak: Tensor, divisor: float, to: Format, rule: Rule, unit: float) -> Tensor:
    """A scale that divides: divisor / peak, 1 for an all-zero block; finite and not 0 for a finite peak."""
    assert to.scale is not None
    e = element(to.scale.element)
    if rule.empty != "one":
        raise FormatError(f"quantize to {to}: a dividing scale of an all-zero block is 1; empty={rule.empty} has none")
    if e.kind == "exponent":  # 2^-p for 2^p, exactly; 255 is NaN
        codes = exponent_codes(peak if unit == 1 else peak / unit, to, rule)
        return torch.where(codes == 255, codes, 254 - codes)
    if e.kind != "float":
        raise FormatError(f"quantize to {to}: {e.name} holds no reciprocals; let a float or e8m0 divide")
    d = torch.full((), divisor, dtype=torch.float32, device=peak.device)
    raw = d / peak if rule.scale == "div" else 1.0 / (peak * (1.0 / d))
    raw = _bf16(raw) if rule.arith == "bf16" else raw
    kept = torch.copysign(raw.abs().clamp(torch.finfo(e.storage).smallest_normal, e.largest), raw)
    raw = torch.where(torch.isfinite(peak), kept, raw)
    return to_codes(torch.where(peak == 0, 1.0, raw), e, "even")


def _divisor(f: Format) -> float:
    """What the peak is divided by; FormatError where the element and the rule leave no range to scale into."""
    e, domain = element(f.element), f.rule.domain
    if e.wide and (f.rule.qmax is None or domain != "amax"):
        raise FormatError(
            f"quantize to {f}: {f.element} has no largest code to scale to; write plain {f.element}, set qmax, "
            "or give a static scale"
        )
    if domain == "minmax":
        if f.zero is None and f.offset is None and e.smallest < 0:
            raise FormatError(f"quantize to {f}: domain=minmax needs a zero point or an offset")
        return e.largest - e.smallest
    if domain == "signed" and e.smallest == 0:
        raise FormatError(f"quantize to {f}: {f.element} has no negative code; use domain=minmax")
    if domain in ("amax", "mean") and f.qmax == 0:
        other = "signed" if e.smallest < 0 else "minmax"
        raise FormatError(f"quantize to {f}: {f.element} has no positive code; use domain={other}")
    return e.smallest if domain == "signed" else f.qmax


def _divide(peak: Tensor, divisor: float, rule: Rule) -> Tensor:
    d = torch.full((), divisor, dtype=torch.float32, device=peak.device)
    raw = peak / d if rule.scale == "div" else peak * (1.0 / d)
    return _bf16(raw) if rule.arith == "bf16" else raw


def _zero_plane(to: Format, lo: Tensor, scale: Tensor, static: Tensor | None) -> Tensor:
    fmt = to.zero
    assert fmt is not None
    if not fmt.plain:
        raise FormatError(f"quantize to {to}: nested zero points cannot be computed")
    e, z = element(to.element), element(fmt.element)
    if static is not None:
        return to_plane(static, z)
    if to.rule.domain == "minmax":
        if z.integer and (z.smallest > e.smallest or z.largest < e.largest):
            raise FormatError(f"quantize to {to}: {z.name} does not hold every zero point of {e.name}; use {e.name}")
        steps = lo * scale if to.op == "/" else lo / scale
        ideal = e.smallest - torch.where(scale == 0, torch.zeros_like(lo), steps)
    else:
        ideal = torch.full_like(lo, 0.0 if e.smallest < 0 else 2.0 ** (e.bits - 1))
    if z.integer and z.bits == e.bits:
        ideal = ideal.clamp(e.smallest, e.largest)
    return to_codes(ideal, z, "even")


def _mean_plane(x: Tensor, to: Format) -> Tensor:
    """[..., 1, 1]: the mean of the last two axes in the offset's type, with its sign; exact, rounded once."""
    if to.offset is None or to.zero is not None or not to.offset.plain:
        raise FormatError(f"quantize to {to}: domain=mean needs a plain offset and no zero point")
    rows = x.flatten(-2).reshape(-1, x.shape[-2:].numel())
    finite = torch.isfinite(rows).all(-1).tolist()
    means = [math.fsum(r.tolist()) / max(r.numel(), 1) if ok else math.nan for r, ok in zip(rows, finite, strict=True)]
    mean = torch.tensor(means, dtype=torch.float64, device=x.device).float().reshape(*x.shape[:-2], 1, 1)
    return to_codes(to.offset_sign * mean, element(to.offset.element), "even")


def _without(x: Tensor, offset: Tensor, to: Format) -> Tensor:
    return x - offset if to.offset_sign > 0 else x + offset


def _table(e: Element, device: torch.device) -> Tensor | None:
    """The table that a QTensor of this element carries: a copy of lut8's; nf4's is part of the format."""
    return dynamic_map().to(device, copy=True) if e.name == "lut8" else None


def _offset_plane(to: Format, lo: Tensor, scale: Tensor) -> Tensor | QTensor:
    assert to.offset is not None
    if to.rule.domain != "minmax":
        raise FormatError(
            f"quantize to {to}: an offset is computed with domain=minmax or mean; {to.rule.domain} has none"
        )
    smallest = element(to.element).smallest
    lowest = lo - (smallest / scale if to.op == "/" else smallest * scale)
    wanted = lowest if to.offset_sign > 0 else -lowest
    if to.offset.plain:
        return to_codes(wanted, element(to.offset.element), "even")
    return encode(wanted, to.offset)


def _peak(lo: Tensor, hi: Tensor, rule: Rule) -> Tensor:
    if rule.domain == "minmax":
        return hi - lo
    if rule.domain == "signed":
        return torch.where(hi > -lo, hi, lo)
    return torch.maximum(hi, 0.0 - lo)  # not -lo: the negative of +0 is another zero


def _static(value: Tensor, to: Format, grid: Tensor) -> Tensor:
    """A static value in the shape of its plane: one fills it."""
    value = value if value.is_floating_point() else value.float()
    if value.numel() == 1:
        return value.reshape([1] * grid.dim()).expand(grid.shape)
    if value.numel() != grid.shape[-2:].numel():
        raise FormatError(f"{to}: a static scale of {value.numel()} values does not fill a grid of {tuple(grid.shape)}")
    return value.reshape(*[1] * (grid.dim() - 2), *grid.shape[-2:]).expand(grid.shape)


def _number(plane: Tensor | QTensor, fmt: Format | None) -> Tensor:
    assert fmt is not None
    return plane.dequantize() if isinstance(plane, QTensor) else decode(fmt.element, plane)


def _clean(x: Tensor, to: Format) -> Tensor:
    """x in float32, with what the format says of special values and zeros checked or done."""
    x = x.float()
    if to.rule.special == "error" and not bool(torch.isfinite(x).all()):
        raise FormatError(f"quantize to {to}: the input has NaN or Inf and the rule says special=error")
    if to.sparsity is not None:
        _check_sparse(x, to)
    return torch.nan_to_num(x) if to.rule.special == "saturate" else x


def _check_sparse(x: Tensor, to: Format) -> None:
    assert to.sparsity is not None
    n, m = to.sparsity
    if x.shape[-1] % m or bool(((x.reshape(*x.shape[:-1], -1, m) != 0).sum(-1) > n).any()):
        raise FormatError(f"quantize to {to}: more than {n} of {m} consecutive values are nonzero; prune first")


def _arith(x: Tensor, rule: Rule) -> Tensor:
    return _bf16(x) if rule.arith == "bf16" else x


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()
