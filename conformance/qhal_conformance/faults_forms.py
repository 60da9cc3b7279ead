"""Planted faults in the forms that one operation has beside its plain one: every option, every kind, far sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qhal.formats import Format
from qhal.prepared import Prepared
from qhal.requests import HadamardRequest
from qhal.rotations import Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance.wrapping import Wrapped

# ---- quantize


class _Quantized(Wrapped):
    """Quantizes changed numbers, or changes what came out."""

    def _before(self, x: Tensor) -> Tensor:
        return x

    def _after(self, q: QTensor, x: Tensor) -> None:
        return None

    def quantize(self, x: Tensor, to: Operand | Format, **how: Any) -> QTensor:
        """Change, quantize, change in place."""
        q = self._inner.quantize(self._before(x), to, **how)
        if x.numel():
            self._after(q, x)
        return q


def _numbers(change: Callable[[Tensor], Tensor]) -> type[Wrapped]:
    return type("NumbersFault", (_Quantized,), {"_before": lambda self, x: change(x)})


def _planes(change: Callable[[QTensor, Tensor], object]) -> type[Wrapped]:
    return type("PlanesFault", (_Quantized,), {"_after": lambda self, q, x: change(q, x)})


def _bounded(reach: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float16 else torch.where(torch.isfinite(x), x.clamp(-reach, reach), x)

    return change


def _rows_past(q: QTensor, x: Tensor) -> None:
    q.codes.view(torch.uint8)[512:] = 0


def _columns_past(q: QTensor, x: Tensor) -> None:
    q.codes.view(torch.uint8)[..., 4096:] = 0


def _stacked(q: QTensor, x: Tensor) -> None:
    if x.dim() > 2:
        q.codes.view(torch.uint8).zero_()


def _partial_scale(q: QTensor, x: Tensor) -> None:
    f = q.format
    short = f.block is not None and f.block.kind == "group" and x.shape[-1] % f.block.cols
    if short and isinstance(q.scale, Tensor) and q.scale.shape[-1] > 1:
        q.scale[..., -1] = q.scale[..., -2]


def _least_lost(q: QTensor, x: Tensor) -> None:
    if q.format.element == "e5m2":
        codes = q.codes.view(torch.uint8)
        codes[(codes & 0x7F) == 1] &= 0x80


# ---- rotations


class _Rotated(Wrapped):
    """hadamard of changed numbers, or with another chain."""

    def _numbers(self, x: Tensor) -> Tensor:
        return x

    def _kinds(self, kinds: tuple[str, ...]) -> bool:
        """Whether such a chain does nothing."""
        return False

    def hadamard(
        self,
        x: Tensor,
        rotation: Prepared | Sequence[Rotation],
        *,
        quantize: Operand | None = None,
        out: Tensor | QTensor | None = None,
        **how: Any,
    ) -> Tensor | QTensor:
        """Change, rotate."""
        request = rotation.request if isinstance(rotation, Prepared) else None
        kinds = request.kinds if isinstance(request, HadamardRequest) else tuple(r.kind for r in rotation)  # type: ignore[union-attr]
        if quantize is not None and quantize.scale is not None and self.__dict__.get("_dynamic", False):
            quantize = Operand(quantize.format)
        names = tuple(str(kind[0]) + ("-table" if kind[0] == "hadamard" and kind[2] != 1 else "") for kind in kinds)
        if self._kinds(names) and isinstance(out, Tensor):
            return out.copy_(x)
        if self._kinds(names):
            return x.clone()
        return self._inner.hadamard(self._numbers(x), rotation, quantize=quantize, out=out, **how)


def _rotated(change: Callable[[Tensor], Tensor]) -> type[Wrapped]:
    return type("RotatedNumbers", (_Rotated,), {"_numbers": lambda self, x: change(x)})


def _identity(which: Callable[[tuple[str, ...]], bool]) -> type[Wrapped]:
    return type("RotationIgnored", (_Rotated,), {"_kinds": lambda self, kinds: which(kinds)})


class StaticIgnored(_Rotated):
    """The fused quantization computes a scale where a static one is given."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.__dict__["_dynamic"] = True


FORM_FAULTS: tuple[tuple[str, str, str, str, type[Wrapped]], ...] = (
    ("quantize", "quantize-clamped-2^80", "core-fp8", "numbers past 2^80 are clamped", _numbers(_bounded(2.0**80))),
    ("quantize", "quantize-clamped-2^80-mx", "mx", "numbers past 2^80 are clamped", _numbers(_bounded(2.0**80))),
    ("quantize", "quantize-through-fp16", "core-int8", "bf16 numbers pass through fp16",
     _numbers(lambda x: x.half().to(x.dtype))),
    ("quantize", "quantize-rows-past-512", "core-int8", "rows past 512 have code 0", _planes(_rows_past)),
    ("quantize", "quantize-columns-past-4096", "core-fp8", "columns past 4096 have code 0", _planes(_columns_past)),
    ("quantize", "quantize-stacked", "core-int8", "x of three axes gives code 0", _planes(_stacked)),
    ("quantize", "quantize-least-subnormal", "core-fp8", "the smallest subnormal code of e5m2 is written as zero",
     _planes(_least_lost)),
    ("quantize", "quantize-partial-group", "core-fp8", "a last short group has the scale before it",
     _planes(_partial_scale)),
    ("cache", "rotation-through-fp16", "rotation", "bf16 rows pass through fp16",
     _rotated(lambda x: x.half().to(x.dtype))),
    ("cache", "rotation-nan-lost", "rotation", "NaN counts as zero", _rotated(lambda x: torch.nan_to_num(x, nan=0.0))),
    ("cache", "rotation-static-ignored", "rotation", StaticIgnored.__doc__ or "", StaticIgnored),
    ("cache", "table-ignored", "rotation", "orders that are no power of two do nothing",
     _identity(lambda kinds: "hadamard-table" in kinds)),
    ("cache", "kronecker-ignored", "rotation", "a Kronecker rotation does nothing",
     _identity(lambda k: k == ("kronecker",))),
    ("cache", "diagonal-ignored", "rotation", "a diagonal does nothing", _identity(lambda k: k == ("diagonal",))),
    ("cache", "permutation-ignored", "rotation", "a permutation does nothing",
     _identity(lambda k: k == ("permutation",))),
    ("cache", "dense-ignored", "rotation", "a dense rotation does nothing", _identity(lambda k: k == ("dense",))),
    ("cache", "chain-ignored", "rotation", "chains of several do nothing", _identity(lambda kinds: len(kinds) > 1)),
)  # fmt: skip
"""(group, name, profile, what is wrong, class)"""
