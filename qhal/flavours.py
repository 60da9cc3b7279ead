"""The two flavours of 8-bit floats: OCP's, and the one without -0 (fnuz), where the same bit pattern is half as large.

So a scaled tensor has the same numbers in both: codes stay, scales double (or halve on the way back). Checked for all
256 codes: of e4m3fn 253 go over as they are, -0 (0x80, fnuz' only NaN) becomes +0, and the two NaN (0x7F, 0xFF) have no
such code, they would read as 240. Back, 0x7F and 0xFF (240) have none: OCP would need 480.
Source: OCP 8-bit floating point specification 1.0 (section 5); Noune et al. 2022 (arXiv:2206.02915).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhal.elements import decode, element
from qhal.errors import FormatError

FNUZ = {"e4m3fn": "e4m3fnuz", "e5m2": "e5m2fnuz"}
"""OCP's element to the one of the other flavour with as many exponent and mantissa bits."""


def factor(old: str, new: str) -> float | None:
    """What scales are multiplied by when codes of `old` are read as `new`; None where the two are no such pair."""
    return 2.0 if FNUZ.get(old) == new else 0.5 if FNUZ.get(new) == old else None


def relabelled(codes: Tensor, old: str, new: str) -> Tensor:
    """The codes of `old` as codes of `new`, in a tensor of its own: new code * factor = old code, as numbers.

    FormatError names the first code that has no counterpart.
    """
    scale = factor(old, new)
    if scale is None:
        raise FormatError(f"{old} and {new} are not the two flavours of one float")
    raw = codes.view(torch.uint8)
    made = torch.where(raw == 0x80, 0, raw) if new in FNUZ.values() else raw.clone()
    made = made.view(element(new).storage)
    lost = decode(new, made) * scale != decode(old, codes)  # NaN equals nothing: it is lost too
    if bool(lost.any()):
        raise FormatError(f"code 0x{int(raw[lost][0]):02X} of {old} has no counterpart in {new}")
    return made
