"""gemm with codebook weights: entries are multiplied as they are gathered for few rows, else decoded for torch's mm.

A decoded weight lives for one call: keeping it would undo what the checkpoint saved.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qhal.codebooks import CodebookFormat, CodebookTensor
from qhal.elements import element
from qhal.errors import FormatError
from qhal.requests import GemmRequest, NumericsClass, minimum_class
from qhal.tensors import QTensor
from qhal_portable.gemm import quantized, write
from qhal_portable.prepared import PreparedWeight, Run
from qhal_triton.launching import Launcher
from qhal_triton.paths import Path
from qhal_triton.target import Target
from qhal_triton.vq.kernels import product_kernel
from qhal_triton.vq.launch import BOOKS, LARGEST, THREADS, book_tables, decode, divisors, readable, rows_per_scale
from qhal_triton.wide import float_product

KERNEL = "vq"
FEW = 8
"""Rows of x up to which a gathered entry is multiplied at once."""
_HALVES = (torch.bfloat16, torch.float16)


def choose_gemm(request: GemmRequest, target: Target) -> Path | None:
    """The path of a product with a codebook weight and 16-bit activations; None: no kernel takes it."""
    w = request.w
    if not isinstance(w, CodebookFormat) or request.operand is not None or request.batch_invariant or request.static:
        return None
    kinds = {element(f.element).storage if f.plain else None for f in request.x}
    if len(kinds) != 1 or not kinds <= set(_HALVES) or minimum_class(request) < NumericsClass.DEQUANT_16:
        return None
    if any(len(s.codebooks) > BOOKS or s.vector[0] * s.vector[1] > LARGEST for s in w.segments):
        return None
    few = f"entries gathered and multiplied in fp32 up to {FEW} rows, else " if _gathers(w) else ""
    name = request.x[0].element
    return Path(
        kernel=KERNEL,
        executes=f"Triton: {few}the weight decoded to {name} in every call, torch.mm in {name} with fp32 sums",
        numerics=NumericsClass.DEQUANT_16,
        rounded=element(name).storage,
    )


def _gathers(w: CodebookFormat) -> bool:
    """Whether `product_kernel` reads the weight: one segment of vectors along a row, in the order of the input."""
    a, b = w.segments[0].vector
    plain = not (w.permutation or w.column_scale or w.column_bias)
    return len(w.segments) == 1 and a == 1 and b & (b - 1) == 0 and plain


def bind(p: PreparedWeight, target: Target) -> Run | None:
    """The product of one weight with everything bound; None where its planes have types that no kernel loads."""
    request, w = p.request, p.multiplied
    assert isinstance(request, GemmRequest)
    if not isinstance(w, CodebookTensor) or not readable(w):
        return None
    kind = element(request.x[0].element).storage
    gathers = _gathers(w.format)

    def run(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        q, dtype = quantized(x, request, p, index)
        value = q.codes if isinstance(q, QTensor) else q.detach()
        if value.dtype != kind:
            raise FormatError(f"x arrives as {value.dtype}, the weight was prepared for {request}")
        if gathers and 0 < value.shape[0] <= FEW:
            return write(_gathered(value, w, p.bias, dtype, target), out)
        dense = torch.empty(w.shape, dtype=kind, device=w.device)
        decode(w, dense, target)
        return write(float_product(value, dense.T, dtype, p.bias), out)

    return run


def _gathered(x: Tensor, w: CodebookTensor, bias: Tensor | None, dtype: torch.dtype, target: Target) -> Tensor:
    rows, n = x.shape[0], w.shape[0]
    y = torch.empty(rows, n, dtype=dtype, device=x.device)
    s = w.segments[0]
    tables = book_tables(s, x.device)
    of_program = 16 if n >= 4096 else 8
    constants = (
        1 << (rows - 1).bit_length(), s.vector[1], len(s.tables), divisors(s), of_program, 256 // s.vector[1],
        w.scale is not None, bias is not None,
    )  # fmt: skip
    scale = tables[0] if w.scale is None else w.scale.contiguous()
    _launcher(constants, THREADS // target.warp)(
        (-(-n // of_program), 1, 1),
        (x, s.codes.contiguous(), y, *tables, scale, tables[0] if bias is None else bias),
        (rows, n, s.codes.shape[1], w.shape[1], x.stride(0), rows_per_scale(w)),
    )
    return y


@lru_cache(maxsize=256)
def _launcher(constants: tuple[Any, ...], warps: int) -> Launcher:
    fixed = dict(zip(("M", "B", "BOOKS", "DIVISORS", "BN", "BV", "SCALE", "BIAS"), constants, strict=True))
    tensors = ("x", "codes", "y", "table0", "table1", "table2", "table3", "scale", "bias")
    numbers = ("rows", "n", "vectors", "columns", "xstride", "per")
    return Launcher(product_kernel, tensors, numbers, fixed, num_warps=warps, enable_fp_fusion=True)
