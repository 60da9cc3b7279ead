"""Planted faults of products that only some sizes, numbers or moments show. Found by people who tried to pass the suite
with a broken backend; each of them once did."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.interface import QuantOps
from qhal.prepared import Prepared
from qhal.requests import GemmRequest
from qhal.tensors import QTensor
from qhal_conformance.faults_weight import spoiled
from qhal_conformance.wrapping import Recomputed, Weight, WeightRequest, Wrapped, rounded

Product = Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


def exact(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The right product: float64, rounded once."""
    y = x.double() @ w.double().T
    return rounded(y if bias is None else y + bias, dtype)


def _product(spoil: Product) -> type[Wrapped]:
    return type("RareProduct", (Recomputed,), {"_product": lambda self, x, w, bias, dtype: spoil(x, w, bias, dtype)})


def _past(axis: str, limit: int) -> type[Wrapped]:
    """Rows, columns or features past a limit are not computed."""

    def spoil(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if axis == "k":
            return exact(x[:, :limit], w[:, :limit], bias, dtype)
        y = exact(x, w, bias, dtype)
        (y if axis == "m" else y.T)[limit:] = 0
        return y

    return _product(spoil)


def _x(change: Callable[[Tensor, torch.dtype], Tensor]) -> type[Wrapped]:
    return _product(lambda x, w, bias, dtype: exact(change(x, dtype), w, bias, dtype))


def _y(change: Callable[[Tensor], Tensor]) -> type[Wrapped]:
    return _product(lambda x, w, bias, dtype: change(exact(x, w, bias, dtype)))


def _tiled_bias(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = exact(x, w, bias, dtype)
    if bias is not None:
        y[64:] = exact(x[64:], w, None, dtype)
    return y


def _half_away(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = exact(x, w, bias, torch.float64)
    if dtype == torch.float32:
        return y.to(dtype)
    unit = torch.ldexp(torch.ones_like(y), torch.frexp(y)[1] - (8 if dtype == torch.bfloat16 else 11))
    near = torch.sign(y) * torch.floor(y.abs() / unit + 0.5) * unit
    return torch.where(torch.isfinite(near), near, y).to(dtype)


def _overflowing(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    for a, b in zip(x.double().split(16, 1), w.double().split(16, 1), strict=True):
        total = total + a @ b.T
        total = torch.where(total.abs() > 65504, torch.sign(total) * torch.inf, total)
    return rounded(total if bias is None else total + bias, dtype)


def _saturated(y: Tensor) -> Tensor:
    top = torch.finfo(y.dtype).max
    return torch.where(torch.isinf(y), (torch.sign(y) * top).to(y.dtype), y)


def _flushed(y: Tensor) -> Tensor:
    least = torch.finfo(y.dtype).smallest_normal
    return torch.where(y.abs() < least, torch.zeros_like(y), y)


def _through_fp16(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.half().float() if dtype == torch.bfloat16 else x


def _subnormal_x(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(x.abs() < 2.0**-14, torch.zeros_like(x), x) if dtype == torch.float16 else x


def _weights_flushed(x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return exact(x, torch.where(w.abs() < 2.0**-14, 0 * w, w) if dtype == torch.float16 else w, bias, dtype)


def _scale(change: Callable[[Tensor], Tensor], *, only: torch.dtype) -> type[Wrapped]:
    """Scales of one dtype, changed."""

    def spoil(w: QTensor) -> QTensor:
        fits = isinstance(w.scale, Tensor) and w.scale.dtype == only
        return replace(w, scale=change(w.scale)) if fits and isinstance(w.scale, Tensor) else w

    return spoiled(spoil)


def _codes(change: Callable[[Tensor], Tensor]) -> type[Wrapped]:
    def spoil(w: QTensor) -> QTensor:
        if w.codes.element_size() != 1:
            return w
        return replace(w, codes=change(w.codes.view(torch.int8).clone()).view(w.codes.dtype))

    return spoiled(spoil)


def _one_lane(codes: Tensor) -> Tensor:
    rows, columns = torch.arange(codes.shape[0]) % 8 == 3, torch.arange(codes.shape[1]) % 16 == 5
    return torch.where((codes == 5) & rows[:, None] & columns, codes - 1, codes)


def _pair(codes: Tensor) -> Tensor:
    if codes.shape[1] % 2 == 0:
        low, high = codes[:, 0::2], codes[:, 1::2]
        low[((low & 15) == 15) & ((high & 15) == 8)] = 0
    return codes


class _Calls(Wrapped):
    """Spoils the results of some calls, by their number."""

    _wrong: Callable[[int], bool]

    def __init__(self, inner: QuantOps) -> None:
        super().__init__(inner)
        self._count = 0

    def gemm(self, x: Tensor | QTensor, w: Prepared, **how: Any) -> Tensor:
        """Count, compute, spoil one element."""
        y = self._inner.gemm(x, w, **how)
        self._count += 1
        if type(self)._wrong(self._count) and y.numel():
            y[0, 0] = 2 * y[-1, -1] + 1
        return y


def _calls(wrong: Callable[[int], bool]) -> type[Wrapped]:
    return type("CallsFault", (_Calls,), {"_wrong": staticmethod(wrong)})


class _Remembering(Wrapped):
    """Keeps something between calls."""

    def __init__(self, inner: QuantOps) -> None:
        super().__init__(inner)
        self._seen: dict[Any, Any] = {}


class NoRowsRaise(Wrapped):
    """A product without rows is a launch without blocks, which fails."""

    def gemm(self, x: Tensor | QTensor, w: Prepared, **how: Any) -> Tensor:
        """An error of its own."""
        if x.shape[0] == 0:
            raise RuntimeError("invalid launch configuration")
        return self._inner.gemm(x, w, **how)


class NewestWeight(_Remembering):
    """The weight that was prepared last for a request serves every weight of that request."""

    def prepare(self, w: Weight, request: WeightRequest, **how: Any) -> Prepared:
        """Remember it."""
        made = self._inner.prepare(w, request, **how)
        if isinstance(request, GemmRequest):
            self._seen[request] = made
        return made

    def gemm(self, x: Tensor | QTensor, w: Prepared, **how: Any) -> Tensor:
        """With the newest."""
        return self._inner.gemm(x, self._seen.get(w.request, w), **how)


class InputByAddress(_Remembering):
    """What was done to x is kept by its address: new numbers in an old buffer are not seen."""

    def gemm(self, x: Tensor | QTensor, w: Prepared, **how: Any) -> Tensor:
        """With the first numbers."""
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 2:
            x = self._seen.setdefault((x.data_ptr(), tuple(x.shape)), x.clone())
        return self._inner.gemm(x, w, **how)


class ScaleOfFirstCall(_Remembering):
    """The scales of the first quantized x serve all that follow."""

    def gemm(self, x: Tensor | QTensor, w: Prepared, **how: Any) -> Tensor:
        """With old scales."""
        if isinstance(x, QTensor) and isinstance(x.scale, Tensor):
            x = replace(x, scale=self._seen.setdefault((w.handle, x.scale.shape), x.scale.clone()))
        return self._inner.gemm(x, w, **how)


class WrongInOtherThreads(Wrapped):
    """State that belongs to the thread that loaded the backend is missing in others."""

    def gemm(self, x: Tensor | QTensor, w: Prepared, **how: Any) -> Tensor:
        """Zeros elsewhere."""
        y = self._inner.gemm(x, w, **how)
        return y if threading.current_thread() is threading.main_thread() else y.zero_()


class OneRefitOnly(_Remembering):
    """The second prepare(into=) of a weight changes nothing."""

    def prepare(self, w: Weight, request: WeightRequest, *, into: Prepared | None = None, **how: Any) -> Prepared:
        """Count refits by weight."""
        if into is not None:
            if into.handle in self._seen:
                return into
            self._seen[into.handle] = True
        return self._inner.prepare(w, request, into=into, **how)


class RefitKeepsBias(_Remembering):
    """prepare(into=) leaves the old bias."""

    def prepare(
        self, w: Weight, request: WeightRequest, *, bias: Tensor | None = None, into: Prepared | None = None, **how: Any
    ) -> Prepared:
        """With the first bias."""
        if into is not None and bias is not None:
            bias = self._seen[into.handle]
        made = self._inner.prepare(w, request, bias=bias, into=into, **how)
        self._seen[made.handle] = bias
        return made


class StridesIgnored(Wrapped):
    """Planes of a weight are read as if they were contiguous."""

    def prepare(self, w: Weight, request: WeightRequest, **how: Any) -> Prepared:
        """From the first address on."""
        if isinstance(w, QTensor) and not w.codes.is_contiguous() and w.codes.dim() == 2:
            strides = (w.codes.shape[1], 1)
            w = replace(w, codes=w.codes.as_strided(w.codes.shape, strides, w.codes.storage_offset()))
        return self._inner.prepare(w, request, **how)


RARE_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
    ("rows-past-256", "core-int8", "rows past 256 are not computed", _past("m", 256)),
    ("rows-past-512", "weight-int4", "rows past 512 are not computed", _past("m", 512)),
    ("columns-past-256", "mx", "output features past 256 are not computed", _past("n", 256)),
    ("columns-past-512", "core-fp8", "output features past 512 are not computed", _past("n", 512)),
    ("features-past-4096", "weight-int4", "input features past 4096 are not summed", _past("k", 4096)),
    ("features-past-8192", "nvfp4", "input features past 8192 are not summed", _past("k", 8192)),
    ("one-column-zero", "core-int8", "a single output feature is not computed",
     _product(lambda x, w, b, t: exact(x, w, b, t) * (w.shape[0] > 1))),
    ("bias-past-64-rows", "core-int8", "rows past 64 have no bias", _product(_tiled_bias)),
    ("result-half-away", "core", "ties of the result go away from zero", _product(_half_away)),
    ("result-half-away-mx", "mx", "ties of the result go away from zero", _product(_half_away)),
    ("sum-overflows-fp16", "core-fp8", "a running sum past 65504 becomes infinite", _product(_overflowing)),
    ("overflow-saturates", "weight-int4", "an overflow becomes the largest number", _y(_saturated)),
    ("overflow-saturates-int8", "core-int8", "an overflow becomes the largest number", _y(_saturated)),
    ("x-through-fp16", "core", "bf16 inputs pass through fp16", _x(_through_fp16)),
    ("x-through-fp16-int4", "weight-int4", "bf16 inputs pass through fp16", _x(_through_fp16)),
    ("x-subnormals-flushed", "weight-int4", "subnormal fp16 inputs become zero", _x(_subnormal_x)),
    ("result-subnormals-flushed", "core-int8", "subnormal results become zero", _y(_flushed)),
    ("fp32-result-through-bf16", "weight-int4", "float32 results pass through bf16",
     _y(lambda y: y.bfloat16().float() if y.dtype == torch.float32 else y)),
    ("weight-subnormals-flushed", "weight-int4", "weights that are subnormal in fp16 become zero",
     _product(_weights_flushed)),
    ("no-rows-raise", "core", NoRowsRaise.__doc__ or "", NoRowsRaise),
    ("nan-becomes-zero", "core", "NaN in x counts as zero", _x(lambda x, t: torch.nan_to_num(x, nan=0.0))),
    ("nan-becomes-zero-int4", "weight-int4", "NaN in x counts as zero", _x(lambda x, t: torch.nan_to_num(x, nan=0.0))),
    ("infinity-clamped", "weight-int4", "Inf in x counts as the largest number",
     _x(lambda x, t: x.clamp(-3e38, 3e38))),
    ("scale-magnitude-bf16", "weight-int4", "negative bf16 scales lose their sign",
     _scale(torch.abs, only=torch.bfloat16)),
    ("scale-magnitude-fp32", "core-int8", "negative fp32 scales lose their sign",
     _scale(torch.abs, only=torch.float32)),
    ("scale-through-fp16", "weight-int4", "bf16 scales pass through fp16",
     _scale(lambda s: s.half().bfloat16(), only=torch.bfloat16)),
    ("scale-subnormals-flushed", "weight-int4", "subnormal fp16 scales become zero",
     _scale(_flushed, only=torch.float16)),
    ("exponent-clamped-30", "mx", "exponents past 2^30 are clamped",
     _scale(lambda s: s.clamp(97, 157), only=torch.uint8)),
    ("exponent-clamped-60", "mx", "exponents past 2^60 are clamped",
     _scale(lambda s: s.clamp(67, 187), only=torch.uint8)),
    ("one-code-in-one-lane", "core-fp8", "code 5 is wrong in column 5 of 16 of row 3 of 8", _codes(_one_lane)),
    ("two-codes-meet", "weight-int4", "code 15 beside code 8 is read as 0", _codes(_pair)),
    ("first-call", "core", "the first call of a process is wrong", _calls(lambda n: n == 1)),
    ("fourth-call", "core-int8", "the fourth call is wrong", _calls(lambda n: n == 4)),
    ("every-fiftieth-call", "core", "one call in fifty is wrong", _calls(lambda n: n % 50 == 0)),
    ("newest-weight", "core", NewestWeight.__doc__ or "", NewestWeight),
    ("input-by-address", "core", InputByAddress.__doc__ or "", InputByAddress),
    ("scale-of-first-call", "core-int8", ScaleOfFirstCall.__doc__ or "", ScaleOfFirstCall),
    ("other-threads", "core", WrongInOtherThreads.__doc__ or "", WrongInOtherThreads),
    ("one-refit-only", "core", OneRefitOnly.__doc__ or "", OneRefitOnly),
    ("refit-keeps-bias", "core", RefitKeepsBias.__doc__ or "", RefitKeepsBias),
    ("weight-strides-ignored", "core", StridesIgnored.__doc__ or "", StridesIgnored),
)  # fmt: skip
"""(name, profile, what is wrong, class)"""
