"""What `prepare` makes for an operator: the weight once, in the operator's layout, and what is computed from it.

`stored.codes` is the tensor that the operator reads, and `restore` inverts its layout: nothing is kept twice, but for a
weight that is multiplied decoded. Its canonical form stays in the host's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qhal.elements import element
from qhal.errors import FormatError
from qhal.interface import QuantOps
from qhal.requests import GemmRequest, GroupedRequest, Support
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_npu import calls, layouts
from qhal_npu.products import Path
from qhal_portable import storage
from qhal_portable.prepared import PreparedWeight, check
from qhal_portable.storage import Stored

_FOLDED = "folded."
STACKED = ("W8A8", "16 bits", "fp32")
"""Kinds whose experts are one weight [E, ...] of one operator; of the others each expert has a weight of its own."""


@dataclass(eq=False, kw_only=True)
class NpuWeight(PreparedWeight):
    """A weight for one path. kernel: what the operator takes beside it, by name; place: where results live.

    experts  one weight for each, where there is no operator for all of them
    """

    path: Path
    place: torch.device
    kernel: dict[str, Tensor] = field(default_factory=dict)
    experts: tuple[NpuWeight, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where what it is multiplied with must live."""
        return self.place

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor it keeps, by name; `host.` are those in the host's memory."""
        if self.experts:
            return {f"expert.{e}.{k}": t for e, w in enumerate(self.experts) for k, t in w.tensors().items()}
        found = super().tensors()
        if self.copy is not None and self.place.type != "cpu":
            found = {f"host.{k}" if k.startswith("weight.") else k: t for k, t in found.items()}
        return found | {f"kernel.{name}": t for name, t in self.kernel.items()}


def build(
    w: Stored,
    request: GemmRequest | GroupedRequest,
    support: Support,
    owner: QuantOps,
    path: Path,
    *,
    inputs: Sequence[Operand],
    bias: Tensor | None,
) -> NpuWeight:
    """Check everything against the request, then lay the weight out for its path."""
    device, gemm = owner.device, request.gemm if isinstance(request, GroupedRequest) else request
    check(w, request, inputs, None, bias, device)
    own = tuple(_own(o, device) for o in inputs)
    kept_bias = None if bias is None else bias.detach().to(device, torch.float32, copy=True)
    made = NpuWeight(
        owner.name, request, support, inputs=own, stored=w, multiplied=w, bias=kept_bias, path=path, place=device
    )
    if path.kind in ("16 bits", "fp32"):
        return _decoded(made, w, gemm, device)
    assert isinstance(w, QTensor)
    storage.check_values(w)
    if isinstance(request, GroupedRequest) and path.kind not in STACKED:
        for e in range(request.experts):
            part = storage.expert(w, e)
            ours = None if bias is None else bias[e]
            one = build(part, gemm, support, owner, path, inputs=[o.expert(e) for o in inputs], bias=ours)
            made.experts = (*made.experts, one)
        made.stored = made.multiplied = made.experts[0].stored
        return made
    return _laid(made, w, request, device)


def refit(into: NpuWeight, fresh: NpuWeight) -> NpuWeight:
    """New values at the old addresses. Everything is checked before the first byte is written."""
    if into.request != fresh.request or len(into.inputs) != len(fresh.inputs):
        raise FormatError(f"into= was prepared for {into.request}, not for {fresh.request}; prepare a new weight")
    for i, (a, b) in enumerate(zip(into.inputs, fresh.inputs, strict=True)):
        if (a.format, a.clip, a.static, a.zero is None) != (b.format, b.clip, b.static, b.zero is None):
            raise FormatError(f"into= input {i}: is {b.format}, was {a.format}; prepare a new weight")
        if a.scale is not None and b.scale is not None and a.scale.numel() == 1 and not torch.equal(a.scale, b.scale):
            raise FormatError(f"into= input {i}: the static scale changed; it is a host number, so prepare again")
    old, new = (_fixed(w.tensors()) for w in (into, fresh))
    if {k: (t.shape, t.dtype) for k, t in old.items()} != {k: (t.shape, t.dtype) for k, t in new.items()}:
        raise FormatError(f"into=: tensors are {sorted(new)}, were {sorted(old)}, or their shapes differ; prepare anew")
    for name, t in old.items():
        t.copy_(new[name])
    into.bias_copy = fresh.bias_copy
    flags = {k: t for k, t in fresh.kernel.items() if k.startswith(_FOLDED)}
    into.kernel = {k: t for k, t in into.kernel.items() if not k.startswith(_FOLDED)} | flags
    return into


