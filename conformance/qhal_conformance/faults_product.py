"""Planted faults in how a product is computed: sums, rounding, bias, tiles, buffers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qhal.formats import Format
from qhal.prepared import Prepared
from qhal.tensors import QTensor
from qhal_conformance.wrapping import Bound, Recomputed, Wrapped


class KTailDropped(Recomputed):
    """Features past the last whole tile of 64 are not summed."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        whole = x.shape[1] // 64 * 64
        return super()._product(x[:, :whole], w[:, :whole], bias, dtype)


class LastProductDropped(Recomputed):
    """The last feature is not summed."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return super()._product(x[:, :-1], w[:, :-1], bias, dtype)


class NarrowSum(Recomputed):
    """Sums of 32 products are added up in bf16."""

    _narrow = torch.bfloat16

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        total = torch.zeros(x.shape[0], w.shape[0], dtype=self._narrow)
        for a, b in zip(x.split(32, 1), w.split(32, 1), strict=True):
            total = (total.float() + a @ b.T).to(self._narrow)
        y = total.double()
        return (y if bias is None else y + bias).to(dtype)


class HalfSum(NarrowSum):
    """Sums of 32 products are added up in fp16."""

    _narrow = torch.float16


class PartialLost(Recomputed):
    """With more than 16 rows the last of four partial sums is lost."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        keep = x.shape[1] * 3 // 4 if x.shape[0] > 16 else x.shape[1]
        return super()._product(x[:, :keep], w[:, :keep], bias, dtype)


class Truncated(Recomputed):
    """The result is cut to its type, not rounded."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = super()._product(x, w, bias, torch.float32)
        if dtype == torch.float32:
            return y
        lost = 16 if dtype == torch.bfloat16 else 13
        return ((y.view(torch.int32) >> lost) << lost).view(torch.float32).to(dtype)


class RoundedUp(Recomputed):
    """The result is rounded towards plus infinity."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        exact = super()._product(x, w, bias, torch.float64)
        near = exact.to(dtype)
        up = torch.nextafter(near.float(), torch.tensor(torch.inf)).to(dtype) if dtype == torch.float32 else near
        if dtype != torch.float32:
            up = torch.where(
                near > 0, (near.view(torch.int16) + 1).view(dtype), (near.view(torch.int16) - 1).view(dtype)
            )
        return torch.where(near.double() < exact, torch.where(near == 0, near, up), near)


class BiasOmitted(Recomputed):
    """The bias is not added."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return super()._product(x, w, None, dtype)


class BiasTwice(Recomputed):
    """The bias is added twice."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return super()._product(x, w, None if bias is None else 2 * bias, dtype)


