"""Acme: int8 activations times int8 weights, both scaled per row. Everything else is refused, with the reason."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import qhal
from qhal import Format, GemmRequest, NumericsClass, Prepared, QTensor, QuantizeRequest, Support
from qhal.requests import Arithmetic, minimum_class

INT8 = Format.parse("int8.row*fp32")


@dataclass(eq=False, kw_only=True)
class Weight(Prepared):
    """codes [K, N], as this device's multiply wants them; scale [N, 1]; bias [N], zeros if there is none."""

    codes: Tensor
    scale: Tensor
    bias: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale, "bias": self.bias}


class Acme(qhal.QuantOps):
    """Codes and scales are those of the contract, sums are int32, the rest is fp32: class fp32-acc."""

    name, interface = "acme", (1, 0)
    device = property(lambda self: torch.device("cpu"))

    def supports(self, request: Any) -> Support:
        """Total: every request gets an answer. What is claimed here is what the suite holds this backend to."""
        if isinstance(request, QuantizeRequest) and request.format == INT8 and not request.static:
            return Support("full", executes="one pass per row", numerics=NumericsClass.EXACT, deterministic=True)
        if not isinstance(request, GemmRequest):
            return Support("not_implemented", "acme executes quantize and gemm")
        if request.w != INT8 or request.x != (INT8,) or request.operand or request.group_index:
            return Support("unsupported", f"acme multiplies {INT8} by {INT8} only")
        if request.graph or minimum_class(request) < NumericsClass.FP32_ACC or request.k > 1024:
            return Support("unsupported", "acme has no graphs, sums scaled products in fp32, and takes k up to 1024")
        what = {"executes": "W8A8: int32 sums, scales and bias in fp32", "arithmetic": Arithmetic(str(INT8), str(INT8))}
        return Support("full", numerics=NumericsClass.FP32_ACC, deterministic=True, **what)

    def quantize(self, x: Tensor, to: Any, *, for_: Any = None, out: QTensor | None = None) -> QTensor:
        self._require(QuantizeRequest(x=x.dtype, format=getattr(to, "format", to), static=getattr(to, "static", False)))
        amax = x.float().abs().amax(-1, keepdim=True)
        scale = torch.where(amax == 0, 1.0, amax / 127)  # the default rule: div, empty=one; NaN and Inf propagate
        codes = torch.round(x.float() / scale).clamp(-128, 127).nan_to_num(0).to(torch.int8)  # half to even
        if out is None:
            return QTensor(INT8, codes, scale)
        return replace(out, codes=out.codes.copy_(codes), scale=out.scale.copy_(scale))

    def prepare(self, w: QTensor, request: Any, *, inputs=(), operand=None, bias=None, into=None) -> Weight:
        answer = self._require(request)  # before anything is touched
        planes = {"codes": w.codes.T.contiguous(), "scale": w.scale.clone()}
        planes["bias"] = torch.zeros(request.n) if bias is None else bias.clone()
        made = Weight(self.name, request, answer, tuple(inputs), **planes)
        for name, old in {} if into is None else into.tensors().items():
            old.copy_(planes[name])  # a refit: new values at the old addresses
        return into or made

    def restore(self, thing: Weight) -> QTensor:
        return QTensor(INT8, thing.codes.T.contiguous(), thing.scale)

    def gemm(self, x: Tensor | QTensor, w: Weight, *, input: int = 0, out: Tensor | None = None) -> Tensor:
        if not isinstance(w, Weight):
            raise qhal.FormatError(f"a weight prepared by {getattr(w, 'backend', type(w))} is not acme's")
        q = x if isinstance(x, QTensor) else self.quantize(x, w.inputs[input])
        sums = q.codes.int() @ w.codes.int()  # at most 1024 * 128 * 128 = 2^24: fp32 holds it too
        y = (sums.float() * q.scale * w.scale.T + w.bias).to(w.request.out or x.dtype)
        return y if out is None else out.copy_(y)

    def _require(self, request: Any) -> Support:
        if answer := self.supports(request):
            return answer
        raise qhal.UnsupportedError(answer, request)
