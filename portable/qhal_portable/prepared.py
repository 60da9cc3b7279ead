"""What `prepare` makes here: a weight in compact form, and where a request accepts it a decoded copy to multiply by.

Every tensor is copied to the device of the operations: weights may arrive there or on the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from qhal.elements import dtype_name, element
from qhal.encoding import encode
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.operands import check_experts, check_inputs
from qhal.prepared import Prepared
from qhal.requests import GemmRequest, GroupedRequest, HadamardRequest, Support, VQRequest
from qhal.rotations import Dense, Diagonal, Kronecker, Permutation, Rotation, kinds
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_portable.storage import NIBBLE, SORTED, Stored, canonical, decode_into, expert, keep, order, planes

ORDER = "order"
"""Of `PreparedWeight.made`."""
Run = Callable[["Tensor | QTensor", int, "Tensor | None"], Tensor]


@dataclass(eq=False, kw_only=True)
class PreparedWeight(Prepared):
    """A weight [N, K] or stacked experts [E, N, K].

    stored      the canonical weight in the compact layout: what `restore` gives back
    multiplied  the value that products use: `stored`, or `stored` rounded to the operand's format
    made        planes of `multiplied` that are quantized themselves, decoded to float32, by name ("scale", "offset");
                "order", int32 [K]: which column of x the next kept one meets, where `keep` moved them
    copy        `multiplied` decoded to the dtype of the activations; None where products are exact
    bias        float32 [N] or [E, N]
    bias_copy   the bias in the dtype of `copy`
    run         the product with everything bound, see `gemm.bind`
    layout      what `storage.keep` was asked for
    """

    stored: Stored
    multiplied: Stored
    made: dict[str, Tensor] = field(default_factory=dict)
    copy: Tensor | None = None
    bias: Tensor | None = None
    bias_copy: Tensor | None = None
    run: Run | None = None
    layout: str = NIBBLE

    @cached_property
    def device(self) -> torch.device:
        """Where it lives, and where what it is multiplied with must live."""
        return _device(self.stored)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor it keeps, by name."""
        found = {f"weight.{name}": t for name, t in planes(self.stored).items()}
        if self.multiplied is not self.stored:
            found.update({f"operand.{name}": t for name, t in planes(self.multiplied).items()})
        found.update({f"made.{name}": t for name, t in self.made.items()})
        for name in ("copy", "bias", "bias_copy"):
            t = getattr(self, name)
            if t is not None and t is not self.stored:
                found[name] = t
        for i, o in enumerate(self.inputs):
            found.update({f"input.{i}.{n}": t for n in ("scale", "zero") if (t := getattr(o, n)) is not None})
        return found


