"""Numbers as the emulated operators read them: dtype arguments, E2M1 codes, E8M0 bytes, scale words, int4 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from qhal_npu.layouts import from_scale_words, unpack_int4, unpack_nibbles

F32 = torch.float32
Kind = torch.dtype | str
_SCALAR: dict[int, Kind] = {
    0: torch.uint8, 1: torch.int8, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: F32, 12: torch.int8,
    15: torch.bfloat16, 16: "int4", 23: torch.float8_e5m2, 24: torch.float8_e4m3fn,
}  # fmt: skip
_ACL: dict[int, Kind] = {
    256: F32, 257: torch.float16, 258: torch.int8, 259: torch.int32, 283: torch.bfloat16, 285: "int4",
    291: torch.float8_e5m2, 292: torch.float8_e4m3fn, 293: "e8m0", 296: "e2m1",
}  # fmt: skip
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def kind(number: int | None, default: Kind = torch.int8) -> Kind:
    """torch's scalar type number, or 256 + aclDataType as torch_npu numbers what torch has no word for."""
    if number is None:
        return default
    return _ACL[number] if number >= 256 else _SCALAR[number]


def e2m1(packed: Tensor) -> Tensor:
    """float32 [..., 2j] of bytes [..., j]."""
    codes = unpack_nibbles(packed).long()
    return torch.where(codes > 7, -_E2M1[codes & 7], _E2M1[codes & 7])


def to_e2m1(x: Tensor, mode: str) -> Tensor:
    """Bytes of float32 [..., 2j]: nearest, ties to even ("rint") or away from zero ("round"); saturates."""
    size = torch.nan_to_num(x.abs(), 0.0, 6.0).clamp(max=6.0)
    middles = (_E2M1[1:] + _E2M1[:-1]) / 2
    low, high = torch.bucketize(size, middles), torch.bucketize(size, middles, right=True)
    code = torch.where(low % 2 == 0, low, high) if mode == "rint" else high
    code = code | (torch.signbit(x).long() << 3)
    pairs = code.reshape(*code.shape[:-1], -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).to(torch.uint8)


def e8m0(bytes_: Tensor) -> Tensor:
    """2^(byte - 127), 255 is NaN."""
    power = torch.exp2(bytes_.double() - 127).float()
    return torch.where(bytes_ == 255, torch.nan, power)


def scale_value(s: Tensor) -> Tensor:
    """float32 of a scale, or of the words that carry one."""
    return from_scale_words(s) if s.dtype == torch.int64 else s.to(F32)


def int4_weight(w: Tensor) -> Tensor:
    """int8 [..., K, N] of an int32 weight: [K, N/8] contiguous, or [K/8, N] as a view of [N, K/8]."""
    rows = w.stride(-1) == 1 or w.size(-1) == 1
    return unpack_int4(w) if rows else unpack_int4(w.transpose(-1, -2)).transpose(-1, -2)


def sums(a: Tensor, b: Tensor) -> Tensor:
    """The exact integer product."""
    return (a.double() @ b.double()).to(torch.int64)