def _fixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that every weight of a request has: a bias may fit a narrower type, or quant_bias, and the next one not."""
    return {k: t for k, t in tensors.items() if k != "bias_copy" and not k.startswith(f"kernel.{_FOLDED}")}


def restored(w: NpuWeight) -> Stored:
    """The canonical weight, in tensors of its own."""
    if w.experts:
        return QTensor.stack([part for e in w.experts if isinstance(part := restored(e), QTensor)])
    if w.copy is not None:
        back = storage.copied(w.stored)
        return back.to(w.place) if isinstance(back, Tensor) else _moved(back, w.place)
    assert isinstance(w.stored, QTensor)
    codes = _back(w.stored.codes, w.stored.layout, w.path, element(w.stored.format.element).kind == "uint")
    whole = replace(w.stored, codes=codes, layout="canonical")
    return storage.copied(whole)


def _decoded(made: NpuWeight, w: Stored, r: GemmRequest, device: torch.device) -> NpuWeight:
    """Decoded on the host, where every element is known; the device gets the result."""
    host = torch.device("cpu")
    kept = storage.keep(w, host)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[r.x[0].element]
    plain = isinstance(kept, Tensor) and kept.dtype == dtype
    copy = kept if plain else storage.decode_into(kept, torch.empty(w.shape, dtype=dtype, device=host))
    assert isinstance(copy, Tensor)
    copy = copy.to(device)
    made.copy = copy
    made.stored = made.multiplied = copy if plain else kept
    if made.bias is not None:
        narrow = made.bias.to(dtype)
        if torch.equal(narrow.float(), made.bias):
            made.bias_copy = narrow
    return made


def _laid(made: NpuWeight, w: QTensor, request: GemmRequest | GroupedRequest, device: torch.device) -> NpuWeight:
    path, f = made.path, w.format
    r = request.gemm if isinstance(request, GroupedRequest) else request
    codes = _lay(w.codes.to(device), path, element(f.element).kind == "uint")
    numbers = None if w.scale is None else (w.scale.dequantize() if isinstance(w.scale, QTensor) else w.scale)
    assert numbers is not None
    kept = storage.keep(replace(w, codes=w.codes[..., :0], layout="scales"), device)  # the planes beside the codes
    assert isinstance(kept, QTensor)
    stored = replace(kept, codes=codes, layout=path.layout)
    made.stored = made.multiplied = stored
    numbers = numbers.to(device)
    if path.kind.startswith("MX"):
        pairs = layouts.mx_pairs(numbers if isinstance(w.scale, QTensor) else w.scale.to(device))  # type: ignore[union-attr]
        made.kernel["scale"] = pairs.transpose(-2, -3)
    elif path.kind == "FP8 blocks":
        made.kernel["scale"] = numbers.float().transpose(-1, -2)
    elif path.kind.endswith("A16"):
        made.kernel.update(_antiquant(w, r, device))
    elif path.kind == "W4A8":
        scale = numbers.float().expand(*w.shape[:-1], 1)
        made.kernel["scale"] = layouts.scale_words(scale.transpose(-1, -2).contiguous()).reshape(-1, 1, w.shape[-2])
        sums = w.codes.to(device).to(torch.int64).sum(-1)
        made.kernel["scale_bias"] = (8.0 * sums.float() * scale[..., 0]).reshape(-1, w.shape[-2])
    else:
        made.kernel["scale"] = numbers.float().expand(*w.shape[:-1], 1)[..., 0].contiguous()
        if path.kind == "W8A8" and isinstance(request, GemmRequest):
            _static(made, w, r, device)
    return made


def _static(made: NpuWeight, w: QTensor, r: GemmRequest, device: torch.device) -> None:
    """What static inputs fold into: deq_scale = weight scale * input scale, quant_bias = -zero * row sums of codes."""
    if any(f.zero is not None for f in r.x):
        made.kernel["sums"] = w.codes.to(device).to(torch.int32).sum(-1, dtype=torch.int32)
    for i, o in enumerate(made.inputs):
        if o.scale is None or o.per_expert:
            continue
        made.kernel[f"deq_scale.{i}"] = _product_scale(made, w, o.scale.float().reshape(()), device)
        if o.zero is not None:
            zero = o.zero.float().reshape(())
            if not torch.equal(zero, zero.round()):
                raise FormatError(
                    f"input {i}: the static zero point {float(zero)} is no whole number; quant_bias is int32"
                )
            made.kernel[f"quant_bias.{i}"] = -(zero.to(torch.int32) * made.kernel["sums"])
            _fold(made, i)


def _product_scale(made: NpuWeight, w: QTensor, scale: Tensor, device: torch.device) -> Tensor:
    """[N] fp32. A weight scale that a file states as deq_scale / input_scale gives back the deq_scale of the file."""
    s = w.scale
    stated = isinstance(s, QTensor) and s.format.op == "/" and isinstance(s.scale, Tensor) and s.scale.numel() == 1
    if stated and torch.equal(s.scale.float().reshape(()).to(device), scale.to(device)):  # type: ignore[union-attr]
        return s.codes.float().to(device).reshape(-1).expand(w.shape[-2]).contiguous()  # type: ignore[union-attr]
    return made.kernel["scale"] * scale


def _fold(made: NpuWeight, i: int) -> None:
    """The bias as part of quant_bias, if it is a whole number of deq_scale: ModelSlim's files state it in this way."""
    if made.bias is None:
        return
    deq, bias = made.kernel[f"deq_scale.{i}"].double().cpu(), made.bias.double().cpu()
    steps = torch.round(bias / deq)
    total = steps + made.kernel[f"quant_bias.{i}"].double().cpu()
    if torch.equal((steps * deq).float(), made.bias.cpu()) and bool((total.abs() < 2**31).all()):
        made.kernel[f"quant_bias.{i}"].copy_(total.to(torch.int32))
        made.kernel[f"{_FOLDED}{i}"] = torch.ones((), dtype=torch.bool)


