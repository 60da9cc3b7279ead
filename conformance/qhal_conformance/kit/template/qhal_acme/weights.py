"""prepare, restore, refit: a weight in this device's layout, and back without losing a bit.

The layout here is small but real: 4-bit codes two to a byte along K, the first in the low half; everything else as it
comes. `restore(prepare(w))` equals w in every plane, and a refit puts new values at the old addresses, so that a
captured graph computes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from qhal.elements import dtype_name
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.operands import check_inputs
from qhal.prepared import Prepared
from qhal.requests import GemmRequest, Support
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_acme.support import layout


@dataclass(eq=False, kw_only=True)
class AcmeWeight(Prepared):
    """A weight [N, K] on the device.

    format  of the weight that was prepared
    codes   [N, K] in the format's storage, or uint8 [N, ceil(K / 2)]: see the head of the file
    scale   [N, 1] or [N, groups], None for plain floats
    bias    float32 [N]
    """

    format: Format
    codes: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor it keeps: for memory accounts, and for the suite, which checks that a refit moves none."""
        found = {"codes": self.codes, "scale": self.scale, "bias": self.bias}
        found |= {f"input.{i}.scale": o.scale for i, o in enumerate(self.inputs)}
        return {name: t for name, t in found.items() if t is not None}

    def canonical(self) -> QTensor:
        """The weight as it was given."""
        assert isinstance(self.request, GemmRequest)
        codes = unpack(self.codes, self.request.k) if layout(self.format) == "nibble" else self.codes
        return QTensor(self.format, codes, self.scale)


def build(
    w: object,
    request: GemmRequest,
    support: Support,
    device: torch.device,
    inputs: Sequence[Operand],
    bias: Tensor | None,
) -> AcmeWeight:
    """Check everything against the request, then lay it out, in tensors of its own."""
    if isinstance(w, Tensor):
        w = QTensor(Format(dtype_name(w.dtype)), w)
    if not isinstance(w, QTensor) or w.format.storage != request.w or w.shape != (request.n, request.k):
        found = f"{w.format} {w.shape}" if isinstance(w, QTensor) else type(w).__name__
        raise FormatError(f"the weight is {found}, the request says {request.w} [{request.n}, {request.k}]")
    if w.group_index is not None or w.layout != "canonical":
        raise FormatError(f"the weight has layout {w.layout} and a group_index, or one of them; acme reads neither")
    check_inputs(request, inputs)
    if (bias is not None) != request.bias or (bias is not None and bias.shape != (request.n,)):
        raise FormatError(f"bias is {None if bias is None else tuple(bias.shape)}, the request says {request}")
    codes = pack(w.codes) if layout(w.format) == "nibble" else w.codes
    scale = w.scale if isinstance(w.scale, Tensor) else None
    return AcmeWeight(
        "acme",
        request,
        support,
        inputs=tuple(replace(o, scale=None if o.scale is None else _own(o.scale, device)) for o in inputs),
        format=w.format,
        codes=_own(codes, device),
        scale=None if scale is None else _own(scale, device),
        bias=None if bias is None else _own(bias.float(), device),
    )


def refit(into: Prepared, new: AcmeWeight) -> AcmeWeight:
    """New values at the old addresses. Everything is checked before the first byte is written."""
    old = as_weight(into)
    same = len(old.inputs) == len(new.inputs) and all(map(Operand.equal, old.inputs, new.inputs))
    if old.request != new.request or not same:
        raise FormatError(f"into= was prepared for {old.request} and its inputs, not for {new.request}; prepare anew")
    for name, t in new.tensors().items():
        old.tensors()[name].copy_(t)
    old.format = new.format  # the rule may be another
    return old


def as_weight(w: object) -> AcmeWeight:
    """`w` if this backend prepared it; FormatError otherwise."""
    if isinstance(w, AcmeWeight):
        return w
    owner = getattr(w, "backend", type(w).__name__)
    raise FormatError(f"this weight was prepared by {owner!r}, acme reads only its own; prepare it with these ops")


def pack(codes: Tensor) -> Tensor:
    """int8 codes [N, K] in [-8, 7] to uint8 [N, ceil(K / 2)]."""
    even = pad(codes, (0, codes.shape[1] % 2)).view(torch.uint8)
    return (even[:, ::2] & 15) | (even[:, 1::2] << 4)


def unpack(packed: Tensor, k: int) -> Tensor:
    """The way back."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[:, :k].to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def _own(t: Tensor, device: torch.device) -> Tensor:
    return t.detach().to(device, copy=True).contiguous()
