"""gemm: y = Q(x) @ W.T + bias. Exact by default; by a decoded copy where the request accepts that class.

Exact: Q(x) and W are their dequantizations (float32 by definition), products and sums are float64, the bias is added in
float64, the result is rounded once. Copy: `torch.nn.functional.linear` in the dtype of x, which accumulates in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from qhal.elements import WIDE, element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.requests import GemmRequest, GroupedRequest, NumericsClass, VQRequest, minimum_class
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_portable.prepared import PreparedWeight, Run, quantized_inputs
from qhal_portable.quantize import quantize
from qhal_portable.rounding import round_once
from qhal_portable.storage import Stored, parts

FLOATS = tuple(WIDE.values())


def copy_class(
    request: GemmRequest, copies: tuple[torch.dtype, ...] = FLOATS
) -> tuple[torch.dtype, NumericsClass] | None:
    """Dtype (one of `copies`) and class of multiplying by a decoded copy; None if the product is to be exact.

    A copy in the dtype of x is lossless for fp32 and for weights that have that dtype already: then it is `fp32-acc`.
    """
    if request.operand is not None or quantized_inputs(request):
        return None
    dtype = element(request.x[0].element).storage
    if dtype not in copies or request.out not in (None, dtype):
        return None
    lossless = dtype == torch.float32 or request.w == Format(request.x[0].element)
    found = NumericsClass.FP32_ACC if lossless else NumericsClass.DEQUANT_16
    return (dtype, found) if found <= minimum_class(request) else None


def bind(p: PreparedWeight) -> Run:
    """The product of one weight with everything that does not change looked up: the body of `gemm`."""
    request, copy = p.request, p.copy
    assert isinstance(request, GemmRequest)

    def general(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        value, dtype = operand(x, request, p, index)
        rows = value.split(1) if request.batch_invariant and value.shape[0] else (value,)
        fused = copy is not None and value.dtype == copy.dtype
        step = by_copy if fused else exact
        return write(torch.cat([step(p, row, dtype) for row in rows]), out)

    if copy is None or request.batch_invariant or (p.bias is not None and not fits(p.bias, p.bias_copy)):
        return general
    dtype, columns, bias = copy.dtype, request.k, p.bias_copy

    def direct(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        plain = out is None and type(x) is Tensor and x.dtype is dtype and x.dim() == 2
        if plain and x.shape[1] == columns and x.stride(1) == 1:  # type: ignore[union-attr]
            return linear(x, copy, bias)  # type: ignore[arg-type]
        return general(x, index, out)

    return direct


def exact(p: PreparedWeight, x: Tensor, dtype: torch.dtype) -> Tensor:
    """One rounding of the float64 product and bias."""
    return round_once(product(x, p.multiplied, p.bias), dtype)


def product(x: Tensor, w: Stored, bias: Tensor | None) -> Tensor:
    """float64 [T, N] = x @ W.T + bias of a kept weight [N, K], decoded a few rows at a time."""
    x = x.double()
    y = torch.cat([x @ value.double().T for value in parts(w)], -1)
    return y if bias is None else y.add_(bias)


def by_copy(p: PreparedWeight, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The product with the decoded copy. A bias that its dtype cannot hold is added in fp32, as it is defined."""
    assert p.copy is not None
    if p.bias is None or fits(p.bias, p.bias_copy):
        return linear(x, p.copy, p.bias_copy)
    return linear(x.float(), p.copy.float(), p.bias).to(dtype)


def fits(bias: Tensor, narrow: Tensor | None) -> bool:
    """Whether the narrow copy of a bias is that bias."""
    return narrow is not None and torch.equal(bias, narrow.float())


def operand(
    x: Tensor | QTensor, request: GemmRequest, p: PreparedWeight, index: int, *, axes: int = 2
) -> tuple[Tensor, torch.dtype]:
    """The value of `quantized` (a plain x as it is, a quantized one in float32), and the dtype of the result."""
    q, dtype = quantized(x, request, p, index, axes=axes)
    return q.dequantize() if isinstance(q, QTensor) else q, dtype


