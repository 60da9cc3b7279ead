"""hadamard: every kind of rotation, applied in float64 and rounded once at the end of the chain.

float64 stands above the contract's fp32: the result is the correctly rounded one up to 2^-50 of the row's magnitude. A
device without float64 asks for float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qhal.elements import WIDE
from qhal.errors import FormatError
from qhal.rotations import Dense, Diagonal, Hadamard, Kronecker, Permutation, Rotation, hadamard_table
from qhal_portable.rounding import round_once


def rotate(
    x: Tensor,
    chain: Sequence[Rotation],
    inner: torch.dtype = torch.float64,
    by: Callable[[Tensor, Rotation], Tensor] | None = None,
) -> Tensor:
    """[..., n] -> x @ R1 @ R2 ..., in the dtype of x. FormatError for a rotation that does not fit n features.

    inner  what it is computed in
    by     what applies one rotation to an x of that type, None: `apply`
    """
    if not isinstance(x, Tensor) or x.dtype not in WIDE.values() or x.dim() < 1:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise FormatError(f"hadamard: x is {found}, must be bf16, fp16 or fp32 [..., n]")
    y = x.detach().to(inner)
    for r in chain:
        y = (by or apply)(y, r)
    return round_once(y, x.dtype)


def misfits(kind: tuple[object, ...], n: int) -> Iterator[str]:
    """Why a rotation of this kind cannot be applied to n features; nothing if it can."""
    name, *rest = kind
    sizes = [s for s in rest if isinstance(s, int) and not isinstance(s, bool)]
    if name in ("diagonal", "permutation"):
        fits = sizes == [n]
    elif name == "hadamard":
        order, k = sizes
        fits = order > 0 and n % order == 0 and k > 0 and order % k == 0 and (order // k) & (order // k - 1) == 0
        fault = _table_fault(str(rest[2]), k) if k > 1 else ""
        if fault:
            yield fault
    elif name == "kronecker":
        left, right = sizes
        known = max(left, 1) * max(right, 1)
        fits = n % known == 0 and (known == n or not (left and right))
    elif name == "dense":
        fits = sizes[0] > 0 and n % sizes[0] == 0
    else:
        yield f"unknown rotation {kind}"
        return
    if not fits:
        yield f"rotation {kind} does not fit {n} features"


def _table_fault(name: str, k: int) -> str:
    """Why there is no table of that name and order; "" if there is."""
    try:
        hadamard_table(name, k)
    except FormatError as refusal:
        return str(refusal)
    return ""


def apply(x: Tensor, r: Rotation) -> Tensor:
    """x @ R in the dtype of x."""
    n = x.shape[-1]
    if isinstance(r, Diagonal | Permutation):
        size = r.values.numel() if isinstance(r, Diagonal) else r.index.numel()
        if size != n:
            raise FormatError(f"{type(r).__name__} of size {size} does not fit {n} features")
        return x * _like(r.values, x).reshape(-1) if isinstance(r, Diagonal) else x[..., r.checked().to(x.device)]
    if isinstance(r, Hadamard):
        return _hadamard(blocks(x, r, r.n), r).reshape(x.shape)
    if isinstance(r, Dense):
        return (blocks(x, r, r.block.shape[0]) @ _like(r.block, x)).reshape(x.shape)
    return _kronecker(x, r)


def _hadamard(x: Tensor, r: Hadamard) -> Tensor:
    """x [..., n] viewed [k, n/k]: Sylvester butterflies along the last axis, the order-k table along the first."""
    y = x.reshape(*x.shape[:-1], r.k, r.n // r.k)
    step = 1
    while step < y.shape[-1]:  # natural order: H(2m) = [[H(m), H(m)], [H(m), -H(m)]]
        pairs = y.reshape(*y.shape[:-1], y.shape[-1] // (2 * step), 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], -2).reshape(y.shape)
        step *= 2
    if r.k > 1:
        table = _like(hadamard_table(r.table, r.k), x)
        y = (table.T if r.transpose else table) @ y
    return (y / math.sqrt(r.n)).reshape(x.shape)


def _kronecker(x: Tensor, r: Kronecker) -> Tensor:
    """x viewed [l, r]: left^T @ X @ right; a missing factor is the identity of the remaining size."""
    n = x.shape[-1]
    left, right = (None if m is None else _like(m, x) for m in (r.left, r.right))
    known = (1 if left is None else left.shape[0]) * (1 if right is None else right.shape[0])
    whole = left is not None and right is not None
    if n % known or (whole and n != known):
        raise FormatError(f"Kronecker of size {known} does not fit {n} features")
    if left is None and right is None:
        return x
    columns = right.shape[0] if right is not None else n // known
    y = x.reshape(*x.shape[:-1], n // columns, columns)
    if left is not None:
        y = left.T @ y
    if right is not None:
        y = y @ right
    return y.reshape(x.shape)


def _like(t: Tensor, x: Tensor) -> Tensor:
    """A part of a chain, in the dtype of x and where x is: chains may be given from the processor."""
    return t.to(x.dtype).to(x.device)


def blocks(x: Tensor, r: Rotation, size: int) -> Tensor:
    """x [..., n] as [..., n / size, size]; FormatError where it does not divide."""
    if x.shape[-1] % size:
        raise FormatError(f"{type(r).__name__} of size {size} does not fit {x.shape[-1]} features")
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
