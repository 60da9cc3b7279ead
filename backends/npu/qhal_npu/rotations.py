"""hadamard: matrix products in fp32, one rounding at the end of the chain.

CANN has no Hadamard operator. A Sylvester matrix of order 2^a is a Kronecker product of smaller ones: x, viewed with
one axis per factor, is multiplied by matrices of order up to 16, a fractal of the cube unit. npu_rotate_quant
and npu_kronecker_quant are not used: they round between the rotation and the codes in another way than the contract's
two steps (between the factors to the type of x, and through fp16), so they would give other bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from qhal.rotations import Hadamard, Rotation, hadamard_table
from qhal_portable import hadamard

_ORDER = 16
"""A sum of so many terms errs no more than the butterflies that the contract's bound is of; one of 128 did."""


def rotate(x: Tensor, chain: Sequence[Rotation]) -> Tensor:
    """[..., n] -> x @ R1 @ R2 ..., in the dtype of x."""
    return hadamard.rotate(x, chain, torch.float32, _one)


def _one(x: Tensor, r: Rotation) -> Tensor:
    if not isinstance(r, Hadamard):
        return hadamard.apply(x, r)
    return _hadamard(hadamard.blocks(x, r, r.n), r).reshape(x.shape)


def _hadamard(x: Tensor, r: Hadamard) -> Tensor:
    """Blocks of r.n features viewed [k, factors of n/k]: each axis times its matrix, then the order-k table."""
    sizes = _factors(r.n // r.k)
    y = x.reshape(-1, r.k, r.n // r.k)
    after = r.n // r.k
    for size in sizes:
        after //= size
        table = _sylvester(size, x.device)
        if after == 1:
            y = (y.reshape(-1, size) @ table).reshape(y.shape)
        else:
            y = (table @ y.reshape(-1, size, after)).reshape(y.shape)
    if r.k > 1:
        named = _named(r.table, r.k, x.device)
        y = (named.T if r.transpose else named) @ y
    return (y / math.sqrt(r.n)).reshape(x.shape)


def _factors(order: int) -> list[int]:
    """Powers of two up to 16 whose product is `order`, as equal as they can be."""
    bits = order.bit_length() - 1
    count = -(-bits // (_ORDER.bit_length() - 1))
    return [1 << (bits // count + (i < bits % count)) for i in range(count)] if bits else []


@lru_cache(maxsize=64)
def _sylvester(order: int, device: torch.device) -> Tensor:
    h = torch.ones(1, 1, device="cpu")
    while h.shape[0] < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h.to(device)


@lru_cache(maxsize=64)
def _named(table: str, order: int, device: torch.device) -> Tensor:
    return hadamard_table(table, order).float().to(device)