class BiasAfterRounding(Recomputed):
    """The product is rounded to the result's type before the bias is added."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = super()._product(x, w, None, dtype)
        return y if bias is None else (y.double() + bias).to(dtype)


class ColumnZero(Recomputed):
    """One output feature stays zero."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = super()._product(x, w, bias, dtype)
        y[:, w.shape[0] // 2] = 0
        return y


class LastRowZero(Recomputed):
    """The last row of an odd number of rows stays zero."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = super()._product(x, w, bias, dtype)
        if y.shape[0] % 2:
            y[-1] = 0
        return y


class SingleRowPath(Recomputed):
    """The path for one row reads its weights one feature off."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return super()._product(x, w.roll(1, 1) if x.shape[0] == 1 else w, bias, dtype)


class SmallNoise(Recomputed):
    """The result carries noise of half a unit in the last place: stochastic where nearest is declared."""

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = super()._product(x, w, bias, torch.float64)
        g = torch.Generator().manual_seed(7)
        step = torch.finfo(dtype).eps
        return (y * (1 + step * (torch.rand(y.shape, generator=g, dtype=y.dtype) - 0.5))).to(dtype)


class NotDeterministic(Recomputed):
    """Every second call sums in another order of magnitude of care, though the same bits are declared."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self._calls = itertools.count()

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = super()._product(x, w, bias, torch.float64)
        return (y * (1 + 2.0**-9 * (next(self._calls) % 2))).to(dtype)


class TokenScaleShared(Recomputed):
    """One activation scale for all tokens where each has its own."""

    def _input(self, x: Tensor | QTensor, bound: Bound, index: int) -> Tensor:
        if isinstance(x, QTensor) or not bound.inputs or bound.inputs[index].static:
            return super()._input(x, bound, index)
        shared = Format.parse(f"{bound.inputs[index].format.element}.tensor*fp32")
        return self._inner.quantize(x, shared).dequantize()


class ZeroRowDivided(Recomputed):
    """A row of zeros is divided by its scale, which is 0."""

    def _input(self, x: Tensor | QTensor, bound: Bound, index: int) -> Tensor:
        value = super()._input(x, bound, index)
        if isinstance(x, QTensor) or not bound.inputs or bound.inputs[index].static:
            return value
        return torch.where((x == 0).all(-1, keepdim=True), torch.nan, value)


class InputNotQuantized(Recomputed):
    """x is multiplied as it is, although the request quantizes it."""

    def _input(self, x: Tensor | QTensor, bound: Bound, index: int) -> Tensor:
        return x.dequantize() if isinstance(x, QTensor) else x.float()


class StaticScaleIgnored(Recomputed):
    """A dynamic scale is computed where a static one was given."""

    def _input(self, x: Tensor | QTensor, bound: Bound, index: int) -> Tensor:
        if isinstance(x, QTensor) or not bound.inputs:
            return super()._input(x, bound, index)
        return self._inner.quantize(x, bound.inputs[index].format).dequantize()


class ReadsPastRow(Recomputed):
    """The element after a row is read and multiplied by zero: a NaN there becomes a NaN here."""

    def _input(self, x: Tensor | QTensor, bound: Bound, index: int) -> Tensor:
        value = super()._input(x, bound, index)
        if isinstance(x, QTensor) or not x.shape[0] or x.storage_offset() == 0:
            return value
        after = x.as_strided((x.shape[0], 1), (x.stride(0), 1), x.storage_offset() + x.shape[1]).float()
        return value + 0 * after


def _gemm(fault: str, do: Callable[[Callable[[Tensor | None], Tensor], Tensor | None], Any]) -> type[Wrapped]:
    """do(right, out), where right(out) is the right product."""

    def gemm(self: Wrapped, x: Tensor | QTensor, w: Prepared, *, out: Tensor | None = None, **how: Any) -> Any:
        return do(lambda target: self._inner.gemm(x, w, out=target, **how), out)

    return type("ResultFault", (Wrapped,), {"gemm": gemm, "__doc__": fault})


def _nothing(right: Callable[[Tensor | None], Tensor], out: Tensor | None) -> None:
    right(out)


class PreviousResult(Wrapped):
    """The result of the call before is returned if it has the right shape."""

    def gemm(self, x: Tensor | QTensor, w: Prepared, *, out: Tensor | None = None, **how: Any) -> Tensor:
        """Stale."""
        y = self._inner.gemm(x, w, out=out, **how)
        last, self.__dict__["_last"] = self.__dict__.get("_last"), y.clone()
        stale = y if last is None or last.shape != y.shape else last
        return stale if out is None else out.copy_(stale)


class MutatesInput(Wrapped):
    """x is scaled in place."""

    def gemm(self, x: Tensor | QTensor, w: Prepared, **how: Any) -> Tensor:
        """Compute, then spoil x."""
        y = self._inner.gemm(x, w, **how)
        if isinstance(x, Tensor) and x.is_floating_point():
            x *= 0.5
        return y


class WritesPastEnd(Wrapped):
    """One element after the last row of `out` is written."""

    def gemm(self, x: Tensor | QTensor, w: Prepared, *, out: Tensor | None = None, **how: Any) -> Tensor:
        """Compute, then write beside."""
        y = self._inner.gemm(x, w, out=out, **how)
        if out is not None and out.numel() and out.untyped_storage().nbytes() > out.numel() * out.element_size():
            out.as_strided((1,), (1,), out.storage_offset() + (out.shape[0] - 1) * out.stride(0) + out.shape[1]).fill_(
                1
            )
        return y


class Raises(Wrapped):
    """The call fails for one row count."""

    def gemm(self, x: Tensor | QTensor, w: Prepared, **how: Any) -> Tensor:
        """An error of its own."""
        if x.shape[0] == 1:
            raise RuntimeError("invalid launch configuration")
        return self._inner.gemm(x, w, **how)


PRODUCT_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = tuple(
    (name, profile, (kind.__doc__ or "").strip(), kind)
    for name, profile, kind in (
        ("k-tail-dropped", "weight-int4", KTailDropped),
        ("last-product-dropped", "core-int8", LastProductDropped),
        ("bf16-sum", "core-fp8", NarrowSum),
        ("bf16-sum-weight-only", "weight-int4", NarrowSum),
        ("fp16-sum", "core-int8", HalfSum),
        ("partial-lost", "core-fp8", PartialLost),
        ("truncated", "core-int8", Truncated),
        ("rounded-up", "core-fp8", RoundedUp),
        ("bias-omitted", "core-int8", BiasOmitted),
        ("bias-twice", "weight-int4", BiasTwice),
        ("bias-after-rounding", "core-fp8", BiasAfterRounding),
        ("column-zero", "core-int8", ColumnZero),
        ("last-row-zero", "mx", LastRowZero),
        ("single-row-path", "core-int8", SingleRowPath),
        ("stochastic", "core-fp8", SmallNoise),
        ("not-deterministic", "core-int8", NotDeterministic),
        ("token-scale-shared", "core-int8", TokenScaleShared),
        ("zero-row-divided", "mx", ZeroRowDivided),
        ("input-not-quantized", "core-fp8", InputNotQuantized),
        ("static-scale-ignored", "core-fp8", StaticScaleIgnored),
        ("reads-past-row", "core-int8", ReadsPastRow),
        ("previous-result", "core", PreviousResult),
        ("mutates-input", "core", MutatesInput),
        ("ignores-out", "core", _gemm("`out` is not written.", lambda right, out: right(None))),
        (
            "out-not-returned",
            "core",
            _gemm("`out` is written, a copy is returned.", lambda right, out: right(out).clone()),
        ),
        ("wrong-dtype", "core", _gemm("The result is float32.", lambda right, out: right(out).float())),
        (
            "transposed-result",
            "core",
            _gemm("The result has its axes exchanged.", lambda right, out: right(out).t().contiguous().t()),
        ),
        ("writes-past-end", "core", WritesPastEnd),
        ("returns-zeros", "core", _gemm("Nothing is computed.", lambda right, out: right(out).zero_())),
        ("returns-none", "core", _gemm("`out` is written and nothing returned.", _nothing)),
        ("raises", "core", Raises),
    )
)
"""(name, profile, what is wrong, class)"""
