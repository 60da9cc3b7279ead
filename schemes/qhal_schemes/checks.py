"""Checks of values that a reader makes before it hands tensors on: scales, group indices, codes.

A NaN scale turns into text that looks almost right; here it is one error that names the file and the tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhal.parts import PART
from qhal_schemes.source import TensorIndex

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITE = {
    torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C, torch.float16: 0x7C00, torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000,
}  # fmt: skip
"""The bits of the smallest magnitude that is no finite number."""


def scales(index: TensorIndex, name: str, values: Tensor, *, zero_ok: bool = False, positive: bool = False) -> None:
    """Scales must be finite and, unless a format rounds small ones to zero, not zero. E8M0 bytes: 255 is NaN.

    Scales of weights may be negative (some tools use the code -8 for the largest value), those of inputs may not.
    """
    if values.dtype == torch.uint8 or values.dtype == torch.float8_e8m0fnu:
        exponents = values.view(torch.uint8)
        if exponents.numel() and int(exponents.amax()) == 255:
            nan = int((exponents == 255).sum())
            raise index.bad(name, "exponents below 255 (NaN)", f"{nan} of {values.numel()} are 255")
        return
    if zero_ok and values.dtype == torch.float8_e4m3fn and not positive:
        if _has_nan(values):
            nan = int(torch.isnan(values.float()).sum())
            raise index.bad(
                name, "finite scales", f"{nan} NaN, 0 Inf, {int((values.float() == 0).sum())} zero of {values.numel()}"
            )
        return
    if _sound(values, zero_ok, positive):
        return
    numbers = values.float() if values.dtype.itemsize == 1 else values
    if positive and bool((numbers < 0).any()):
        raise index.bad(name, "positive scales", f"{int((numbers < 0).sum())} negative of {numbers.numel()}")
    nan, inf = int(torch.isnan(numbers).sum()), int(torch.isinf(numbers).sum())
    zero = int((numbers == 0).sum())
    expected = "finite scales" if zero_ok else "finite scales that are not zero"
    raise index.bad(name, expected, f"{nan} NaN, {inf} Inf, {zero} zero of {numbers.numel()}")


def _sound(values: Tensor, zero_ok: bool, positive: bool) -> bool:
    """Whether floats are finite and, unless zero_ok, not zero (positive: above it), from their bits in two passes."""
    if not values.numel():
        return True
    bits = values.contiguous().view(_BITS[values.dtype.itemsize])
    least, most = (int(v) for v in torch.aminmax(bits & torch.iinfo(bits.dtype).max))
    return most < _INFINITE[values.dtype] and (zero_ok or (int(bits.amin()) if positive else least) > 0)


def finite(index: TensorIndex, name: str, values: Tensor) -> None:
    """Biases and rotation matrices must be finite."""
    quick = values.dtype in _INFINITE
    if not (_sound(values, zero_ok=True, positive=False) if quick else bool(torch.isfinite(values).all())):
        raise index.bad(name, "finite values", f"{int((~torch.isfinite(values)).sum())} NaN or Inf")


def float8_codes(index: TensorIndex, name: str, codes: Tensor) -> None:
    """e4m3fn codes must not be NaN (0x7F, 0xFF)."""
    if _has_nan(codes):
        raise index.bad(
            name, "FP8 codes that are numbers", f"{int(torch.isnan(codes.float()).sum())} NaN of {codes.numel()}"
        )


def _has_nan(codes: Tensor) -> bool:
    """Whether an e4m3fn tensor holds 0x7F or 0xFF; a part at a time, in the cache and without booleans."""
    raw = codes.reshape(-1).view(torch.uint8)
    return any(int((part & 0x7F).amax()) == 0x7F for part in raw.split(PART) if part.numel())


def code_range(index: TensorIndex, name: str, codes: Tensor, bits: int) -> None:
    """int8 storage of narrower signed codes: every value must fit `bits`."""
    if bits == 8 or codes.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(codes))
    limit = 1 << (bits - 1)
    if low < -limit or high >= limit:
        raise index.bad(name, f"int{bits} values {-limit}..{limit - 1}", f"values {low}..{high}")


def group_index(index: TensorIndex, name: str, values: Tensor, groups: int) -> None:
    """A group index names groups of the scale: 0 <= value < groups."""
    if values.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(values))
    if low < 0 or high >= groups:
        raise index.bad(name, f"group numbers 0..{groups - 1}", f"values {low}..{high}")


def indices(index: TensorIndex, name: str, values: Tensor, low: int, high: int) -> None:
    """Codes of a codebook stay inside it: low <= value <= high."""
    if values.numel() == 0:
        return
    least, most = (int(v) for v in torch.aminmax(values))
    if least < low or most > high:
        raise index.bad(name, f"indices {low}..{high} of a codebook", f"{least}..{most}")


def equal_groups(index: TensorIndex, name: str, values: Tensor, groups: int, size: int) -> None:
    """A group index gives every group `size` columns, the last one the rest: kernels sort by group and count on it."""
    found = torch.bincount(values.long(), minlength=groups).tolist()
    wanted = [min(size, values.numel() - g * size) for g in range(groups)]
    for g, (have, want) in enumerate(zip(found, wanted, strict=True)):
        if have != want:
            raise index.bad(name, f"{want} columns in group {g}", f"{have}")


def sequential(values: Tensor, size: int) -> bool:
    """Whether a group index is the trivial one: column k in group k // size."""
    return torch.equal(values.long(), torch.arange(values.numel()) // size)
