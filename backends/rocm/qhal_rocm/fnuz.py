"""OCP's fp8 on a chip whose matrix instructions read the other flavour (gfx942): the same bytes, half as large.

A weight's bytes serve as both at once, after -0 has become +0 (0x80 is fnuz' NaN; a restored -0 is +0, which the
contract allows). NaN bytes have no counterpart and are refused. So nothing is kept twice: the factor, 2 for each
operand, goes into the scales of the activations, out of place and exactly. Activations are new in every call, and their
NaN stay NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhal.elements import element
from qhal.errors import FormatError
from qhal.flavours import FNUZ

FACTOR = 2.0
"""A number of OCP's flavour is this times the fnuz number of the same byte."""


def foreign(name: str, native: frozenset[str]) -> bool:
    """Whether an element is OCP's flavour on a chip that has only the other one."""
    return name not in native and FNUZ.get(name) in native


def refuse_nan(codes: Tensor) -> None:
    """FormatError if a weight has codes that are no finite number; waits for the device, once, when it is prepared."""
    if not bool(torch.isfinite(codes.float()).all()):
        raise FormatError(
            f"the weight has NaN or Inf among its {codes.dtype} codes, which the fnuz flavour does not have"
        )


def weight(codes: Tensor, name: str) -> Tensor:
    """The codes in place without -0, viewed as the other flavour."""
    raw = codes.view(torch.uint8)
    raw.masked_fill_(raw == 0x80, 0)
    return codes.view(element(FNUZ[name]).storage)


def activation(codes: Tensor, name: str) -> Tensor:
    """The codes as the other flavour, in a tensor of their own: -0 becomes +0, NaN stays NaN, Inf becomes NaN."""
    raw = codes.view(torch.uint8)
    largest = {"e4m3fn": 0x7E, "e5m2": 0x7B}[name]
    made = torch.where((raw & 0x7F) > largest, 0x80, torch.where(raw == 0x80, 0, raw))
    return made.to(torch.uint8).view(element(FNUZ[name]).storage)
