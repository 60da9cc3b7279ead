"""Rotations that are asked, by name, and the matrix of each a second time: numpy, float64, from its definition.

Independent of `qhal.rotations` and `qhal.hadamard_tables` on purpose. Hadamard matrices of orders that are no power of
two are built from their constructions: R. E. A. C. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933);
J. Williamson, Hadamard's determinant theorem and the sum of four squares, Duke Math. J. 11 (1944).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from qhal.rotations import Dense, Diagonal, Hadamard, Kronecker, Permutation, Rotation
from qhal_conformance.generator import F64, I64, Stream

_CIRCULANTS = {
    13: (0x1A, 0x0E, 0x34, 0x5E),
    39: (0xCDF58, 0xAF370, 0xDAE98, 0x47D4E),
    43: (0x2450CE, 0x135E04, 0x342B28, 0x3CDA1C),
}
"""Where the first rows of the four symmetric circulants are negative: bit i for the entries i and n - i."""


@dataclass(frozen=True)
class Turn:
    """One rotation, as it is asked and as the suite applies it: x viewed [..., a, b] -> left^T X right, or an element
    by itself, or features in another order.

    gamma    float32 roundings of its sums, in the sense of `tolerance`: log2 for butterflies, 2 sqrt k for sums of k
    exact    its entries are integers times a power of two: small integers stay exact
    """

    rotation: Rotation
    gamma: float
    exact: bool = False
    left: F64 | None = None
    right: F64 | None = None
    values: F64 | None = None
    index: I64 | None = None

    def apply(self, x: F64, of: Callable[[F64], F64] = lambda entries: entries) -> F64:
        """x [m, n] through the matrix whose entries are `of` this rotation's: np.abs, np.square, or themselves."""
        if self.index is not None:
            return np.asarray(x[:, self.index])
        if self.values is not None:
            return np.asarray(x * of(self.values))
        assert self.left is not None and self.right is not None
        viewed = x.reshape(-1, self.left.shape[0], self.right.shape[0])
        return np.asarray((of(self.left).T @ viewed @ of(self.right)).reshape(x.shape))

    def transposed(self) -> Turn:
        """The transposed matrix."""
        if self.index is not None:
            return replace(self, index=np.argsort(self.index))
        if self.left is None or self.right is None:
            return self
        return replace(self, left=self.left.T, right=self.right.T)


def chain(subject: str, case_id: str, n: int) -> list[Turn]:
    """The rotations of a name: `sylvester64`, `quarot-12x4^T` (order 12 * 4, transposed), `signs+sylvester256`."""
    return [_turn(part, f"{case_id}#{i}", n) for i, part in enumerate(subject.split("+"))]


def _turn(name: str, key: str, n: int) -> Turn:
    if name.startswith("sylvester"):
        return _hadamard(int(name.removeprefix("sylvester")), 1, "", False)
    if name.startswith(("quarot-", "spinquant-", "quip-")):
        table, _, rest = name.removesuffix("^T").partition("x")
        k = int(table.rpartition("-")[2])
        return _hadamard(k * int(rest or 1), k, table, name.endswith("^T"))
    if name.startswith("kronecker"):
        left, right = (int(size) if size != "-" else 0 for size in name.removeprefix("kronecker").split("x"))
        return _kronecker(key, left, right, n)
    if name.startswith("dense"):
        return _dense(key, int(name.removeprefix("dense")))
    return {"signs": _signs, "diagonal": _diagonal, "permutation": _permutation}[name](key, n)


