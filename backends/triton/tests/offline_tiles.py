"""Tiles for the tests of the compile check: right ones, and one of each kind that must be found."""

from __future__ import annotations

import os
from collections import UserDict
from collections.abc import Iterator, Mapping
from typing import Any

import triton
import triton.language as tl

from qhal_triton.target import Target
from qhal_triton.tiles import Tile

_BF16 = {"x": "*bf16", "w": "*bf16", "y": "*fp32"}
_FP8 = {"x": "*fp8e4nv", "w": "*fp8e4nv", "y": "*fp32"}


@triton.jit
def product(x, w, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + rows[:, None] * K + k[None, :])
    b = tl.load(w + columns[None, :] * K + k[:, None])
    tl.store(y + rows[:, None] * N + columns[None, :], tl.dot(a, b))


@triton.jit
def total(x, w, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, K)).to(tl.float32) + tl.load(w)))


@triton.jit
def wrong(x, w, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    tl.store(y, tl.load(x + tl.arange(0, K + 1)))


class Fatal(UserDict[str, Any]):
    """Options that end the process when they are read, as a compiler's abort would."""

    def __iter__(self) -> Iterator[str]:
        os._exit(7)


def tiles(target: Target) -> Iterator[Tile]:
    def tile(name: str, fn: Any, signature: Mapping[str, str] = _BF16, **more: Any) -> Tile:
        size = more.pop("size", 64)
        return Tile(name=name, fn=fn, signature=signature, constants={"M": 64, "N": 64, "K": size}, **more)

    yield tile("16 bits", product, matrix=True, native="16")
    yield tile("fp8", product, _FP8, matrix=True, native="fp8")
    yield tile("no product", total, matrix=True)
    yield tile("does not compile", wrong)
    yield tile("kills the compiler", product, options=Fatal())
    yield tile("too large", product, size=1024)
    yield tile("after the others", total)


def twice(target: Target) -> Iterator[Tile]:
    for _ in range(2):
        yield Tile(name="same", fn=total, signature=_BF16, constants={})
