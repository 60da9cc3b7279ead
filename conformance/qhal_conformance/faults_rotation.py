"""Planted faults in chains of rotations: tables, transposes, signs, factors, order, normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.interface import QuantOps
from qhal.prepared import Prepared
from qhal.requests import HadamardRequest
from qhal.rotations import Dense, Diagonal, Hadamard, Kronecker, Permutation, Rotation
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance.wrapping import Weight, WeightRequest, Wrapped

Chain = list[Rotation]


class _Chained(Wrapped):
    """hadamard of a spoiled chain; n is the size of the axis."""

    def _chain(self, chain: Chain, n: int) -> Chain:
        raise NotImplementedError

    def prepare(self, w: Weight, request: WeightRequest, **how: Any) -> Prepared:
        """Remember the chain."""
        made = self._inner.prepare(w, request, **how)
        if isinstance(request, HadamardRequest) and isinstance(w, Sequence):
            self.__dict__.setdefault("_chains", {})[made.handle] = list(w)
        return made

    def hadamard(self, x: Tensor, rotation: Prepared | Sequence[Rotation], **how: Any) -> Tensor | QTensor:
        """Spoil, then rotate."""
        chain = self.__dict__["_chains"][rotation.handle] if isinstance(rotation, Prepared) else list(rotation)
        return self._inner.hadamard(x, self._chain(chain, x.shape[-1]), **how)


def _chained(change: Callable[[Chain, int], Chain]) -> type[Wrapped]:
    return type("ChainFault", (_Chained,), {"_chain": lambda self, chain, n: change(chain, n)})


def _each(change: Callable[[Rotation, int], Rotation | Chain]) -> type[Wrapped]:
    """Change every rotation by itself, to one or several."""

    def chain(found: Chain, n: int) -> Chain:
        spoiled: Chain = []
        for r in found:
            new = change(r, n)
            spoiled += new if isinstance(new, list) else [new]
        return spoiled

    return _chained(chain)


def _transposed(r: Rotation, n: int) -> Rotation:
    return replace(r, transpose=not r.transpose) if isinstance(r, Hadamard) and r.k > 1 else r


def _table_within(r: Rotation, n: int) -> Rotation | Chain:
    """The table acts on the last axis of [n / k, k], not on the first of [k, n / k]."""
    if not isinstance(r, Hadamard) or r.k == 1 or r.k == r.n or r.n != n:
        return r
    order = torch.arange(n).reshape(n // r.k, r.k).T.reshape(-1)
    return [Permutation(order), r, Permutation(torch.argsort(order))]


def _unscaled(r: Rotation, n: int) -> Rotation | Chain:
    """The sum over the table is not divided by sqrt k."""
    return [r, Diagonal(torch.full((n,), r.k**0.5))] if isinstance(r, Hadamard) and r.k > 1 else r


def _first_block(r: Rotation, n: int) -> Rotation | Chain:
    """Only the first of several blocks is rotated, the others stay as they were."""
    if not isinstance(r, Hadamard) or r.n == n:
        return r
    whole = torch.eye(n, dtype=torch.float64)
    whole[: r.n, : r.n] = r.matrix(r.n)
    return Dense(whole)


def _sylvester_only(r: Rotation, n: int) -> Rotation:
    """The table is left out: only the power of two within it is transformed."""
    return Hadamard(r.n // r.k) if isinstance(r, Hadamard) and r.k > 1 else r


def _factors(change: Callable[[Kronecker], Kronecker]) -> type[Wrapped]:
    return _each(lambda r, n: change(r) if isinstance(r, Kronecker) else r)


def _flipped(m: Tensor | None) -> Tensor | None:
    return None if m is None else m.T.contiguous()


def _sides(r: Kronecker) -> Kronecker:
    """One factor alone acts on the other side."""
    return Kronecker(r.right, r.left) if r.left is None or r.right is None else r


def _table_in_bf16(ops: QuantOps, x: Tensor, chain: Chain) -> Tensor | None:
    """Sums over the table are rounded to bf16 before the butterflies."""
    r = chain[0]
    if len(chain) > 1 or not isinstance(r, Hadamard) or r.k == 1 or r.n == r.k:
        return None
    table = Hadamard(r.k, r.k, r.table, r.transpose).matrix(r.k) * r.k**0.5
    sums = ops.hadamard(x.float().reshape(-1, r.n), [Kronecker(table, None)])
    assert isinstance(sums, Tensor)
    y = ops.hadamard(sums.bfloat16().float(), [Hadamard(r.n // r.k)])
    return y.reshape(x.shape) * float(r.k) ** -0.5 if isinstance(y, Tensor) else None


def _approximate_root(ops: QuantOps, x: Tensor, chain: Chain) -> Tensor | None:
    """From order 64 on, 1 / sqrt n comes from an approximate reciprocal root: one unit of float32 too small."""
    y = ops.hadamard(x.float(), chain)
    return y * (1 - 2.0**-24) if isinstance(y, Tensor) and chain[0].blocks(x.shape[-1]) >= 64 else None


def _scaled_last(ops: QuantOps, x: Tensor, chain: Chain) -> Tensor:
    """Sums of fp16 numbers are scaled when they are complete: past 65504 they are infinite."""
    y, n = ops.hadamard(x.float(), chain), chain[0].n  # type: ignore[union-attr]
    assert isinstance(y, Tensor)
    return torch.where(y.abs() * n**0.5 > 65504, torch.sign(y) * torch.inf, y) if x.dtype == torch.float16 else y


def _rows_past(ops: QuantOps, x: Tensor, chain: Chain) -> Tensor:
    """Rows past 256 stay as they were."""
    y = ops.hadamard(x.float(), chain)
    assert isinstance(y, Tensor)
    return torch.cat([y[:256], x[256:].float()])


def _after(spoil: Callable[[Tensor, int], Tensor]) -> type[Wrapped]:
    """Butterflies of order n whose result is spoiled."""

    def rotate(ops: QuantOps, x: Tensor, chain: Chain) -> Tensor | None:
        r, y = chain[0], ops.hadamard(x, chain)
        return spoil(y.float(), r.n) if isinstance(r, Hadamard) and r.k == 1 and isinstance(y, Tensor) else None

    return _own(rotate)


def _bit_reversed(y: Tensor, n: int) -> Tensor:
    bits = n.bit_length() - 1
    order = torch.tensor([int(f"{i:0{bits}b}"[::-1], 2) for i in range(n)])
    return y.reshape(*y.shape[:-1], -1, n)[..., order].reshape(y.shape)


class _Own(_Chained):
    """Plain results by `_rotate`, in float32, where it gives one."""

    _rotate: Callable[[QuantOps, Tensor, Chain], Tensor | None]

    def hadamard(
        self,
        x: Tensor,
        rotation: Prepared | Sequence[Rotation],
        *,
        quantize: Operand | None = None,
        out: Tensor | QTensor | None = None,
        **how: Any,
    ) -> Tensor | QTensor:
        """Rotate, round to the type of x."""
        chain = self.__dict__["_chains"][rotation.handle] if isinstance(rotation, Prepared) else list(rotation)
        own = quantize is None and x.dim() == 2 and all(isinstance(r, Hadamard) for r in chain)
        y = type(self)._rotate(self._inner, x, chain) if own else None
        if y is None:
            return self._inner.hadamard(x, rotation, quantize=quantize, out=out, **how)
        return out.copy_(y) if isinstance(out, Tensor) else y.to(x.dtype)


def _own(rotate: Callable[[QuantOps, Tensor, Chain], Tensor | None]) -> type[Wrapped]:
    return type("OwnRotation", (_Own,), {"_rotate": staticmethod(rotate)})


ROTATION_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
    ("rotation-unscaled", "rotation", "1 / sqrt n is missing", _after(lambda y, n: y * n**0.5)),
    ("rotation-bit-reversed", "rotation", "features come out in bit-reversed order", _after(_bit_reversed)),
    ("rotation-rounded", "rotation", "an undeclared rounding to bf16", _after(lambda y, n: y.bfloat16().float())),
    ("rotation-last-sign", "rotation", "the last feature has the wrong sign",
     _after(lambda y, n: torch.cat([y[..., :-1], -y[..., -1:]], -1))),
    ("table-transposed", "rotation", "the table's transpose is applied", _each(_transposed)),
    ("table-on-last-axis", "rotation", _table_within.__doc__ or "", _each(_table_within)),
    ("table-unscaled", "rotation", _unscaled.__doc__ or "", _each(_unscaled)),
    ("table-left-out", "rotation", _sylvester_only.__doc__ or "", _each(_sylvester_only)),
    ("first-block-only", "rotation", _first_block.__doc__ or "", _each(_first_block)),
    ("signs-ignored", "rotation", "sign vectors are not applied",
     _each(lambda r, n: [] if isinstance(r, Diagonal) else r)),
    ("last-sign-lost", "rotation", "the last entry of a sign vector is taken as +1",
     _each(lambda r, n: Diagonal(torch.cat([r.values[:-1], r.values[-1:].abs()])) if isinstance(r, Diagonal) else r)),
    ("signs-shifted", "rotation", "sign vectors are read one entry late",
     _each(lambda r, n: Diagonal(r.values.roll(-1)) if isinstance(r, Diagonal) else r)),
    ("chain-reversed", "rotation", "the last rotation of a chain is applied first", _chained(lambda c, n: c[::-1])),
    ("chain-cut", "rotation", "only the first rotation of a chain is applied", _chained(lambda c, n: c[:1])),
    ("left-not-transposed", "rotation", "left X right for left^T X right",
     _factors(lambda r: Kronecker(_flipped(r.left), r.right))),
    ("right-transposed", "rotation", "left^T X right^T", _factors(lambda r: Kronecker(r.left, _flipped(r.right)))),
    ("one-factor-other-side", "rotation", _sides.__doc__ or "", _factors(_sides)),
    ("block-transposed", "rotation", "a dense block is read column by column",
     _each(lambda r, n: Dense(r.block.T.contiguous()) if isinstance(r, Dense) else r)),
    ("table-sums-in-bf16", "rotation", _table_in_bf16.__doc__ or "", _own(_table_in_bf16)),
    ("rotation-approximate-root", "rotation", _approximate_root.__doc__ or "", _own(_approximate_root)),
    ("rotation-scaled-last", "rotation", _scaled_last.__doc__ or "", _own(_scaled_last)),
    ("rotation-rows-past-256", "rotation", _rows_past.__doc__ or "", _own(_rows_past)),
    ("permutation-inverted", "rotation", "features go where they should come from",
     _each(lambda r, n: r.inverse() if isinstance(r, Permutation) else r)),
)  # fmt: skip
"""(name, profile, what is wrong, class)"""
