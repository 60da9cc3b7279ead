"""gemm through the matrix instructions that torch reaches: which request takes which path, and the paths.

    16 bits   x in bf16 or fp16, not quantized: the weight is decoded to the type of x, `mm` with float32 sums.
              Class dequant-16: the weight is rounded, sums are float32.
    fp8       both operands e4m3fn with one scale per row or tensor: `_scaled_mm` without fast accumulation. Class
              reduced-acc: sums of 128 products inside the instruction keep 14 bits, then float32.
    block     e4m3fn in blocks of 128 x 128 and activations in groups of 128, sm_90: `_scaled_mm`, which scales the sum
              of 128 products in float32. Class reduced-acc.
    codes     int4 in groups of 128 and e4m3fn activations, sm_90: a kernel writes the codes as e4m3fn, which holds
              them, in every call, and `_scaled_mm` scales the sums of 128 as above. Class reduced-acc.

A product ends in float32, and one more kernel applies scales and bias in float32 and rounds once; or, without bias,
torch's own kernel applies the scales and rounds once to bf16. None of torch's global switches (TF32, sums in 16 bits,
split-K in the output's type) reaches a number: what they touch is asked to end in float32, or switched for the call.

Anything else is a shared kernel's (`qhal_triton`), or the portable product in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from qhal.codebooks import CodebookTensor
from qhal.elements import WIDE, element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.requests import GemmRequest, NumericsClass, minimum_class
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_cuda.kernels import COLUMNS, ROWS, finish_kernel
from qhal_portable import storage
from qhal_portable.gemm import quantized, write
from qhal_portable.prepared import PreparedWeight, Run
from qhal_portable.support import layout
from qhal_triton.gemm.codes import writer
from qhal_triton.launching import Launcher
from qhal_triton.paths import Path
from qhal_triton.wide import float_product

HALVES = (torch.bfloat16, torch.float16)
_FP8 = (8, 9)
"""Compute capability from which there are matrix instructions for fp8."""
_ALIGNED = 16
"""What `_scaled_mm` asks: columns in multiples of 16."""
_BLOCK_ARCH, _BLOCK = (9, 0), 128
_SCALES = 4
"""Rows of scales that `_scaled_mm` wants aligned: of x in blocks of 128 columns, and of the weight's along K."""
FEW = {"fp8": 17, "block": 33, "codes": 512, "codes by group": 129}
"""Rows below which a shared kernel, where one takes the product, is faster than torch's (H200). Of blocks it is the
edge of a tile, measured at 16 and at 64 rows; of codes by group too, at 128 and at 192."""
_WHOLE = 192
"""Rows from which `_scaled_mm` with scales per row is faster than with one scale and a kernel for the rest (H200)."""


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
    words = f"weight decoded to {name} in every call, torch.mm in {name} with fp32 sums, one rounding"
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
    if names == {"e4m3fn"} and capability == _BLOCK_ARCH and _blocks(r):
        words = "W8A8: torch._scaled_mm over blocks of 128, no fast accumulation, bias in fp32, one rounding"
        return Path(kernel="block", executes=words, numerics=NumericsClass.REDUCED_ACC)
    if capability == _BLOCK_ARCH and _codes_fit(r):
        words = "W4A8: codes written as e4m3fn in every call, exact, torch._scaled_mm over groups of 128, no fast "
        words += "accumulation, bias in fp32, one rounding"
        kernel = "codes" if all(_one_scale(f) for f in r.x) else "codes by group"
        return Path(kernel=kernel, executes=words, numerics=NumericsClass.REDUCED_ACC, layouts=(layout(r),))
    if not all(_one_scale(f) for f in (*r.x, r.w)):
        return None
    if names == {"e4m3fn"} and capability >= _FP8:
        words = "W8A8: torch._scaled_mm, no fast accumulation, scales and bias in fp32, one rounding"
        return Path(kernel="fp8", executes=words, numerics=NumericsClass.REDUCED_ACC)
    return None


def _one_scale(f: Format) -> bool:
    """Whether a factor per row, or of the whole tensor, is all that stands beside the codes."""
    return _bare(f) and f.block is not None and f.block.kind in ("row", "tensor")


