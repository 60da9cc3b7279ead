"""Hadamard tables: matrices of +1 and -1 whose order is no power of two, built on first use and checked by hash.

Orders have many inequivalent matrices, and a transposed one is another rotation, so a table is named after the project
that rotates weights with it. Every table here follows from a published construction; each was compared entry by entry
with the matrix that its project's own function returns, and `TABLE_SHA256` pins the result. Constructions:

    Paley I      q = 3 mod 4 prime: I + S, S = [[0, -1], [1, Q]], of order q + 1                     [1]
    Paley II     q = 1 mod 4 prime: [[1, 1], [1, -1]] x C + [[1, -1], [-1, -1]] x I, C = [[0, 1], [1, Q]], 2 (q + 1) [1]
    Williamson   four symmetric circulants with A^2 + B^2 + C^2 + D^2 = 4n in a 4 x 4 array, of order 4n  [2, 3]
    Sylvester    [[H, H], [H, -H]]

with Q[i, j] = 1 if i - j is a non-zero square mod q, -1 if it is no square, 0 on the diagonal; x the Kronecker product.
[1] R. E. A. C. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933). [2] J. Williamson, Hadamard's determinant
theorem and the sum of four squares, Duke Math. J. 11 (1944). [3] D. Z. Djokovic, Williamson matrices of order 4n for
n = 33, 35, 39, Discrete Math. 115 (1993), for the existence of n = 39. Of the several sets of Williamson rows of one
order, `WILLIAMSON` holds the one that QuaRot's matrices consist of (they cite N. J. A. Sloane's library).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from qhal.errors import FormatError

WILLIAMSON: dict[int, tuple[str, str, str, str]] = {
    13: ("+-+--++", "+---+++", "++-+--+", "+----+-"),
    39: ("+++--+-+-----+--++--", "++++---+--++----+-+-", "+++--++-+---+-+--+--", "+---++-+-+-----+++-+"),
    43: ("+---++--++++-+-+++-++-", "++-++++++----+-+--++-+", "+++-+-++--+-+-++++-+--", "++---++++-+--+--++----"),
}
"""First rows of the circulants A, B, C, D of order n: entries 0 to (n - 1) / 2; entry n - i equals entry i."""

FAMILIES: dict[str, tuple[int, ...]] = {
    "quarot": (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12),
    "spinquant": (172, 156, 140, 108, 60, 52, 36, 28, 44, 40, 20, 12),
    "quip": (172, 156, 140, 124, 116, 108, 60, 52, 36, 28, 20, 12),
}
"""The orders that a project's code tries, in its order: 80 is 40 * 2 in QuaRot and SpinQuant, 20 * 4 in QuIP#."""

_NAMES = {"quarot": "QuaRot", "spinquant": "SpinQuant", "quip": "QuIP#"}


def paley1(q: int) -> Tensor:
    """Paley's first construction over the prime q = 3 mod 4: int8 [q + 1, q + 1]."""
    h = torch.eye(q + 1, dtype=torch.int8)
    h[0, 1:] = -1
    h[1:, 0] = 1
    h[1:, 1:] += _jacobsthal(q)
    return h


def paley2(q: int) -> Tensor:
    """Paley's second construction over the prime q = 1 mod 4: int8 [2q + 2, 2q + 2], symmetric."""
    c = torch.ones(q + 1, q + 1, dtype=torch.int8)
    c[0, 0] = 0
    c[1:, 1:] = _jacobsthal(q)
    eye = torch.eye(q + 1, dtype=torch.int8)
    return torch.cat([torch.cat([c + eye, c - eye], 1), torch.cat([c - eye, -c - eye], 1)])


def williamson(n: int) -> Tensor:
    """Williamson's array of the four circulants of `WILLIAMSON[n]`: int8 [4n, 4n]."""
    a, b, c, d = (_symmetric_circulant(half) for half in WILLIAMSON[n])
    rows = ([a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a])
    return torch.cat([torch.cat(row, 1) for row in rows])


