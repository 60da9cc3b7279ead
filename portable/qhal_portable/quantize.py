"""quantize: `qhal.encoding.encode` is the definition of every rule; here are its arguments and errors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qhal.elements import WIDE
from qhal.encoding import encode
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.specs import Operand
from qhal.tensors import QTensor


def _encode(x: Tensor, o: Operand) -> QTensor:
    return encode(x, o.format, scale=o.scale, zero=o.zero, clip=o.clip)


def quantize(
    x: Tensor,
    to: Operand | Format,
    device: torch.device,
    out: QTensor | None = None,
    *,
    by: Callable[[Tensor, Operand], QTensor] = _encode,
) -> QTensor:
    """[..., K] to codes and scales by the rule of the format; written into the planes of `out` if it is given.

    by: what makes them of a checked x
    """
    o = to if isinstance(to, Operand) else Operand(to)
    if not isinstance(x, Tensor) or x.dtype not in WIDE.values() or x.dim() < 2:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise FormatError(f"quantize to {o.format}: x is {found}, must be bf16, fp16 or fp32 [..., T, K]")
    if x.device != device:
        raise FormatError(f"quantize to {o.format}: x is on {x.device}, must be on {device}")
    if o.per_expert:
        raise FormatError(f"quantize to {o.format}: the scales are one row per expert; choose one with Operand.expert")
    q = by(x.detach(), o)
    return q if out is None else write(q, out)


def write(q: QTensor, out: QTensor) -> QTensor:
    """The planes of `q` copied into those of `out`; FormatError if they are others."""
    ours, theirs = q.planes(), out.planes()
    if out.format != q.format or out.layout != q.layout or ours.keys() != theirs.keys():
        raise FormatError(f"out is a {out.format} tensor in layout {out.layout}, the result is {q.format}")
    for name, plane in theirs.items():
        if (plane.shape, plane.dtype) != (ours[name].shape, ours[name].dtype):
            found = f"{plane.dtype} {tuple(plane.shape)}"
            raise FormatError(f"out.{name} is {found}, the result is {ours[name].dtype} {tuple(ours[name].shape)}")
    for name, plane in theirs.items():
        plane.copy_(ours[name])
    return out