def _hadamard(order: int, k: int, table: str, transpose: bool) -> Turn:
    root, rest = order**0.5, order // k
    exact = root == 2 ** round(np.log2(root))
    if k == 1:  # the matrix of order a b is the Kronecker product of those of a and b
        b = 1 << (order.bit_length() // 2)
        left, right = _sylvester(rest // b), _sylvester(b)
    else:
        t = hadamard(table)
        left, right = t if transpose else t.T, _sylvester(rest)  # row vectors: H x is x @ H^T
    gamma = max(np.log2(rest) + (_sum(k) if k > 1 else 0.0), 1.0)
    return Turn(Hadamard(order, k, table, transpose), gamma, exact, left, right / root)


@cache
def _sylvester(n: int) -> F64:
    """Entry (i, j) is (-1)^popcount(i & j)."""
    i = np.arange(n)
    return np.asarray(1.0 - 2.0 * (np.array([bin(v).count("1") for v in range(n)])[i[:, None] & i[None, :]] % 2))


def _sum(k: int) -> float:
    return min(2.0 * math.sqrt(k), float(k))


def _signs(key: str, n: int) -> Turn:
    signs = Stream(key, "signs").signs((n,))
    return Turn(Diagonal(torch.from_numpy(signs)), 0.0, True, values=signs.astype(np.float64))


def _diagonal(key: str, n: int) -> Turn:
    g = Stream(key, "diagonal")
    values = np.ldexp(g.mantissas(10, (n,)), g.integers(-3, 4, (n,)).astype(np.int32)).astype(np.float32)
    return Turn(Diagonal(torch.from_numpy(values)), 1.0, values=values.astype(np.float64))


def _permutation(key: str, n: int) -> Turn:
    index: I64 = Stream(key, "permutation").permutation(n)
    return Turn(Permutation(torch.from_numpy(index)), 0.0, True, index=index)


def _small(key: str, name: str, size: int) -> tuple[torch.Tensor, F64]:
    """A matrix of multiples of 1/8 in bf16, nothing symmetric about it."""
    m = (Stream(key, name).integers(-8, 9, (size, size)) / 8.0).astype(np.float32)
    return torch.from_numpy(m).bfloat16(), m.astype(np.float64)


def _dense(key: str, b: int) -> Turn:
    block, m = _small(key, "dense", b)
    return Turn(Dense(block), _sum(b), True, np.eye(1), m)


def _kronecker(key: str, left: int, right: int, n: int) -> Turn:
    first = _small(key, "left", left) if left else None
    second = _small(key, "right", right) if right else None
    a = np.eye(1) if first is None else first[1]
    b = np.eye(n // left) if second is None else second[1]
    rotation = Kronecker(None if first is None else first[0], None if second is None else second[0])
    return Turn(rotation, _sum(left) + _sum(right), True, a, b)


@cache
def hadamard(table: str) -> F64:
    """The matrix of that name, [k, k] of +1 and -1."""
    k = int(table.rpartition("-")[2])
    return _BUILD[k]()


def _squares(q: int) -> set[int]:
    return {i * i % q for i in range(1, q)}


def _character(q: int) -> F64:
    """[i, j]: +1 where i - j is a square mod the prime q, -1 where it is none, 0 on the diagonal."""
    squares = _squares(q)
    return np.array([[0.0 if i == j else 1.0 if (i - j) % q in squares else -1.0 for j in range(q)] for i in range(q)])


def _paley1(q: int) -> F64:
    """I + S with S bordered by a column of ones and a row of minus ones; q = 3 mod 4."""
    s = np.block([[np.zeros((1, 1)), -np.ones((1, q))], [np.ones((q, 1)), _character(q)]])
    return np.asarray(np.eye(q + 1) + s)


def _paley2(q: int) -> F64:
    """C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]] in blocks, C symmetric with a border of ones; q = 1 mod 4."""
    c = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), _character(q)]])
    return np.asarray(np.kron([[1, 1], [1, -1]], c) + np.kron([[1, -1], [-1, -1]], np.eye(q + 1)))


def _williamson(n: int) -> F64:
    """A (1, A) + B (i, B) + C (j, C) + D (k, D) over the quaternions, from four symmetric circulants of order n."""
    first = [[-1.0 if bits >> min(i, n - i) & 1 else 1.0 for i in range(n)] for bits in _CIRCULANTS[n]]
    a, b, c, d = (np.array([np.roll(row, i) for i in range(n)]) for row in first)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


_BUILD: dict[int, Callable[[], F64]] = {
    12: lambda: _paley1(11),
    20: lambda: _paley1(19),
    28: lambda: _paley2(13),
    36: lambda: _paley2(17),
    40: lambda: np.asarray(np.kron([[1, 1], [1, -1]], _paley1(19)), dtype=np.float64),
    44: lambda: _paley1(43),
    52: lambda: _williamson(13),
    60: lambda: _paley1(59),
    108: lambda: _paley1(107),
    140: lambda: _paley1(139),
    156: lambda: _williamson(39),
    172: lambda: _williamson(43),
}
"""By order; every name of one order is the same matrix."""
