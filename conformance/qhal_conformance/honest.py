"""Honest variants: products that a device may compute, each right in its own class. None may ever fail.

A tolerance that rejects one of these is wrong, however many faults it catches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qhal.interface import QuantOps
from qhal.requests import NumericsClass
from qhal_conformance.cases import Case
from qhal_conformance.outcome import Status
from qhal_conformance.runner import Record, run_case
from qhal_conformance.wrapping import Recomputed


class Fp32Sum(Recomputed):
    """One float32 product, in whatever order the library sums."""

    _numerics = NumericsClass.FP32_ACC

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = x.float() @ w.float().T
        return (y if bias is None else y + bias.float()).to(dtype)


class SequentialSum(Recomputed):
    """Products of four features at a time, added one after the other in float32: the longest chain of roundings."""

    _numerics = NumericsClass.FP32_ACC

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = torch.zeros(x.shape[0], w.shape[0])
        for a, b in zip(x.float().split(4, 1), w.float().split(4, 1), strict=True):
            y += a @ b.T
        return (y if bias is None else y + bias.float()).to(dtype)


class SplitSum(Recomputed):
    """Four partial sums in float32, added at the end."""

    _numerics = NumericsClass.FP32_ACC

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        size = max(-(-x.shape[1] // 4), 1)
        parts = [a @ b.T for a, b in zip(x.float().split(size, 1), w.float().split(size, 1), strict=True)]
        y = torch.stack(parts).sum(0)
        return (y if bias is None else y + bias.float()).to(dtype)


class ScaledAfter(Recomputed):
    """Row scales multiply the sum of codes, not each weight."""

    _numerics = NumericsClass.FP32_ACC

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        q = self._now.w
        by_row = q.format.block is not None and q.format.block.kind in ("row", "tensor") and q.zero is None
        if by_row and isinstance(q.scale, Tensor) and q.scale.dtype == torch.float32:
            y = (x.float() @ q.codes.float().T) * q.scale.reshape(1, -1)
        else:
            y = x.float() @ w.float().T
        return (y if bias is None else y + bias.float()).to(dtype)


class ReducedSum(Recomputed):
    """A matrix instruction of 32 products: aligned to the largest, cut to 13 fraction bits, promoted to float32."""

    _numerics = NumericsClass.REDUCED_ACC

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = torch.zeros(x.shape[0], w.shape[0])
        for a, b in zip(x.double().split(32, 1), w.double().split(32, 1), strict=True):
            products = a[:, None, :] * b[None, :, :]
            top = torch.frexp(products.abs().amax(-1, keepdim=True))[1]
            quantum = torch.exp2((top - 1 - 13).double())
            y += (torch.trunc(products / quantum) * quantum).sum(-1).float()
        return (y if bias is None else y + bias.float()).to(dtype)


class Dequantized(Recomputed):
    """Weights rounded to the 16-bit type of x, float32 sums."""

    _numerics = NumericsClass.DEQUANT_16

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        narrow = dtype if dtype != torch.float32 else torch.bfloat16
        y = x.float() @ w.to(narrow).float().T
        return (y if bias is None else y + bias.float()).to(dtype)


HONEST: dict[str, Callable[[QuantOps], QuantOps]] = {
    "fp32-sum": Fp32Sum,
    "sequential-sum": SequentialSum,
    "split-sum": SplitSum,
    "scaled-after": ScaledAfter,
    "reduced-sum": ReducedSum,
    "dequantized": Dequantized,
}


def sweep(
    ops: QuantOps, cases: Iterable[Case], seeds: range, seen: Callable[[str, Record], None] = lambda name, record: None
) -> dict[str, Any]:
    """Run every variant on every case and seed: how many checks, and every false alarm."""
    checks, alarms = 0, []
    for case in cases:
        for seed in seeds:
            for name, make in HONEST.items():
                record = run_case(case.reseeded(seed), make(ops))
                seen(name, record)
                checks += record.outcome.status == Status.PASS
                if record.outcome.status in (Status.FAIL, Status.ERROR):
                    alarms.append({"variant": name, "case": record.case.id, "reason": record.outcome.reason})
    return {"checks": checks, "alarms": alarms}
