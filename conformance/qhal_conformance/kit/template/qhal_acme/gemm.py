"""gemm: y = Q(x) @ W.T + bias. Right and slow: both operands are decoded exactly and multiplied in fp32.

Numerics, class fp32-acc: products and sums in fp32 in any order, the bias added in fp32, one rounding at the end. This
holds while torch multiplies fp32 in fp32 (`torch.get_float32_matmul_precision() == "highest"`, the default).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhal.elements import WIDE
from qhal.errors import FormatError
from qhal.requests import GemmRequest
from qhal.tensors import QTensor
from qhal_acme.quantize import quantize
from qhal_acme.weights import AcmeWeight


def gemm(x: Tensor | QTensor, w: AcmeWeight, index: int, out: Tensor | None) -> Tensor:
    """[T, K] -> [T, N]. A plain x is quantized by w.inputs[index], with the bits of `quantize`, or not at all."""
    request = w.request
    assert isinstance(request, GemmRequest)
    value, dtype = _operand(x, w, request, index)
    y = product(value, w.canonical().dequantize())
    if w.bias is not None:
        y += w.bias
    return write(y.to(dtype), out)


def product(x: Tensor, w: Tensor) -> Tensor:
    """fp32 [T, K] times fp32 [N, K] -> [T, N]. Your kernels go here, each with a line in support.py."""
    return x @ w.T


def write(y: Tensor, out: Tensor | QTensor | None) -> Tensor:
    """A result, into `out` if it was given; FormatError if it does not fit there."""
    if out is None:
        return y
    if not isinstance(out, Tensor) or (out.shape, out.dtype) != (y.shape, y.dtype):
        found = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise FormatError(f"out is {found}, the result is {y.dtype} {tuple(y.shape)}")
    return out.copy_(y)


def _operand(x: Tensor | QTensor, w: AcmeWeight, request: GemmRequest, index: int) -> tuple[Tensor, torch.dtype]:
    """Q(x) in fp32, and the dtype of the result; FormatError if x is not what the weight was prepared for."""
    if not isinstance(x, Tensor | QTensor) or len(x.shape) != 2 or x.shape[1] != request.k:
        found = tuple(x.shape) if isinstance(x, Tensor | QTensor) else type(x).__name__
        raise FormatError(f"x is {found}, must be [T, {request.k}]")
    if isinstance(x, QTensor):
        if x.format not in request.x or request.out is None:
            raise FormatError(f"x arrives as {x.format}, the weight was prepared for {request}")
        return x.dequantize(), request.out
    if x.dtype not in WIDE.values() or (not w.inputs and not request.x[0].plain):
        raise FormatError(f"x arrives as {x.dtype}, the weight was prepared for {request} with {len(w.inputs)} inputs")
    if w.inputs and not 0 <= index < len(w.inputs):
        raise FormatError(f"input={index}: the weight was prepared with {len(w.inputs)} inputs")
    value = quantize(x, w.inputs[index]).dequantize() if w.inputs else x.float()
    return value, request.out or x.dtype