def _bare(f: Format) -> bool:
    """Whether codes times a plane of plain floats are all there is."""
    scaled = f.op == "*" and f.scale is not None and f.scale.plain and f.scale.element in WIDE
    return scaled and f.zero is None and f.offset is None and f.sparsity is None


def _fp32(f: Format) -> bool:
    return f.scale is not None and f.scale.element == "fp32"


def _blocks(r: GemmRequest) -> bool:
    """Whether the weight has a float32 scale for every 128 x 128 codes and x one for every 128."""
    assert isinstance(r.w, Format)
    if str(r.w.block) != "128x128" or any(str(f.block) != "g128" for f in r.x):
        return False
    return all(_bare(f) and _fp32(f) for f in (r.w, *r.x)) and r.n % _BLOCK == 0 and r.k % (_BLOCK * _SCALES) == 0


def _codes_fit(r: GemmRequest) -> bool:
    """Whether w is int4 with a float scale for every 128 columns, and x e4m3fn with a float32 one for those or all."""
    assert isinstance(r.w, Format)
    if (r.w.element, str(r.w.block)) != ("int4", "g128") or any(f.element != "e4m3fn" for f in r.x):
        return False
    given = all(_bare(f) and _fp32(f) and (_one_scale(f) or str(f.block) == "g128") for f in r.x)
    return given and _bare(r.w) and r.k % (_BLOCK * _SCALES) == 0


