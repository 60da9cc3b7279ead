"""The body of `gemm` for each path: the operator's call, and what the contract asks around it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from qhal.errors import FormatError
from qhal.formats import Format
from qhal.requests import GemmRequest
from qhal.rules import Rule
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_npu import calls, layouts
from qhal_npu.quantizing import HALF_TYPES, Quantizer, choose, mx_codes, quantize, static_codes
from qhal_npu.weights import NpuWeight
from qhal_portable.gemm import arriving, write
from qhal_portable.prepared import Run

Product = Callable[["Tensor | QTensor", int, torch.dtype], Tensor]
_MX = {"scale_dtype": calls.E8M0, "pertoken_scale_dtype": calls.E8M0, "group_sizes": [1, 1, 32]}


def bind(p: NpuWeight, arch: str) -> Run:
    """The product of one weight along its path."""
    request = p.request
    assert isinstance(request, GemmRequest)
    made = product(p, arch)

    def run(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        dtype = _dtype(x, p, request, index)
        if x.shape[0] == 0:
            return write(torch.zeros(0, request.n, dtype=dtype, device=p.place), out)
        return write(made(x, index, dtype), out)

    return run


def product(p: NpuWeight, arch: str) -> Product:
    """(x, index of the input, dtype of the result) -> the product, for an x that fits."""
    makers: dict[str, Callable[[NpuWeight, str], Product]] = {
        "16 bits": _plain, "fp32": _plain, "W8A16": _weight_only, "W4A16": _weight_only, "W8A8": _int8, "W4A8": _int4_8,
        "W4A4": _int4, "FP8": _fp8, "FP8 blocks": _fp8, "MXFP8": _mx, "MXFP4": _mx, "MXFP4 x MXFP8": _mx,
    }  # fmt: skip
    return makers[p.path.kind](p, arch)


def _dtype(x: Tensor | QTensor, p: NpuWeight, r: GemmRequest, index: int) -> torch.dtype:
    """The dtype of the result; FormatError for an x that does not fit, or is of another type than the kept weight."""
    dtype = arriving(x, r, p.inputs, p.place, index)
    if isinstance(x, Tensor) and r.x[0].plain:
        held = p.kernel["scale"] if p.copy is None else p.copy
        if x.dtype != held.dtype:
            raise FormatError(f"x arrives as {x.dtype}, the weight was prepared for {r}")
    return dtype


def _plain(p: NpuWeight, arch: str) -> Product:
    """linear in the type of x. A bias that this type cannot hold, or another result, is made of fp32 sums."""
    copy = p.copy
    assert copy is not None

    def product(x: Tensor | QTensor, index: int, dtype: torch.dtype) -> Tensor:
        value = x.codes if isinstance(x, QTensor) else x.detach()
        if dtype == copy.dtype and (p.bias is None or p.bias_copy is not None):
            return linear(value, copy, p.bias_copy)
        y = linear(value, copy) if copy.dtype == torch.float32 else torch.mm(value, copy.T, out_dtype=torch.float32)
        return (y if p.bias is None else y + p.bias).to(dtype)

    return product


def _weight_only(p: NpuWeight, arch: str) -> Product:
    assert isinstance(p.stored, QTensor)
    codes, scale, offset = p.stored.codes, p.kernel["scale"], p.kernel.get("offset")
    block = p.stored.format.block
    assert isinstance(p.request, GemmRequest)
    group = block.cols if block is not None and block.kind == "group" and block.cols < p.request.k else 0

    def product(x: Tensor | QTensor, index: int, dtype: torch.dtype) -> Tensor:
        value = x.codes if isinstance(x, QTensor) else x.detach()
        return calls.weight_quant_matmul(value, codes, scale, offset, p.bias, group)

    return product


def _int8(p: NpuWeight, arch: str) -> Product:
    """bf16 and fp16 results in one call; fp32 ones, and a bias beside quant_bias, from the int32 sums."""
    assert isinstance(p.stored, QTensor)
    codes, scale = p.stored.codes, p.kernel["scale"]

    def product(x: Tensor | QTensor, index: int, dtype: torch.dtype) -> Tensor:
        o = None if isinstance(x, QTensor) else p.inputs[index]
        deq = None if o is None else p.kernel.get(f"deq_scale.{index}")
        if isinstance(x, QTensor):
            q, rows, extra = x.codes, _rows(x), _quant_bias(x, p)
        elif o is not None and deq is not None and o.format.element == "int8" and _fused(o, x, arch):
            q, rows, extra = static_codes(x.detach(), o), None, p.kernel.get(f"quant_bias.{index}")
        else:
            assert o is not None
            made = quantize(x.detach(), o, arch)
            q, rows = made.codes, _rows(made)
            extra = p.kernel.get(f"quant_bias.{index}") if deq is not None else _quant_bias(made, p)
        folded = o is not None and f"folded.{index}" in p.kernel
        bias = None if folded else p.bias
        foreign = isinstance(x, QTensor) and extra is not None  # whose zero point nobody has looked at
        if dtype == torch.float32 or foreign or (extra is not None and bias is not None):
            y = calls.quant_matmul(q, codes, scale, torch.int32, bias=extra).float()
            if foreign:
                y = y - _rest(x) * p.kernel["sums"]
            y = y * deq if deq is not None else y * rows[:, None] * scale  # type: ignore[index]
            return (y if bias is None else y + bias).to(dtype)
        if deq is not None and dtype == torch.bfloat16:
            return calls.quant_matmul(q, codes, deq, dtype, bias=bias if extra is None else extra)
        if rows is None:  # without pertoken_scale an fp16 result takes 19-bit scales
            assert o is not None and o.scale is not None
            rows = o.scale.float().reshape(1).expand(q.shape[0]).contiguous()
        return calls.quant_matmul(q, codes, scale, dtype, pertoken_scale=rows, bias=bias if extra is None else extra)

    return product


def _fused(o: Operand, x: Tensor, arch: str) -> bool:
    found = choose(o.format, x.dtype, o.static, arch, clip=o.clipped)
    return isinstance(found, Quantizer) and found.op == "npu_quantize"


def _rows(q: QTensor) -> Tensor:
    """fp32 [T]: the scale of every row."""
    assert isinstance(q.scale, Tensor)
    return q.scale.float().reshape(-1).expand(q.codes.shape[0]).contiguous()


def _quant_bias(q: QTensor, p: NpuWeight) -> Tensor | None:
    """int32 [N] of an x that arrives with a static zero point."""
    if q.zero is None:
        return None
    assert isinstance(q.zero, Tensor)
    return -(q.zero.reshape(()).round().to(torch.int32) * p.kernel["sums"])


def _rest(q: Tensor | QTensor) -> Tensor:
    """What rounding its zero point to a whole number left out."""
    assert isinstance(q, QTensor) and isinstance(q.zero, Tensor)
    zero = q.zero.float().reshape(())
    return zero - zero.round()


def _int4_8(p: NpuWeight, arch: str) -> Product:
    """As one expert of a grouped product, which is what this kind is documented for."""
    assert isinstance(p.stored, QTensor)
    codes, scale, scale_bias = p.stored.codes, p.kernel["scale"], p.kernel["scale_bias"]

    def product(x: Tensor | QTensor, index: int, dtype: torch.dtype) -> Tensor:
        q = x if isinstance(x, QTensor) else quantize(x.detach(), p.inputs[index], arch)
        if dtype not in HALF_TYPES:
            return _widened(q, layouts.unpack_int4(codes[0]), layouts.from_scale_words(scale.reshape(-1)))
        ends = torch.full((1,), q.codes.shape[0], dtype=torch.int64, device=p.place)
        return calls.grouped_matmul(q.codes, codes, ends, dtype, scale=scale, bias=scale_bias, per_token_scale=_rows(q))

    return product


def _int4(p: NpuWeight, arch: str) -> Product:
    assert isinstance(p.stored, QTensor)
    codes, scale = p.stored.codes, p.kernel["scale"]

    def product(x: Tensor | QTensor, index: int, dtype: torch.dtype) -> Tensor:
        o = None if isinstance(x, QTensor) else p.inputs[index]
        half = dtype in HALF_TYPES
        if isinstance(x, Tensor) and o is not None and half and not o.static and not o.clipped and _default(o.format):
            packed, rows = calls.dynamic_quant(x.detach(), calls.QUINT4X2)
        else:
            q = x if isinstance(x, QTensor) else quantize(x.detach(), p.inputs[index], arch)
            if not half:
                return _widened(q, layouts.unpack_int4(codes).transpose(0, 1).contiguous(), scale)
            packed, rows = layouts.pack_int4(q.codes), _rows(q)
        return calls.quant_matmul(packed, codes.transpose(0, 1), scale, dtype, pertoken_scale=rows)

    return product


def _widened(q: QTensor, w: Tensor, scale: Tensor) -> Tensor:
    """fp32, which int4 operators do not return: int8 codes [K, N] unpacked for this call, int32 sums."""
    y = calls.quant_matmul(q.codes, w, scale, torch.int32).float()
    return y * _rows(q)[:, None] * scale


def _default(f: Format) -> bool:
    return f.rule in (Rule(), Rule(clip="range")) and f.zero is None  # without a clip, its order means nothing


def _fp8(p: NpuWeight, arch: str) -> Product:
    assert isinstance(p.stored, QTensor)
    codes, scale = p.stored.codes, p.kernel["scale"]
    blocks = {"group_sizes": [1, 128, 128]} if p.path.kind == "FP8 blocks" else {}

    def product(x: Tensor | QTensor, index: int, dtype: torch.dtype) -> Tensor:
        q = x if isinstance(x, QTensor) else quantize(x.detach(), p.inputs[index], arch)
        assert isinstance(q.scale, Tensor)
        rows = q.scale.float() if blocks else _rows(q)
        return calls.quant_matmul(
            q.codes, codes.transpose(0, 1), scale, dtype, pertoken_scale=rows, bias=p.bias, **blocks
        )

    return product


def _mx(p: NpuWeight, arch: str) -> Product:
    assert isinstance(p.stored, QTensor)
    codes, scale = p.stored.codes, p.kernel["scale"]
    fp4 = p.path.kind == "MXFP4"
    types = {"x1_dtype": calls.E2M1} if fp4 else {}
    types |= {} if p.path.kind == "MXFP8" else {"x2_dtype": calls.E2M1}
    bias = p.bias if p.bias is None or p.path.kind != "MXFP4 x MXFP8" else p.bias[None]

    def product(x: Tensor | QTensor, index: int, dtype: torch.dtype) -> Tensor:
        if isinstance(x, QTensor):
            assert isinstance(x.scale, Tensor)
            q, pairs = (layouts.pack_nibbles(x.codes) if fp4 else x.codes), layouts.mx_pairs(x.scale)
        else:
            q, pairs = mx_codes(x.detach(), p.inputs[index].format)
        return calls.quant_matmul(
            q, codes.transpose(0, 1), scale, dtype, pertoken_scale=pairs, bias=bias, **_MX, **types
        )

    return product