def quantized(
    x: Tensor | QTensor,
    request: GemmRequest,
    p: PreparedWeight,
    index: int,
    *,
    axes: int = 2,
    by: Callable[[Tensor, Operand], QTensor] | None = None,
) -> tuple[Tensor | QTensor, torch.dtype]:
    """Q(x) (a plain x that nothing quantizes as it is), and the dtype of the result.

    FormatError, in one line, for everything about x that does not fit. axes: 2, or 3 for [E, M, K]; by: what quantizes,
    None for `qhal.encoding`.
    """
    inputs, device = p.inputs, p.device
    dtype = arriving(x, request, inputs, device, index, axes=axes)
    if isinstance(x, QTensor) or not inputs:
        return x, dtype
    return (quantize(x, inputs[index], device) if by is None else by(x, inputs[index])), dtype


def arriving(
    x: Tensor | QTensor,
    request: GemmRequest,
    inputs: Sequence[Operand],
    device: torch.device,
    index: int,
    *,
    axes: int = 2,
) -> torch.dtype:
    """The dtype of the result; FormatError, in one line, for everything about x that does not fit.

    inputs: how a plain x is quantized, by index; axes: 2, or 3 for [E, M, K].
    """
    if not isinstance(x, QTensor):
        dtype = accept(x, request, device, axes=axes)
        if not inputs and quantized_inputs(request):
            raise FormatError(
                f"x is plain {x.dtype}, but the weight was prepared for {request.x[0]} without saying how to "
                "quantize; pass inputs= to prepare, or quantize x first"
            )
        if inputs and not 0 <= index < len(inputs):
            raise FormatError(f"input={index}: the weight was prepared with {len(inputs)} inputs")
        return dtype
    if x.format.storage not in [f.storage for f in request.x] or x.layout != "canonical":
        known = ", ".join(str(f) for f in request.x)
        raise FormatError(f"x is a {x.format} tensor in layout {x.layout}; the weight was prepared for: {known}")
    if request.out is None:
        raise FormatError(f"x arrives as {x.format}: the request must name the result's dtype (out=)")
    if x.codes.dim() != axes or x.shape[-1] != request.k:
        raise FormatError(f"x is {x.shape}, must be {_shape(axes, request.k)}")
    if x.codes.device != device:
        raise FormatError(f"x is on {x.device}, must be on {device}")
    return request.out


def accept(x: Tensor, request: GemmRequest, device: torch.device, *, axes: int = 2) -> torch.dtype:
    """The dtype of the result for a plain x; FormatError if x does not fit."""
    columns = request.k
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.dim() != axes or x.shape[-1] != columns:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise FormatError(f"x is {found}, must be bf16, fp16 or fp32 {_shape(axes, columns)}")
    if not x.is_contiguous() and columns > 1 and x.numel() and x.stride(-1) != 1:
        raise FormatError(f"x has strides {x.stride()}; rows may have any stride, the last must be 1")
    if x.device != device:
        raise FormatError(f"x is on {x.device}, must be on {device}")
    return request.out or x.dtype


def write(y: Tensor, out: Tensor | None) -> Tensor:
    """Into `out` if it was given; FormatError if it is not the result's shape and dtype."""
    if out is None:
        return y
    if not isinstance(out, Tensor) or (out.shape, out.dtype) != (y.shape, y.dtype):
        found = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise FormatError(f"out is {found}, the result is {y.dtype} {tuple(y.shape)}")
    return out.copy_(y)


def vq_decode(p: PreparedWeight, rows: slice | None, out: Tensor | None) -> Tensor:
    """Dense rows of a codebook weight, summed in fp32 in codebook order and rounded once."""
    request = p.request
    if isinstance(request, GroupedRequest) or isinstance(p.stored, Tensor | QTensor):
        raise FormatError(f"vq_decode reads codebook weights, this one was prepared for {request}")
    assert isinstance(request, GemmRequest | VQRequest)
    dtype = request.out if isinstance(request, VQRequest) else request.out or torch.float32
    value = p.stored.dequantize(dtype)
    return write(value if rows is None else value[rows], out)


def _shape(axes: int, columns: int) -> str:
    return f"[{'T' if axes == 2 else 'E, M'}, {columns}]"
