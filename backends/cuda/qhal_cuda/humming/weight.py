"""A weight in humming's layout: made from the canonical one part by part, given back bit for bit, refitted in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qhal.elements import element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import GemmRequest, Support
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_cuda.humming import choice, launch, layout
from qhal_cuda.humming.choice import LAYOUT, Kind, torch_dtype
from qhal_portable import storage
from qhal_portable.prepared import PreparedWeight, check
from qhal_portable.storage import planes


@dataclass(eq=False, kw_only=True)
class HummingWeight(PreparedWeight):
    """stored, multiplied: one QTensor whose planes are the library's.

    dtypes       of the canonical planes
    single_zero  one zero point served all rows
    """

    kind: Kind
    dtypes: dict[str, torch.dtype]
    single_zero: bool = False


def build(
    w: QTensor,
    request: GemmRequest,
    answer: Support,
    owner: QuantOps,
    inputs: Sequence[Operand],
    into: HummingWeight | None = None,
) -> HummingWeight:
    """Check and re-lay a canonical weight [N, K]; into: its tensors get the values, at their addresses.

    FormatError for what does not fit, for scales that the stated type cannot hold, and for a NaN among codes and 8-bit
    scales: the library decodes it to a number.
    """
    k = choice.kind(request)
    assert k is not None
    device = owner.device
    check(w, request, inputs, None, None, device)
    storage.check_values(w)
    own = w.to(device)
    _check_numbers(own, k)
    if request.x[0].element == "fp16":  # it says so if a weight does not fit
        storage.decode_into(own, torch.empty(request.n, request.k, dtype=torch.float16, device=device))
    single = isinstance(own.zero, Tensor) and isinstance(own.scale, Tensor) and own.zero.shape != own.scale.shape
    dtypes = {name: t.dtype for name, t in own.planes().items()}
    if into is not None:
        _check_refit(into, request, inputs, dtypes, single)
        fresh = _planes(own, k).planes()
        for name, t in planes(into.stored).items():
            t.copy_(fresh[name])
        return into
    stored = _planes(own, k)
    made = HummingWeight(
        owner.name,
        request,
        answer,
        inputs=tuple(inputs),
        stored=stored,
        multiplied=stored,
        kind=k,
        dtypes=dtypes,
        single_zero=single,
    )
    made.run = launch.bind(made, k)
    return made


def restore(w: HummingWeight) -> QTensor:
    """The canonical weight, in tensors of its own."""
    s, k = w.stored, w.kind
    assert isinstance(s, QTensor)
    row = s.format.block is not None and s.format.block.kind == "row"

    def canonical(plane: Tensor, name: str) -> Tensor:
        grid = plane[:, :1] if row else plane
        return grid.to(w.dtypes[name], copy=True, memory_format=torch.contiguous_format)

    if isinstance(s.scale, QTensor):
        outer = _tensor(s.scale.scale).to(w.dtypes["scale.scale"], copy=True).reshape(1, 1)
        inner = canonical(layout.ungrid(s.scale.codes), "scale.codes")
        scale: Tensor | QTensor = replace(s.scale, codes=inner, scale=outer, layout="canonical")
    else:
        scale = canonical(layout.ungrid(_tensor(s.scale)), "scale")
    zero = None if s.zero is None else canonical(layout.unzeros(_tensor(s.zero), k.bits), "zero")
    if zero is not None and w.single_zero:
        zero = zero[:1, :1].clone()
    return QTensor(s.format, _signed(layout.unpack(s.codes, k.bits), s.format, k), scale, zero)


def _planes(w: QTensor, k: Kind) -> QTensor:
    """Codes, scales and zero points as the library reads them."""
    n, groups = w.codes.shape[0], w.codes.shape[1] // k.group
    codes = layout.pack(w.codes, k.bits, lambda part: _unsigned(part, w.format, k))
    if isinstance(w.scale, QTensor):
        outer = _tensor(w.scale.scale).float().reshape(1).clone()
        scale: Tensor | QTensor = replace(w.scale, codes=layout.grid(w.scale.codes), scale=outer, layout=LAYOUT)
    else:
        given = _tensor(w.scale)
        scale = layout.grid((given if given.dtype.itemsize == 1 else given.to(torch_dtype(k))).expand(n, groups))
    zero = None if w.zero is None else layout.zeros(_tensor(w.zero).expand(n, groups), k.bits)
    return QTensor(w.format, codes, scale, zero, layout=LAYOUT)


def _unsigned(codes: Tensor, fmt: Format, k: Kind) -> Tensor:
    """uint8: floats and unsigned codes as they are, signed ones from the smallest up; 8 bits in bf16 as sign and size.

    bf16 has 8 bits of precision, so the library takes int8 as a sign and |q|, or |q| - 1 below zero.
    """
    if element(fmt.element).kind != "int":
        return codes.view(torch.uint8)
    if k.bits == 8 and k.x == "bfloat16":
        return torch.where(codes >= 0, codes, 127 - codes.to(torch.int16)).to(torch.uint8)
    return (codes.to(torch.int16) + (1 << (k.bits - 1))).to(torch.uint8)


def _signed(codes: Tensor, fmt: Format, k: Kind) -> Tensor:
    if element(fmt.element).kind != "int":
        return codes.view(element(fmt.element).storage)
    wide = codes.to(torch.int16)
    if k.bits == 8 and k.x == "bfloat16":
        return torch.where(wide < 128, wide, 127 - wide).to(torch.int8)
    return (wide - (1 << (k.bits - 1))).to(torch.int8)


def _check_numbers(w: QTensor, k: Kind) -> None:
    """FormatError for NaN among 8-bit codes and scales, and for wide scales that are no numbers of the stated type."""
    if w.codes.is_floating_point() and bool(((w.codes.view(torch.uint8) & 127) == 127).any()):  # e4m3fn
        raise FormatError(f"{w.format}: the weight has NaN codes, which humming decodes to numbers; repair them")
    if isinstance(w.scale, QTensor):
        bad = w.scale.codes.float().isnan()
    elif _tensor(w.scale).dtype.itemsize == 1:
        bad = _tensor(w.scale).view(torch.uint8) == 255  # e8m0
    else:
        given = _tensor(w.scale).float()
        lost = (given.to(torch_dtype(k)).float() != given) & ~given.isnan()
        if bool(lost.any()):
            raise FormatError(f"{w.format}: {int(lost.sum())} scales are no numbers of that type; name theirs")
        return
    if bool(bad.any()):
        raise FormatError(f"{w.format}: {int(bad.sum())} scales are NaN, which humming decodes to numbers; repair them")


def _check_refit(
    into: HummingWeight, request: GemmRequest, inputs: Sequence[Operand], dtypes: dict[str, torch.dtype], single: bool
) -> None:
    if into.request != request:
        raise FormatError(f"into= was prepared for {into.request}, not for {request}; prepare a new weight")
    if len(inputs) != len(into.inputs):
        raise FormatError(f"into= has {len(into.inputs)} inputs, {len(inputs)} were given; prepare a new weight")
    if dtypes != into.dtypes or single != into.single_zero:
        raise FormatError(f"into= weight: planes are {dtypes}, were {into.dtypes}; prepare a new one")


def _tensor(t: object) -> Tensor:
    assert isinstance(t, Tensor)
    return t
