"""Honest variants: products that a device may compute, each right in its own class. None may ever fail.

A tolerance that rejects one of these is wrong, however many faults it catches. `honest_forms.py` has the other
operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qhal.interface import QuantOps
from qhal.requests import NumericsClass
from qhal_conformance.cases import Case
from qhal_conformance.honest_forms import FORMS
from qhal_conformance.outcome import Status
from qhal_conformance.runner import Record, run_case
from qhal_conformance.tolerance import Verdict
from qhal_conformance.wrapping import Recomputed

Sum = Callable[[Tensor, Tensor], Tensor]
"""float32 x [T, K] and w [N, K] -> their product [T, N], float32"""


class Summed(Recomputed):
    """A product by `_sum`; the bias is added in float32, the result rounded once."""

    _numerics = NumericsClass.FP32_ACC
    _sum: Sum

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = type(self)._sum(x.float(), w.float())
        return (y if bias is None else y + bias.float()).to(dtype)


def one(x: Tensor, w: Tensor) -> Tensor:
    """In whatever order the library sums."""
    return x @ w.T


def sequential(size: int) -> Sum:
    """`size` features at a time, one after the other: for 4 the longest chain of roundings."""

    def total(x: Tensor, w: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], w.shape[0])
        for a, b in zip(x.split(size, 1), w.split(size, 1), strict=True):
            y += a @ b.T
        return y

    return total


def split(parts: int, *, tree: bool = False) -> Sum:
    """Partial sums over ranges of features, added at the end in order, or pairwise."""

    def total(x: Tensor, w: Tensor) -> Tensor:
        size = max(-(-x.shape[1] // parts), 1)
        sums = [a @ b.T for a, b in zip(x.split(size, 1), w.split(size, 1), strict=True)]
        while tree and len(sums) > 1:
            sums = [sums[i] + sums[i + 1] if i + 1 < len(sums) else sums[i] for i in range(0, len(sums), 2)]
        return torch.stack(sums).sum(0)

    return total


def backwards(x: Tensor, w: Tensor) -> Tensor:
    """Last feature first."""
    return sequential(8)(x.flip(1), w.flip(1))


def kahan(x: Tensor, w: Tensor) -> Tensor:
    """Blocks of 16 with a compensation of what each addition lost."""
    y, lost = torch.zeros(x.shape[0], w.shape[0]), torch.zeros(x.shape[0], w.shape[0])
    for a, b in zip(x.split(16, 1), w.split(16, 1), strict=True):
        term = a @ b.T - lost
        total = y + term
        lost = torch.where(torch.isfinite(total), (total - y) - term, torch.zeros_like(y))
        y = total
    return y


def unfused(x: Tensor, w: Tensor) -> Tensor:
    """Every product rounded to float32 before it is added, where the others may fuse."""
    y = torch.zeros(x.shape[0], w.shape[0])
    for k in range(0, x.shape[1], 64):
        y += (x[:, None, k : k + 64] * w[None, :, k : k + 64]).sum(-1)
    return y


def aligned(group: int, bits: int) -> Sum:
    """A matrix instruction: `group` products aligned to the largest, cut to `bits` fraction bits, added in float32."""

    return promoted(group, bits, group)


def promoted(group: int, bits: int, interval: int) -> Sum:
    """The same, but the running sum of `interval` products is aligned and cut with them; float32 between intervals."""

    def total(x: Tensor, w: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], w.shape[0])
        for xs, ws in zip(x.double().split(interval, 1), w.double().split(interval, 1), strict=True):
            running = torch.zeros(x.shape[0], w.shape[0], 1, dtype=torch.float64)
            for a, b in zip(xs.split(group, 1), ws.split(group, 1), strict=True):
                terms = torch.cat([running, a[:, None, :] * b[None, :, :]], -1)
                top = torch.frexp(terms.abs().amax(-1, keepdim=True))[1]
                quantum = torch.ldexp(torch.ones_like(terms[..., :1]), top - 1 - bits)
                cut = torch.trunc(terms / quantum) * quantum
                running = torch.where(torch.isfinite(terms), cut, terms).sum(-1, keepdim=True)
            y += running.squeeze(-1).float()
        return y

    return total


class ScaledAfter(Summed):
    """Row scales multiply the sum of codes, not each weight."""

    _sum = staticmethod(one)

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        q = self._now.w
        by_row = q.format.block is not None and q.format.block.kind in ("row", "tensor") and q.zero is None
        if not (by_row and isinstance(q.scale, Tensor) and q.scale.dtype == torch.float32):
            return super()._product(x, w, bias, dtype)
        y = (x.float() @ q.codes.float().T) * q.scale.reshape(1, -1)
        return (y if bias is None else y + bias.float()).to(dtype)


class ScaledByGroup(Summed):
    """Group scales multiply the sum of each group's codes; the float32 sums are promoted group by group."""

    _sum = staticmethod(one)

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        q = self._now.w
        grouped = q.format.block is not None and q.format.block.kind == "group" and q.zero is None
        plain = isinstance(q.scale, Tensor) and q.scale.is_floating_point() and q.group_index is None
        if not (grouped and plain and q.format.element.startswith("int") and isinstance(q.scale, Tensor)):
            return super()._product(x, w, bias, dtype)
        assert q.format.block is not None
        size, y = q.format.block.cols, torch.zeros(x.shape[0], w.shape[0])
        for g, (a, b) in enumerate(zip(x.float().split(size, 1), q.codes.float().split(size, 1), strict=True)):
            y += (a @ b.T) * q.scale[:, g].float()
        return (y if bias is None else y + bias.float()).to(dtype)


