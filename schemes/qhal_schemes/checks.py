"""Checks of values that a reader makes before it hands tensors on: scales, group indices, codes.

A NaN scale turns into text that looks almost right; here it is one error that names the file and the tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhal.parts import PART
from qhal_schemes.source import TensorIndex


def scales(index: TensorIndex, name: str, values: Tensor, *, zero_ok: bool = False, positive: bool = False) -> None:
    """Scales must be finite and, unless a format rounds small ones to zero, not zero. E8M0 bytes: 255 is NaN.

    Scales of weights may be negative (some tools use the code -8 for the largest value), those of inputs may not.
    """
    if values.dtype == torch.uint8 or values.dtype == torch.float8_e8m0fnu:
        nan = int((values.view(torch.uint8) == 255).sum())
        if nan:
            raise index.bad(name, "exponents below 255 (NaN)", f"{nan} of {values.numel()} are 255")
        return
    if zero_ok and values.dtype == torch.float8_e4m3fn and not positive:
        if _has_nan(values):
            nan = int(torch.isnan(values.float()).sum())
            raise index.bad(
                name, "finite scales", f"{nan} NaN, 0 Inf, {int((values.float() == 0).sum())} zero of {values.numel()}"
            )
        return
    numbers = values.float() if values.dtype.itemsize == 1 else values
    good = (numbers > 0).all() if positive else (numbers != 0).all()
    if bool(torch.isfinite(numbers).all()) and (zero_ok or bool(good)):
        return
    if positive and bool((numbers < 0).any()):
        raise index.bad(name, "positive scales", f"{int((numbers < 0).sum())} negative of {numbers.numel()}")
    nan, inf = int(torch.isnan(numbers).sum()), int(torch.isinf(numbers).sum())
    zero = int((numbers == 0).sum())
    expected = "finite scales" if zero_ok else "finite scales that are not zero"
    raise index.bad(name, expected, f"{nan} NaN, {inf} Inf, {zero} zero of {numbers.numel()}")


def finite(index: TensorIndex, name: str, values: Tensor) -> None:
    """Biases and rotation matrices must be finite."""
    if not bool(torch.isfinite(values).all()):
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
