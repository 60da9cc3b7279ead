"""Run by `test_triton_offline.py` without the interpreter: how launches specialize sizes and strides, and how tiles do.

A launch ends where Triton would call its compiler; only what is launched before it is compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

import qhal_triton.calls
from qhal.formats import Format
from qhal.requests import GemmRequest, GroupedRequest, QuantizeRequest, Request
from qhal_portable.ops import PortableOps
from qhal_triton import grouped, quantize
from qhal_triton.absent import absent
from qhal_triton.compile import target_of
from qhal_triton.gemm.config import config
from qhal_triton.gemm.paths import choose, plan
from qhal_triton.gemm.tiles import PAIRS, product_tile
from qhal_triton.offline import source
from qhal_triton.ops import TritonOps
from qhal_triton.tiles import Tile

COMPILE = triton.compile
N, K = 64, 4096
FREE = {"m", "rows", "count", "steps", "per_part", "beside", "spread"}
"""Arguments that tiles leave open: numbers of rows and what follows from them."""


class Ops(TritonOps):
    name, interface = "absent", (1, 0)


def cases(ops: TritonOps) -> Iterator[tuple[Request, Tile]]:
    """A request and the tile that stands for its launch."""
    target = ops._target
    for w, x in PAIRS:
        request = GemmRequest(w=Format.parse(w), x=(Format.parse(x),), n=N, k=K)
        made = plan(request, target)
        if made is not None and choose(request, target) is not None:
            c = config(made.specs[0], 128, N, K // 128, target)
            yield request, product_tile(request, made.specs[0], c, target, f"{w} x {x}")
    for form in ("offsets", "masked", "indexed"):
        gemm = GemmRequest(w=Format.parse("int4.g32*bf16"), x=(Format.parse("bf16"),), n=N, k=K, bias=True)
        tile = next(t for t in grouped.tiles(target) if t.name == f"grouped.product[{form} int4.g32*bf16 x bf16]")
        yield GroupedRequest(gemm=gemm, experts=8, groups=form, top_k=2), tile
    for tile in quantize.tiles(target):
        kind, _, name = tile.name.partition("[bf16 to ")
        if name and "static" not in name and kind != "quantize.long_kernel":
            yield QuantizeRequest(x=torch.bfloat16, format=Format.parse(name[:-1])), tile


def asked(tile: Tile, source: Any) -> dict[str, str]:
    """Name of every size or stride to "1", "16" (a multiple of it) or "any"."""
    found = {}
    for i, name in enumerate(tile.fn.arg_names):
        constant = source.constants.get((i,))
        if name.islower() and name not in FREE and (source.signature[name] == "i32" or constant == 1):
            found[name] = "1" if constant == 1 else "16" if source.attrs.get((i,)) else "any"
    return found


class LaunchedError(Exception):
    """A launch of the kernel that is looked for; `args[0]` is what the compiler was asked for."""


class Compiler:
    """Stands for Triton's: ends the call where `wanted` is launched; what is launched before it is compiled."""

    wanted: Any = None

    def __call__(self, asked: Any, **options: Any) -> Any:
        if asked.fn is self.wanted:
            raise LaunchedError(asked)
        return COMPILE(asked, **options)


def launch(ops: TritonOps, request: Request) -> Any:
    """What the compiler is asked for by a call of 128 rows."""
    by = TritonOps.quantize if isinstance(request, QuantizeRequest) else PortableOps.quantize
    with patch.object(qhal_triton.calls, "ROWS", (128,)), patch.object(Ops, "quantize", by):
        try:
            qhal_triton.calls.calls(ops, request)
        except LaunchedError as found:
            return found.args[0]
    raise AssertionError(f"{request} launches another kernel")


def main(arch: str, cache: Path) -> None:
    ops, compiler = Ops(target_of(arch), torch.device("cpu")), Compiler()
    different: dict[str, dict[str, list[str | None]]] = {}
    count = 0
    with absent(ops._target, cache), patch.object(triton.compiler, "compile", compiler):
        for request, tile in cases(ops):
            compiler.wanted = tile.fn
            theirs, ours = asked(tile, launch(ops, request)), asked(tile, source(tile, ops._target))
            count += 1
            if theirs != ours:
                names = [n for n in theirs | ours if theirs.get(n) != ours.get(n)]
                different[tile.name] = {n: [theirs.get(n), ours.get(n)] for n in names}
    print(json.dumps({"count": count, "different": different}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
