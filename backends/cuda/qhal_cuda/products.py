"""gemm through the matrix instructions that torch reaches: which request takes which path, and the paths.

Every path ends in float32 or int32: one more kernel applies scales and bias in float32 and rounds once. So none of
torch's global switches (TF32, sums in 16 bits, split-K in the output's type) can reach a number.

    16 bits   x in bf16 or fp16, not quantized: the weight is decoded to the type of x, `mm` with a float32 result.
              Class dequant-16: the weight is rounded, sums are float32.
    int8      both operands int8 with one scale per row or tensor: `_int_mm`, exact int32 sums. Class fp32-acc: what is
              not exact are the products of scales.
    fp8       both operands e4m3fn with one scale per row or tensor: `_scaled_mm` with scales of 1, and without fast
              accumulation. Class reduced-acc: sums of 128 products inside the instruction keep 14 bits, then float32.

Anything else is the portable product in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from qhal.codebooks import CodebookTensor
from qhal.elements import WIDE, element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.requests import GemmRequest, NumericsClass, minimum_class
from qhal.tensors import QTensor
from qhal_cuda.kernels import COLUMNS, ROWS, finish_kernel
from qhal_portable import storage
from qhal_portable.gemm import quantized, write
from qhal_portable.prepared import PreparedWeight, Run
from qhal_portable.support import layout
from qhal_triton.paths import Path

HALVES = (torch.bfloat16, torch.float16)
_FP8 = (8, 9)
"""Compute capability from which there are matrix instructions for fp8."""
_ROWS, _ALIGNED = 17, 16
"""What `_int_mm` and `_scaled_mm` ask: more rows than 16, columns in multiples of 16."""


def choose(r: GemmRequest, capability: tuple[int, int]) -> Path | None:
    """The path for a request whose formats are known to be executable; None: the portable product."""
    if r.operand is not None or r.batch_invariant or not r.x:
        return None
    path = _sixteen(r) or _eight(r, capability)
    return path if path is not None and path.numerics <= minimum_class(r) else None


def _sixteen(r: GemmRequest) -> Path | None:
    kinds = {element(f.element).storage if f.plain else None for f in r.x}
    if not kinds <= set(HALVES) or len(kinds) != 1:
        return None
    name = r.x[0].element
    words = f"weight decoded to {name} in every call, torch.mm in {name} with fp32 sums and result, one rounding"
    return Path(
        kernel="16 bits",
        executes=words,
        numerics=NumericsClass.DEQUANT_16,
        layouts=(layout(r),),
        rounded=element(name).storage,
    )


def _eight(r: GemmRequest, capability: tuple[int, int]) -> Path | None:
    if not isinstance(r.w, Format) or r.group_index or r.k % _ALIGNED or r.n % _ALIGNED:
        return None
    names = {f.element for f in (*r.x, r.w)}
    if not all(_one_scale(f) for f in (*r.x, r.w)):
        return None
    if names == {"int8"} and r.k <= 1 << 16:  # 2^16 * 2^14 sums to 2^30: no int32 overflows
        words = "W8A8: torch._int_mm, exact int32 sums, scales and bias in fp32, one rounding"
        return Path(kernel="int8", executes=words, numerics=NumericsClass.FP32_ACC, accumulate="int32")
    if names == {"e4m3fn"} and capability >= _FP8:
        words = "W8A8: torch._scaled_mm with scales of 1, no fast accumulation, scales and bias in fp32, one rounding"
        return Path(kernel="fp8", executes=words, numerics=NumericsClass.REDUCED_ACC)
    return None


def _one_scale(f: Format) -> bool:
    """Whether a factor per row, or of the whole tensor, is all that stands beside the codes."""
    if f.scale is None or not f.scale.plain or f.scale.element not in WIDE or f.op != "*" or f.block is None:
        return False
    return f.block.kind in ("row", "tensor") and f.zero is None and f.offset is None and f.sparsity is None


def bind(p: PreparedWeight, path: Path) -> Run:
    """The product of one weight along its path: the body of `gemm`."""
    request = p.request
    assert isinstance(request, GemmRequest)
    product = _plain(p, request) if path.kernel == "16 bits" else _scaled(p, request, path.kernel)

    def run(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        sums, scales, dtype = product(x, index)
        direct = out is not None and (out.shape, out.dtype) == (sums.shape, dtype) and out.stride(-1) == 1
        if direct and out is not None:
            return finish(sums, scales, p.bias, out)
        return write(finish(sums, scales, p.bias, sums.new_empty(sums.shape, dtype=dtype)), out)

    return run


def finish(sums: Tensor, scales: tuple[Tensor, Tensor] | None, bias: Tensor | None, out: Tensor) -> Tensor:
    """out [T, N] = the sums times the scales of their row and column, plus bias, in float32, rounded once.

    scales  of x [T, 1] or [1, 1] and of the weight [N, 1] or [1, 1], any float type
    """
    rows, n = sums.shape
    if sums.numel():
        a, b = (sums, sums) if scales is None else scales
        finish_kernel[(-(-rows // ROWS), -(-n // COLUMNS))](
            sums, a, b, sums if bias is None else bias, out, rows, n, sums.stride(0), out.stride(0),
            A=int(scales is not None and a.numel() > 1), B=int(scales is not None and b.numel() > 1),
            SCALED=scales is not None, BIAS=bias is not None, ROWS=ROWS, COLUMNS=COLUMNS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


_Product = Callable[["Tensor | QTensor", int], "tuple[Tensor, tuple[Tensor, Tensor] | None, torch.dtype]"]


def _plain(p: PreparedWeight, request: GemmRequest) -> _Product:
    kind = element(request.x[0].element).storage

    def product(x: Tensor | QTensor, index: int) -> tuple[Tensor, None, torch.dtype]:
        q, dtype = quantized(x, request, p, index)
        value = q.codes if isinstance(q, QTensor) else q.detach()
        if value.dtype != kind:
            raise FormatError(f"x arrives as {value.dtype}, the weight was prepared for {request}")
        return torch.mm(value, decoded(p, kind).T, out_dtype=torch.float32), None, dtype

    return product


def decoded(p: PreparedWeight, dtype: torch.dtype) -> Tensor:
    """[N, K], rounded once to `dtype`."""
    w = storage.canonical(p.multiplied)
    return w.dequantize(dtype) if isinstance(w, QTensor | CodebookTensor) else w.to(dtype)


def _scaled(p: PreparedWeight, request: GemmRequest, kind: str) -> _Product:
    w = storage.canonical(p.stored)
    assert isinstance(w, QTensor) and isinstance(w.scale, Tensor)
    codes, scale = w.codes, w.scale  # the tensors themselves: a captured graph reads what a refit writes there
    one = torch.ones((), dtype=torch.float32, device=p.device)

    def product(x: Tensor | QTensor, index: int) -> tuple[Tensor, tuple[Tensor, Tensor], torch.dtype]:
        q, dtype = quantized(x, request, p, index)
        assert isinstance(q, QTensor) and isinstance(q.scale, Tensor)
        rows = q.codes.shape[0]
        if kind == "int8":
            a = q.codes if rows >= _ROWS else pad(q.codes, (0, 0, 0, _ROWS - rows))
            y = torch._int_mm(a, codes.T)[:rows]
        elif rows:
            y = torch._scaled_mm(
                q.codes, codes.T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False
            )
        else:
            y = torch.zeros(0, request.n, device=p.device)
        return y, (q.scale.contiguous(), scale), dtype

    return product