def doubled(h: Tensor) -> Tensor:
    """Sylvester's doubling [[h, h], [h, -h]]."""
    return torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j]: the quadratic character of i - j mod q, int8 [q, q]."""
    character = torch.full((q,), -1, dtype=torch.int8)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    i = torch.arange(q)
    return character[(i[:, None] - i) % q]


def _symmetric_circulant(half: str) -> Tensor:
    row = torch.tensor([1 if sign == "+" else -1 for sign in half + half[:0:-1]], dtype=torch.int8)
    i = torch.arange(len(row))
    return row[(i - i[:, None]) % len(row)]


@dataclass(frozen=True)
class Source:
    """Where a table comes from.

    origin   the construction, and what it was compared with
    sha256   of the int8 entries in row-major order
    """

    order: int
    origin: str
    sha256: str
    build: Callable[[], Tensor]


_QUAROT = "QuaRot 5008669"
_BOTH = f"{_QUAROT} and SpinQuant 8f47aa3"
_ALL = f"{_BOTH}; QuIP# 1d8f873 transforms with the same matrix"

_CONSTRUCTED: tuple[tuple[str, Source], ...] = (
    ("quarot-12", Source(12, f"Paley I, q = 11; equals {_ALL}",
        "67507aecbe2abee5607ebc930edc6e70f5046bd415503c71e71ac7dc6ddc9e50", partial(paley1, 11))),
    ("quarot-20", Source(20, f"Paley I, q = 19; equals {_ALL}",
        "f54960fecf1ccf70671b403318d07fd1babfee079c6ebd627812276c3f5d91ed", partial(paley1, 19))),
    ("quarot-28", Source(28, f"Paley II, q = 13; equals {_ALL}",
        "a6cb994c78f9acd4ce172a154b97e3982594cc0124ce7af90cb88810b9509a8c", partial(paley2, 13))),
    ("quarot-36", Source(36, f"Paley II, q = 17; equals {_BOTH}",
        "d674d8240e6b622bff2b54fd5f16f903ef5ccbde6e5fba55a73e6b8616ce936d", partial(paley2, 17))),
    ("quarot-40", Source(40, f"Sylvester's doubling of Paley I, q = 19; equals {_BOTH}",
        "b36c95bcae918f982ba87b8a98828c6ee5232919436228600c0714b67fe82036", lambda: doubled(paley1(19)))),
    ("spinquant-44", Source(44, "Paley I, q = 43; equals SpinQuant 8f47aa3",
        "401df984756a7d75781d63d43b70c06778e0880a88c1b555b0bf8e36a9dbdeb8", partial(paley1, 43))),
    ("quarot-52", Source(52, f"Williamson, n = 13; equals {_BOTH}",
        "9ee082772819b1055d61f2d6bc89d814caaeb2fdc5f4d8bb54317842856be195", partial(williamson, 13))),
    ("quarot-60", Source(60, f"Paley I, q = 59; equals {_BOTH}",
        "091e76fba0aef58371335b478d7b3f320fcc77b1185eff7d2ed962cd5bc5a048", partial(paley1, 59))),
    ("quarot-108", Source(108, f"Paley I, q = 107; equals {_BOTH}",
        "690a34c6c9ed2f0edaf44022cfe6147d7e788cc555505ed5293db3c255582370", partial(paley1, 107))),
    ("quarot-140", Source(140, f"Paley I, q = 139; equals {_BOTH}",
        "b9ff01506ffe4db50af93f4c21e0c5af43159fbf5ccf5f8366f1c0efeee84417", partial(paley1, 139))),
    ("quarot-156", Source(156, f"Williamson, n = 39; equals {_BOTH}",
        "99a1b852ce559ffd6291cfc39889b4963b068b27116191ce7fc24efcacc538fd", partial(williamson, 39))),
    ("quarot-172", Source(172, f"Williamson, n = 43; equals {_BOTH}",
        "378ef12c7cc31f3ea558e1c66b9552a83128f8f732b0bc094b864c8e120d84bd", partial(williamson, 43))),
)  # fmt: skip

ALIASES: dict[str, str] = {f"quip-{k}": f"quarot-{k}" for k in (12, 20, 28)}
"""Other names of one matrix. QuIP#'s outputs were compared for these orders only."""

SOURCES: dict[str, Source] = dict(_CONSTRUCTED)
SOURCES |= {alias: SOURCES[name] for alias, name in ALIASES.items()}

TABLE_SHA256: dict[str, str] = {name: source.sha256 for name, source in SOURCES.items()}
"""Hash of a table's int8 entries in row-major order. Names with equal hashes are one matrix."""


@cache
def load(name: str) -> Tensor:
    """The table of that name, int8 [order, order], built and checked once. FormatError if its hash is another."""
    source = SOURCES[name]
    with torch.device("cpu"):  # cached: never on a default device
        table = source.build().contiguous()
    found = hashlib.sha256(table.numpy().tobytes()).hexdigest()
    if found != TABLE_SHA256[name]:
        raise FormatError(
            f"Hadamard table {name!r} has the hash {found}, must have {TABLE_SHA256[name]}: "
            "this installation of qhal is damaged, install it again"
        )
    return table


def factor(n: int, family: str) -> tuple[int, str]:
    """(k, table name) of the transform that a project applies to n features; (1, "") for a power of two.

    The table's name is the same in every family that uses that matrix. FormatError if the family has no transform of n
    features, or one whose table is not known here.
    """
    if family not in FAMILIES:
        raise FormatError(f"no family of Hadamard transforms {family!r}; known: {', '.join(FAMILIES)}")
    if n > 0 and n & (n - 1) == 0:
        return 1, ""
    orders = FAMILIES[family]
    k = next((k for k in orders if n > 0 and n % k == 0 and (n // k) & (n // k - 1) == 0), 0)
    if k == 0:
        power = n & -n if n > 0 else 1
        raise FormatError(
            f"{_NAMES[family]} has no Hadamard transform of {n} features: {n} = {n // power} * {power}, and none of "
            f"its orders {', '.join(map(str, sorted(orders)))} times a power of two gives that; "
            "use blocks that divide it, or a Dense or Kronecker rotation"
        )
    name = f"{family}-{k}" if f"{family}-{k}" in SOURCES else f"quarot-{k}"
    name = ALIASES.get(name, name)
    if family == "quip" and f"quip-{k}" not in ALIASES:
        raise FormatError(
            f"QuIP# transforms {n} features with a table of order {k}, which was not compared with any table here; "
            f"compared: {', '.join(ALIASES)}. If you know that it equals one, write Hadamard({n}, {k}, <its name>)"
        )
    return k, name