@dataclass(eq=False, kw_only=True)
class PreparedRotation(Prepared):
    """A chain of rotations with tensors of its own."""

    chain: tuple[Rotation, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor it keeps, by name."""
        named = ((f"{i}.{k}", v) for i, r in enumerate(self.chain) for k, v in vars(r).items())
        return {name: v for name, v in named if isinstance(v, Tensor)}


def build_weight(
    w: Stored,
    request: GemmRequest | GroupedRequest | VQRequest,
    support: Support,
    owner: QuantOps,
    *,
    copy_dtype: torch.dtype | None,
    inputs: Sequence[Operand],
    operand: Operand | None,
    bias: Tensor | None,
    layout: str = NIBBLE,
    rounded: torch.dtype | None = None,
    made: Sequence[str] = (),
) -> PreparedWeight:
    """Check everything against the request, then keep it.

    copy_dtype  of the decoded copy, None for no copy
    made        planes that are kept decoded too
    rounded     what products round the whole weight to, None: they do not; FormatError for a weight that overflows it
    """
    device = owner.device
    check(w, request, inputs, operand, bias, device)
    stored = keep(w, device, layout)
    operand = None if operand is None else _keep_operand(operand, device)
    multiplied = stored if operand is None else round_to_operand(stored, operand, layout)
    _check_rounded(multiplied, request, rounded)
    copy = None
    if copy_dtype is not None:
        same = isinstance(stored, Tensor) and stored.dtype == copy_dtype
        copy = stored if same else decode_into(multiplied, torch.empty(w.shape, dtype=copy_dtype, device=device))
    own = None if bias is None else bias.detach().to(device, torch.float32, copy=True)
    return PreparedWeight(
        owner.name,
        request,
        support,
        inputs=tuple(_keep_operand(o, device) for o in inputs),
        stored=stored,
        multiplied=multiplied,
        made=_decoded(multiplied, made),
        copy=copy if isinstance(copy, Tensor) else None,
        bias=own,
        bias_copy=None if own is None or copy_dtype is None else own.to(copy_dtype, copy=True),
        layout=layout,
    )


def refit(
    into: PreparedWeight,
    w: Stored,
    request: GemmRequest | GroupedRequest | VQRequest,
    *,
    inputs: Sequence[Operand],
    operand: Operand | None,
    bias: Tensor | None,
    rounded: torch.dtype | None = None,
) -> PreparedWeight:
    """New values at the old addresses. Everything is checked before the first byte is written."""
    if into.request != request:
        raise FormatError(f"into= was prepared for {into.request}, not for {request}; prepare a new weight")
    device = into.device
    check(w, request, inputs, operand, bias, device)
    fresh = keep(w, device, into.layout)
    if isinstance(fresh, QTensor) and isinstance(into.stored, QTensor) and fresh.layout != into.stored.layout:
        raise FormatError(
            f"into= keeps columns as {into.stored.layout}, these would be {fresh.layout}; prepare a new one"
        )
    updates = _pairs(planes(into.stored), planes(fresh), "weight")
    multiplied = fresh
    if operand is not None:
        multiplied = round_to_operand(fresh, _keep_operand(operand, device), into.layout)
        updates += _pairs(planes(into.multiplied), planes(multiplied), "operand")
    _check_rounded(multiplied, request, rounded)
    updates += _pairs(into.made, _decoded(multiplied, tuple(into.made)), "made")
    if into.copy is not None and into.copy is not into.stored:
        updates.append((into.copy, decode_into(multiplied, torch.empty_like(into.copy))))
    if len(inputs) != len(into.inputs):
        raise FormatError(f"into= has {len(into.inputs)} inputs, {len(inputs)} were given; prepare a new weight")
    for i, (old, new) in enumerate(zip(into.inputs, inputs, strict=True)):
        updates += _input_pairs(old, _keep_operand(new, device), i)
    if into.bias is not None and bias is not None:
        updates.append((into.bias, bias))
        if into.bias_copy is not None:
            updates.append((into.bias_copy, bias))
    for old_tensor, new_tensor in updates:
        old_tensor.copy_(new_tensor)
    return into


def _decoded(w: Stored, names: Sequence[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in names:
        if name == ORDER:
            columns = order(w) if isinstance(w, QTensor) and w.layout.endswith(SORTED) else None
            found |= {} if columns is None else {ORDER: columns.to(torch.int32)}
        else:
            plane = getattr(w, name)
            assert isinstance(plane, QTensor)
            found[name] = plane.dequantize()
    return found


def _check_rounded(
    multiplied: Stored, request: GemmRequest | GroupedRequest | VQRequest, rounded: torch.dtype | None
) -> None:
    if rounded == torch.float16 and isinstance(request, GemmRequest):  # the other floats hold every weight
        decode_into(multiplied, torch.empty(request.n, request.k, dtype=rounded, device=_device(multiplied)))


def _device(w: Stored) -> torch.device:
    return next(iter(planes(w).values())).device


def build_rotation(
    chain: Sequence[Rotation], request: HadamardRequest, support: Support, owner: QuantOps, into: Prepared | None
) -> PreparedRotation:
    """Keep a chain, or write its values into an older one of the same kinds."""
    if kinds(chain) != request.kinds:
        raise FormatError(f"the chain is {kinds(chain)}, the request says {request.kinds}")
    if into is None:
        own = tuple(_keep_rotation(r, owner.device) for r in chain)
        return PreparedRotation(owner.name, request, support, chain=own)
    if not isinstance(into, PreparedRotation) or into.request != request:
        raise FormatError(f"into= was prepared for {into.request}, not for {request}; prepare a new chain")
    fresh = PreparedRotation(owner.name, request, support, chain=tuple(chain))
    for old, new in _pairs(into.tensors(), fresh.tensors(), "rotation"):
        old.copy_(new)
    return into


def round_to_operand(w: Stored, operand: Operand, layout: str) -> Stored:
    """The weight rounded to the operand's format by `qhal.encoding`; every expert by itself."""

    def one(part: Stored, o: Operand) -> QTensor:
        whole = canonical(part)
        value = whole.float() if isinstance(whole, Tensor) else whole.dequantize()
        return encode(value, o.format, scale=o.scale, zero=o.zero, clip=o.clip)

    if len(w.shape) == 2:
        return keep(one(w, operand), w.device, layout)
    singles = [one(expert(w, e), operand.expert(e)) for e in range(w.shape[0])]
    return keep(QTensor.stack(singles), w.device, layout)


def check(
    w: Stored,
    request: GemmRequest | GroupedRequest | VQRequest,
    inputs: Sequence[Operand],
    operand: Operand | None,
    bias: Tensor | None,
    device: torch.device,
) -> None:
    """FormatError if what is given is not what the request describes."""
    gemm = request.gemm if isinstance(request, GroupedRequest) else request
    given = Format(dtype_name(w.dtype)) if isinstance(w, Tensor) else w.format
    asked = gemm.w
    matches = given.storage == asked.storage if isinstance(given, Format) and isinstance(asked, Format) else None
    if not (given == asked if matches is None else matches):
        raise FormatError(f"the weight is {given}, the request says {asked}")
    shape = (request.experts, gemm.n, gemm.k) if isinstance(request, GroupedRequest) else (gemm.n, gemm.k)
    if tuple(w.shape) != shape:
        raise FormatError(f"the weight is {tuple(w.shape)}, the request says {shape}")
    if isinstance(w, QTensor) and w.layout != "canonical":
        raise FormatError(f"the weight has layout {w.layout!r}; prepare reads canonical tensors, see restore")
    if w.device.type not in ("cpu", device.type):
        raise FormatError(f"the weight is on {w.device}; this backend reads tensors on {device}")
    if isinstance(gemm, VQRequest):
        return
    indexed = isinstance(w, QTensor) and w.group_index is not None
    if indexed != gemm.group_index:
        raise FormatError(f"the weight has {'a' if indexed else 'no'} group_index, the request says {gemm.group_index}")
    if (bias is not None) != gemm.bias:
        raise FormatError(f"a bias was {'given' if bias is not None else 'not given'}, the request says {gemm.bias}")
    if bias is not None and (tuple(bias.shape) != shape[:-1] or not bias.is_floating_point()):
        raise FormatError(f"the bias is {bias.dtype} {tuple(bias.shape)}, must be float32 {shape[:-1]}")
    if (None if operand is None else operand.format) != gemm.operand:
        raise FormatError(f"the operand is {operand and operand.format}, the request says {gemm.operand}")
    assert not isinstance(request, VQRequest)
    if operand is not None:
        check_experts(operand, request.experts if isinstance(request, GroupedRequest) else 0)
    check_inputs(request, inputs)


def quantized_inputs(request: GemmRequest) -> bool:
    """Whether the weight meets activations that are quantized."""
    return _quantized(request.x)


@lru_cache(maxsize=4096)
def _quantized(x: tuple[Format, ...]) -> bool:
    return not all(f.plain and element(f.element).wide for f in x)


def _pairs(old: dict[str, Tensor], new: dict[str, Tensor], what: str) -> list[tuple[Tensor, Tensor]]:
    if old.keys() != new.keys():
        raise FormatError(f"into= {what}: planes are {sorted(new)}, were {sorted(old)}; prepare a new one")
    for name, t in old.items():
        if (t.shape, t.dtype) != (new[name].shape, new[name].dtype):
            found = f"{new[name].dtype} {tuple(new[name].shape)}"
            raise FormatError(f"into= {what}.{name}: is {found}, was {t.dtype} {tuple(t.shape)}; prepare a new one")
    return [(t, new[name]) for name, t in old.items()]


def _input_pairs(old: Operand, new: Operand, index: int) -> list[tuple[Tensor, Tensor]]:
    if (old.format, old.clip, old.per_expert) != (new.format, new.clip, new.per_expert):
        raise FormatError(f"into= input {index}: is {new.format}, was {old.format}; prepare a new weight")
    found: list[tuple[Tensor, Tensor]] = []
    for name in ("scale", "zero"):
        a, b = getattr(old, name), getattr(new, name)
        if (a is None) != (b is None):
            raise FormatError(f"into= input {index}: its static {name} appeared or vanished; prepare a new weight")
        if a is None or b is None:
            continue
        if a.numel() == 1 and not torch.equal(a, b.reshape(a.shape).to(a.dtype)):
            raise FormatError(f"into= input {index}: the static {name} changed; it is a host number, so prepare again")
        found += _pairs({name: a}, {name: b}, f"input {index}")
    return found


def _keep_operand(o: Operand, device: torch.device) -> Operand:
    def own(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device, copy=True)

    return replace(o, scale=own(o.scale), zero=own(o.zero))


def _keep_rotation(r: Rotation, device: torch.device) -> Rotation:
    if isinstance(r, Diagonal):
        return Diagonal(r.values.to(device, copy=True))
    if isinstance(r, Permutation):
        return Permutation(r.index.to(device, copy=True))
    if isinstance(r, Dense):
        return Dense(r.block.to(device, copy=True))
    if isinstance(r, Kronecker):
        return Kronecker(*(None if m is None else m.to(device, copy=True) for m in (r.left, r.right)))
    return r