def bind(p: PreparedWeight, path: Path, by: Quantize) -> Run:
    """The product of one weight along its path: the body of `gemm`. by: what quantizes x."""
    request = p.request
    assert isinstance(request, GemmRequest)
    product = _PRODUCTS[path.kernel](p, request, by)

    def run(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        sums, scales, dtype = product(x, index)
        if scales is None and p.bias is None and sums.dtype == dtype:
            return write(sums, out)
        direct = out is not None and (out.shape, out.dtype) == (sums.shape, dtype) and out.stride(-1) == 1
        if direct and out is not None:
            return finish(sums, scales, p.bias, out)
        return write(finish(sums, scales, p.bias, sums.new_empty(sums.shape, dtype=dtype)), out)

    return run


def by_rows(few: Run, many: Run, least: int) -> Run:
    """`many` from `least` rows on; `few` says what is wrong with an x that has no rows."""

    def run(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        codes = x.codes if isinstance(x, QTensor) else x
        enough = isinstance(codes, Tensor) and codes.dim() == 2 and codes.shape[0] >= least
        return many(x, index, out) if enough else few(x, index, out)

    return run


def finish(sums: Tensor, scales: tuple[Tensor, Tensor] | None, bias: Tensor | None, out: Tensor) -> Tensor:
    """out [T, N] = the sums times the scales of their row and column, plus bias, in float32, rounded once.

    scales  of x [T, 1] or [1, 1] and of the weight [N, 1] or [1, 1], any float type
    """
    rows, n = sums.shape
    if sums.numel():
        a, b = (sums, sums) if scales is None else scales
        scaled = scales is not None
        start = _finishing(int(scaled and a.numel() > 1), int(scaled and b.numel() > 1), scaled, bias is not None)
        start(
            (-(-rows // ROWS), -(-n // COLUMNS), 1),
            (sums, a, b, sums if bias is None else bias, out),
            (rows, n, sums.stride(0), out.stride(0)),
        )
    return out


@lru_cache(maxsize=16)
def _finishing(a: int, b: int, scaled: bool, bias: bool) -> Launcher:
    constants = {"A": a, "B": b, "SCALED": scaled, "BIAS": bias, "ROWS": ROWS, "COLUMNS": COLUMNS}
    tensors, numbers = ("sums", "a", "b", "bias", "out"), ("m", "n", "sums_row", "out_row")
    return Launcher(finish_kernel, tensors, numbers, constants, enable_fp_fusion=False)


Quantize = Callable[[Tensor, Operand], QTensor]
_Product = Callable[["Tensor | QTensor", int], "tuple[Tensor, tuple[Tensor, Tensor] | None, torch.dtype]"]
"""x and its operand's index to the sums, the scales that are still to be applied, and the result's type."""


def _plain(p: PreparedWeight, request: GemmRequest, by: Quantize) -> _Product:
    kind = element(request.x[0].element).storage

    def product(x: Tensor | QTensor, index: int) -> tuple[Tensor, None, torch.dtype]:
        q, dtype = quantized(x, request, p, index, by=by)
        value = q.codes if isinstance(q, QTensor) else q.detach()
        if value.dtype != kind:
            raise FormatError(f"x arrives as {value.dtype}, the weight was prepared for {request}")
        return float_product(value, decoded(p, kind).T, dtype if p.bias is None else torch.float32), None, dtype

    return product


def decoded(p: PreparedWeight, dtype: torch.dtype) -> Tensor:
    """[N, K], rounded once to `dtype`."""
    w = storage.canonical(p.multiplied)
    return w.dequantize(dtype) if isinstance(w, QTensor | CodebookTensor) else w.to(dtype)


def _planes(p: PreparedWeight) -> tuple[Tensor, Tensor]:
    """Codes and scales, the tensors themselves: a captured graph reads what a refit writes there."""
    w = storage.canonical(p.stored)
    assert isinstance(w, QTensor) and isinstance(w.scale, Tensor)
    return w.codes, w.scale


def _fp8(p: PreparedWeight, request: GemmRequest, by: Quantize) -> _Product:
    codes, scale = _planes(p)
    one = torch.ones((), dtype=torch.float32, device=p.device)
    bare = p.bias is None and scale.dtype == torch.float32

    def product(x: Tensor | QTensor, index: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None, torch.dtype]:
        q, dtype = quantized(x, request, p, index, by=by)
        assert isinstance(q, QTensor) and isinstance(q.scale, Tensor)
        rows, given = q.codes.shape[0], q.scale
        if not rows:
            return torch.zeros(0, request.n, device=p.device), (given, scale), dtype
        sides = (given.numel(), scale.numel())
        if bare and dtype == torch.bfloat16 and given.dtype == torch.float32:
            if sides == (1, 1):
                return _multiply(q.codes, codes, given.reshape(()), scale.reshape(()), dtype), None, dtype
            if sides == (rows, request.n) and rows >= _WHOLE:
                return _multiply(q.codes, codes, given.contiguous(), scale.reshape(1, -1), dtype), None, dtype
        return _multiply(q.codes, codes, one, one, torch.float32), (given.contiguous(), scale), dtype

    return product


def _block(p: PreparedWeight, request: GemmRequest, by: Quantize) -> _Product:
    codes, scale = _planes(p)
    kept = scale.T
    return _by_runs(p, request, by, lambda: (codes, kept))


def _codes(p: PreparedWeight, request: GemmRequest, by: Quantize) -> _Product:
    stored = p.stored
    assert isinstance(stored, QTensor) and isinstance(stored.scale, Tensor)
    written, scale = writer(stored), stored.scale
    return _by_runs(p, request, by, lambda: (written(), scale.T.float().contiguous()))


def _by_runs(
    p: PreparedWeight, request: GemmRequest, by: Quantize, weight: Callable[[], tuple[Tensor, Tensor]]
) -> _Product:
    """Sums of 128 columns, each scaled. A scale of x for a row, or for all, stands for each of its runs.

    weight  codes [N, K] and float32 scales as `_scaled_mm` takes them; asked in every call: a refit writes new ones
    """
    runs = request.k // _BLOCK

    def product(x: Tensor | QTensor, index: int) -> tuple[Tensor, None, torch.dtype]:
        q, dtype = quantized(x, request, p, index, by=by)
        assert isinstance(q, QTensor) and isinstance(q.scale, Tensor)
        rows, a = q.codes.shape[0], q.codes
        if not rows:
            return torch.zeros(0, request.n, device=p.device), None, dtype
        given = q.scale.expand(rows, runs)
        if rows % _SCALES:
            more = (0, 0, 0, -rows % _SCALES)
            a, given = pad(a.view(torch.uint8), more).view(a.dtype), pad(given, more)
        direct = p.bias is None and dtype == torch.bfloat16
        codes, scale = weight()
        y = _multiply(a, codes, given.T.contiguous().T, scale, dtype if direct else torch.float32)
        return y[:rows], None, dtype

    return product


def _multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch._scaled_mm(a, b.T, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=False)


_PRODUCTS = {"16 bits": _plain, "fp8": _fp8, "block": _block, "codes": _codes, "codes by group": _codes}
