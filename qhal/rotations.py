"""Rotation: the linear maps that formats apply to activations, as data.

Row-vector convention: y = x @ R.matrix(n). A chain is a tuple, applied left to right. `kind` is a frozen description
for requests, `blocks(n)` the period that a map mixes (what a tensor-parallel cut must not go through).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial

import torch
from torch import Tensor

from qhal import hadamard_tables
from qhal.errors import FormatError, ShardError
from qhal.named_tables import NamedTables

TABLES = NamedTables({name: partial(hadamard_tables.load, name) for name in hadamard_tables.TABLE_SHA256})
"""Hadamard tables of order k that are no power of two, by name: function that gives the [k, k] matrix of +1 and -1."""


def hadamard_table(name: str, k: int) -> Tensor:
    """The [k, k] matrix of +1 and -1 of that name. FormatError if there is none, or of another order."""
    if name not in TABLES:
        raise FormatError(f"no Hadamard table {name!r} of order {k}; known tables: {', '.join(TABLES)}")
    table = TABLES[name]()
    if table.shape != (k, k):
        raise FormatError(f"Hadamard table {name!r} is of order {table.shape[0]}, not {k}")
    return table


@cache
def sylvester(n: int) -> Tensor:
    """The natural-order Sylvester-Hadamard matrix [n, n] of +1 and -1, float64; n a power of two."""
    if n < 1 or n & (n - 1):
        raise FormatError(f"a Sylvester matrix has a power of two as order, not {n}")
    h = torch.ones(1, 1, dtype=torch.float64, device="cpu")  # cached: never on a default device
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@dataclass(frozen=True, eq=False)
class Diagonal:
    """y = x * values. values [n]: pre-quantization scales, sign vectors, reciprocal smoothing scales."""

    values: Tensor

    @property
    def kind(self) -> tuple[object, ...]:
        """("diagonal", n)"""
        return ("diagonal", self.values.numel())

    def blocks(self, n: int) -> int:
        """1: every feature by itself."""
        return 1

    def inverse(self) -> Diagonal:
        """1 / values, in float64."""
        return Diagonal(1.0 / self.values.double())

    def matrix(self, n: int) -> Tensor:
        """float64 [n, n]."""
        _fits(self, n, self.values.numel())
        return torch.diag(self.values.double())


@dataclass(frozen=True, eq=False)
class Permutation:
    """y[:, j] = x[:, index[j]]. index int64 [n], every feature once: values are checked where they are used."""

    index: Tensor

    def __post_init__(self) -> None:
        if self.index.is_floating_point() or self.index.dtype == torch.bool or self.index.dim() != 1:
            raise FormatError(f"a permutation is int64 [n], not {self.index.dtype} {tuple(self.index.shape)}")

    def checked(self) -> Tensor:
        """The index as int64; FormatError unless it names every feature once. Reads the values."""
        index = self.index.long()
        if not torch.equal(index.sort().values, torch.arange(index.numel(), device=index.device)):
            raise FormatError(f"a permutation of {index.numel()} features must name each of them once")
        return index

    @property
    def kind(self) -> tuple[object, ...]:
        """("permutation", n)"""
        return ("permutation", self.index.numel())

    def blocks(self, n: int) -> int:
        """n: features move anywhere."""
        return n

    def inverse(self) -> Permutation:
        """The permutation that undoes this one."""
        return Permutation(torch.argsort(self.index))

    def matrix(self, n: int) -> Tensor:
        """float64 [n, n]."""
        _fits(self, n, self.index.numel())
        return torch.eye(n, dtype=torch.float64, device=self.index.device)[:, self.checked()]


@dataclass(frozen=True)
class Hadamard:
    """H x / sqrt(n) for x viewed [k, n/k]: natural-order Sylvester on the last axis, the order-k table on the first.

    Repeated on every consecutive n features of a longer axis. Tables are named data: projects use different matrices of
    one order, and a transposed one is another rotation (Sylvester's own is symmetric).
    """

    n: int
    k: int = 1
    table: str = ""
    transpose: bool = False

    def __post_init__(self) -> None:
        rest = self.n // self.k if self.k > 0 else 0
        if self.k < 1 or self.n % self.k or rest & (rest - 1) or rest == 0:
            raise FormatError(f"Hadamard({self.n}, k={self.k}): n / k must be a power of two")

    @property
    def kind(self) -> tuple[object, ...]:
        """("hadamard", n, k, table, transpose)"""
        return ("hadamard", self.n, self.k, self.table, self.transpose)

    def blocks(self, n: int) -> int:
        """The order n of one transform."""
        return self.n

    def inverse(self) -> Hadamard:
        """The transposed transform: the matrix is orthogonal."""
        return replace(self, transpose=not self.transpose) if self.k > 1 else self

    def matrix(self, n: int) -> Tensor:
        """float64 [n, n], block diagonal if n is a multiple of the order."""
        _fits(self, n, self.n)
        h = torch.kron(self._table_t(), sylvester(self.n // self.k)) / math.sqrt(self.n)
        return _repeat(h, n // self.n)

    def _table_t(self) -> Tensor:
        if self.k == 1:
            return torch.ones(1, 1, dtype=torch.float64, device="cpu")
        t = hadamard_table(self.table, self.k).double()
        return t if self.transpose else t.t().contiguous()  # row vectors: (T X) as x @ kron(T^T, .)


def hadamard_for(n: int, family: str = "quarot") -> Hadamard:
    """The transform H x of n features as a project (quarot, spinquant, quip) computes it; `.inverse()` is H^T x.

    The order k is chosen by the project's own list, `hadamard_tables.FAMILIES`. FormatError for sizes without a table.
    QuaRot and SpinQuant apply H to the activations; QuIP# H^T to a layer's input and H to its output.
    """
    k, table = hadamard_tables.factor(n, family)
    return Hadamard(n, k, table)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """x viewed [l, r]: left^T @ X @ right, or x @ kron(left, right). None is the identity of the remaining size."""

    left: Tensor | None
    right: Tensor | None

    def __post_init__(self) -> None:
        for factor in (self.left, self.right):
            _square(self, factor)

    @property
    def kind(self) -> tuple[object, ...]:
        """("kronecker", l, r), 0 for an identity."""
        return ("kronecker", *(0 if m is None else m.shape[0] for m in (self.left, self.right)))

    def blocks(self, n: int) -> int:
        """The right factor's size if the left is the identity, else n."""
        return n if self.left is not None else (self.right.shape[0] if self.right is not None else 1)

    def inverse(self) -> Kronecker:
        """Inverse of both factors, in float64."""
        return Kronecker(*(None if m is None else _inverted(m) for m in (self.left, self.right)))

    def matrix(self, n: int) -> Tensor:
        """float64 [n, n]."""
        given = [m for m in (self.left, self.right) if m is not None]
        known = math.prod(m.shape[0] for m in given)
        if self.left is not None and self.right is not None and n != known:
            raise FormatError(f"Kronecker of {self.left.shape[0]} x {self.right.shape[0]} does not fit {n} features")
        _fits(self, n, known)
        eye = torch.eye(n // known, dtype=torch.float64, device=given[0].device if given else "cpu")
        left = self.left.double() if self.left is not None else eye
        right = self.right.double() if self.right is not None else (eye if self.left is not None else eye[:1, :1])
        return torch.kron(left, right)


@dataclass(frozen=True, eq=False)
class Dense:
    """x_block @ matrix for every consecutive block of b features. matrix [b, b], any float dtype."""

    block: Tensor

    def __post_init__(self) -> None:
        _square(self, self.block)

    @property
    def kind(self) -> tuple[object, ...]:
        """("dense", b)"""
        return ("dense", self.block.shape[0])

    def blocks(self, n: int) -> int:
        """b."""
        return self.block.shape[0]

    def inverse(self) -> Dense:
        """The inverse matrix, in float64."""
        return Dense(_inverted(self.block))

    def matrix(self, n: int) -> Tensor:
        """float64 [n, n], block diagonal."""
        b = self.block.shape[0]
        _fits(self, n, b)
        return _repeat(self.block.double(), n // b)


Rotation = Diagonal | Permutation | Hadamard | Kronecker | Dense


def kinds(chain: Sequence[Rotation]) -> tuple[tuple[object, ...], ...]:
    """The frozen description of a chain."""
    return tuple(r.kind for r in chain)


def matrix(chain: Sequence[Rotation], n: int) -> Tensor:
    """The float64 matrix [n, n] of a whole chain: y = x @ matrix."""
    total = torch.eye(n, dtype=torch.float64, device="cpu")
    for r in chain:
        total = total @ r.matrix(n)
    return total


def same(a: Sequence[Rotation], b: Sequence[Rotation]) -> bool:
    """Whether two chains are the same maps: equal kinds and equal tensors."""
    if kinds(a) != kinds(b):
        return False
    pairs = [(getattr(x, f.name), getattr(y, f.name)) for x, y in zip(a, b, strict=True) for f in fields(x)]
    return all(torch.equal(p, q) for p, q in pairs if isinstance(p, Tensor))


def narrow(r: Rotation, size: int, start: int, stop: int) -> Rotation:
    """The part of `r` that acts on features start:stop of `size`; ShardError if it mixes across the cut."""
    if isinstance(r, Diagonal):
        return Diagonal(r.values[start:stop])
    period = r.blocks(size)
    if start % period or stop % period:
        raise ShardError(f"feature {start} or {stop} lies inside a {type(r).__name__} rotation of {period} features")
    return r


def _inverted(m: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.inv(m.double())
    return inverse.contiguous()  # the solver's result is column-major


def _repeat(block: Tensor, times: int) -> Tensor:
    return torch.kron(torch.eye(times, dtype=block.dtype, device=block.device), block)


def _square(r: object, m: Tensor | None) -> None:
    if m is not None and (m.dim() != 2 or m.shape[0] != m.shape[1] or not m.is_floating_point()):
        raise FormatError(f"{type(r).__name__} needs a square float matrix, not {m.dtype} {tuple(m.shape)}")


def _fits(r: object, n: int, period: int) -> None:
    if period < 1 or n % period or (isinstance(r, Diagonal | Permutation) and n != period):
        raise FormatError(f"{type(r).__name__} of size {period} does not fit {n} features")
