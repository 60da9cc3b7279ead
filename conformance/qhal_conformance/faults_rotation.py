"""Planted faults in chains of rotations: tables, transposes, signs, factors, order, normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhal.prepared import Prepared
from qhal.requests import HadamardRequest
from qhal.rotations import Dense, Diagonal, Hadamard, Kronecker, Permutation, Rotation
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


ROTATION_FAULTS: tuple[tuple[str, str, str, type[Wrapped]], ...] = (
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
    ("permutation-inverted", "rotation", "features go where they should come from",
     _each(lambda r, n: r.inverse() if isinstance(r, Permutation) else r)),
)  # fmt: skip
"""(name, profile, what is wrong, class)"""