class Dequantized(Summed):
    """Weights rounded to the 16-bit type of x, float32 sums."""

    _numerics = NumericsClass.DEQUANT_16
    _sum = staticmethod(one)

    def _product(self, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        narrow = dtype if dtype != torch.float32 else torch.bfloat16
        return super()._product(x, w.to(narrow).float(), bias, dtype)


class Exact(Recomputed):
    """float64 sums, rounded once."""

    _numerics = NumericsClass.EXACT


def summed(total: Sum, numerics: NumericsClass = NumericsClass.FP32_ACC) -> type[Summed]:
    """A backend class whose products are summed so."""
    return type("HonestSum", (Summed,), {"_sum": staticmethod(total), "_numerics": numerics})


_REDUCED = NumericsClass.REDUCED_ACC
HONEST: dict[str, Callable[[QuantOps], QuantOps]] = {
    "exact": Exact,
    "fp32-sum": summed(one),
    "sequential-sum": summed(sequential(4)),
    "blockwise-sum": summed(sequential(128)),
    "backwards-sum": summed(backwards),
    "split-sum": summed(split(4)),
    "tree-sum": summed(split(16, tree=True)),
    "compensated-sum": summed(kahan),
    "unfused-sum": summed(unfused),
    "scaled-after": ScaledAfter,
    "scaled-by-group": ScaledByGroup,
    "aligned-4x25": summed(aligned(4, 25), _REDUCED),
    "aligned-8x13": summed(aligned(8, 13), _REDUCED),
    "aligned-16x13": summed(aligned(16, 13), _REDUCED),
    "aligned-32x13": summed(aligned(32, 13), _REDUCED),
    "promoted-32x13": summed(promoted(32, 13, 128), _REDUCED),
    "promoted-16x13": summed(promoted(16, 13, 128), _REDUCED),
    "dequantized": Dequantized,
    "dequantized-sequential": type("DequantizedSequential", (Dequantized,), {"_sum": staticmethod(sequential(4))}),
}
"""Products, as backends around one that passes."""


@dataclass
class Tally:
    """What a sweep has seen: checks, false alarms, and per variant the largest headroom."""

    checks: int = 0
    alarms: list[dict[str, str]] = field(default_factory=list)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, variant: str, numerics: str, case: str, headroom: float, complaint: str) -> None:
        """One check."""
        self.checks += 1
        seen = self.variants.setdefault(variant, {"class": numerics, "checks": 0, "headroom": 0.0, "case": ""})
        seen["checks"] += 1
        if headroom >= seen["headroom"]:
            seen["headroom"], seen["case"] = headroom, case
        if complaint:
            self.alarms.append({"variant": variant, "case": case, "reason": complaint})

    def object(self) -> dict[str, Any]:
        """As JSON: `checks`, `alarms`, and by variant class, checks and largest headroom."""
        return {"checks": self.checks, "alarms": self.alarms, "variants": self.variants}


def sweep(
    ops: QuantOps,
    cases: Iterable[Case],
    seeds: range,
    seen: Callable[[str, Record], None] = lambda name, record: None,
    done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run every variant of a case's operation on every seed: how many checks, every false alarm, headroom."""
    tally = Tally()
    for case in cases:
        for seed in seeds:
            asked = case.reseeded(seed)
            if case.operation == "gemm":
                for name, make in HONEST.items():
                    record = run_case(asked, make(ops))
                    seen(name, record)
                    o = record.outcome
                    if o.status in (Status.PASS, Status.FAIL, Status.ERROR):
                        complaint = "" if o.status == Status.PASS else o.reason
                        tally.add(name, o.numerics, asked.id, o.headroom or 0.0, complaint)
            elif case.operation in FORMS:
                for name, numerics, verdict in FORMS[case.operation](asked):
                    _judged(tally, name, numerics, asked, verdict)
        done()
    return tally.object()


def _judged(tally: Tally, name: str, numerics: NumericsClass, case: Case, verdict: Verdict) -> None:
    complaint = "" if verdict.kind is None else verdict.detail
    tally.add(name, numerics.label, case.id, verdict.headroom, complaint)


def chosen(cases: Iterable[Case]) -> list[Case]:
    """The cases of a catalogue that have honest variants: products, attention, transforms, grouped products."""
    wanted = {"gemm", *FORMS}
    return [c for c in cases if c.operation in wanted and not c.has("exact")]