def _antiquant(w: QTensor, r: GemmRequest, device: torch.device) -> dict[str, Tensor]:
    """Scales [K/g, N], and minus the zero points; unsigned codes are stored less 8."""
    assert isinstance(w.scale, Tensor)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[r.x[0].element]
    found = {"scale": w.scale.to(device, dtype).transpose(-1, -2).contiguous()}
    shift = 8 if element(w.format.element).kind == "uint" else 0
    if w.zero is not None or shift:
        zero = torch.zeros((), device=device) if w.zero is None else w.zero.to(device).float()  # type: ignore[union-attr]
        offset = (shift - zero).to(dtype).expand(w.scale.shape)
        found["offset"] = offset.transpose(-1, -2).contiguous()
    return found


def _lay(codes: Tensor, path: Path, unsigned: bool) -> Tensor:
    if path.kind == "W8A8":
        turned = codes.transpose(-1, -2).contiguous()
        return calls.to_nz(turned) if path.layout.endswith("NZ") else turned
    if path.kind == "W8A16":
        return codes.transpose(-1, -2).contiguous()
    if path.kind in ("W4A16", "W4A8"):
        signed = codes.to(torch.int32) - (8 if unsigned else 0)
        packed = calls.int4pack(signed.transpose(-1, -2))
        return packed.unsqueeze(0) if path.kind == "W4A8" and packed.dim() == 2 else packed
    if path.kind == "W4A4":
        return calls.int4pack(codes)
    if path.kind == "MXFP4":
        return layouts.pack_nibbles(codes)
    if path.kind == "MXFP4 x MXFP8":
        return calls.e2m1_to_nz(layouts.pack_nibbles(codes))
    return codes.to(codes.device, copy=True, memory_format=torch.contiguous_format)


def _back(laid: Tensor, layout: str, path: Path, unsigned: bool) -> Tensor:
    """The canonical codes of what `_lay` made."""
    if path.kind == "W8A8":
        flat = calls.from_nz(laid) if layout.endswith("NZ") else laid
        return flat.transpose(-1, -2).contiguous()
    if path.kind == "W8A16":
        return laid.transpose(-1, -2).contiguous()
    if path.kind in ("W4A16", "W4A8"):
        codes = layouts.unpack_int4(laid[0] if path.kind == "W4A8" and laid.shape[0] == 1 else laid)
        codes = codes.transpose(-1, -2).contiguous()
        return (codes + 8).to(torch.uint8) if unsigned else codes
    if path.kind == "W4A4":
        return layouts.unpack_int4(laid)
    if path.kind == "MXFP4 x MXFP8":
        return layouts.unpack_nibbles(calls.from_nz(laid))
    return layouts.unpack_nibbles(laid) if path.kind == "MXFP4" else laid


def _own(o: Operand, device: torch.device) -> Operand:
    def moved(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device, copy=True)

    return replace(o, scale=moved(o.scale), zero=moved(o.zero))


def _moved(w: Stored, device: torch.device) -> Stored:
    return w if w.device == device else storage.keep(w, device)
