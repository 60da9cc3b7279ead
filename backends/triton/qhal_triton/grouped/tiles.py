"""What to compile for a target: products with every form of groups, and what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qhal.formats import Format
from qhal.requests import GemmRequest
from qhal_triton.gemm.config import config
from qhal_triton.gemm.paths import plan
from qhal_triton.gemm.tiles import finish_tile, product_tile
from qhal_triton.grouped.kernels.order import order
from qhal_triton.target import Target
from qhal_triton.tiles import Tile

PAIRS = (
    ("int4.g32*bf16", "bf16"),
    ("int8.row*fp32", "int8.row*fp32"),
    ("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32"),
    ("e2m1.g32*e8m0", "bf16"),
    ("bf16", "bf16"),
)
_N, _K = 4096, 4096
_FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu")


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    for w, x in PAIRS:
        request = GemmRequest(w=Format.parse(w), x=(Format.parse(x),), n=_N, k=_K, bias=True)
        made = plan(request, target)
        for form in ("offsets", "masked", "indexed") if made is not None else ():
            assert made is not None
            c = config(made.specs[0], 1, _N, _K // 128, target)
            yield product_tile(request, made.specs[0], c, target, f"grouped.product[{form} {w} x {x}]", form)
            if made.many is not None and made.packed and form == "indexed":
                c = config(made.many, 128, _N, _K // 128, target)
                yield product_tile(request, made.many, c, target, f"grouped.product[{form} {w} x {x} rounded]", form)
    constants = {"PARTS": 2, "TOP": 4, "WEIGHTED": True, "LIMITED": True, "BLOCK": 256}
    for name in _FUNCTIONS:
        yield finish_tile(f"grouped.finish[{name}]", {**constants, "NAME": name, "GATED": name != "relu2"})
    signature = {"ids": "*i32", "starts": "*i32", "sorted_pairs": "*i32", "pairs": "i32", "experts": "i32"}
    plain = Tile(name="grouped.order", fn=order, signature=signature, constants={"BLOCK": 1024})
    yield replace(plain, options={"num_warps": 4})
