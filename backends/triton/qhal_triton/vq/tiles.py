"""What compile checks ask for: the vectors and books of AQLM, VPTQ and QuIP#."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qhal_triton.target import Target
from qhal_triton.tiles import Tile, sized
from qhal_triton.vq.kernels import decode_kernel, product_kernel
from qhal_triton.vq.launch import BOOKS, SHARE, THREADS
from qhal_triton.vq.products import FEW

_VECTORS = ((1, 8, 1, (1.0,)), (1, 8, 2, (1.0, 1.0)), (8, 1, 2, (1.0, 1.0)), (12, 1, 1, (1.0,)), (1, 8, 2, (1.0, 2.04)))
"""Rows and columns of a vector, books, divisors."""


_SIZES = dict.fromkeys(("n", "vectors", "columns", "xstride", "ostride"), 4096) | {"start": 0, "before": 0, "per": 1}


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    yield from _decodes(target)
    for rows in (1, FEW):
        for books, scales in ((1, (1.0,)), (2, (1.0, 1.0))):
            constants = {"M": rows, "B": 8, "BOOKS": books, "DIVISORS": scales, "BN": 16, "BV": 32, "SCALE": True}
            constants["BIAS"] = False
            signature = {"x": "*bf16", "codes": "*i32", "y": "*bf16", "scale": "*fp32", "bias": "*fp32"}
            yield _tile(f"product[{rows} rows, {books} of 1x8]", product_kernel, signature, constants, target)


def _decodes(target: Target) -> Iterator[Tile]:
    for a, b, books, divisors in _VECTORS:
        for full in (False, True):
            padded = 1 << (a * b - 1).bit_length()
            constants = {
                "A": a,
                "B": b,
                "BOOKS": books,
                "DIVISORS": divisors,
                "P": SHARE // padded,
                "E": padded,
                "SCALE": True,
                "PERMUTED": full,
                "COLUMN_SCALE": full,
                "COLUMN_BIAS": full,
            }
            signature = {"codes": "*i32", "out": "*bf16", "permutation": "*i64"}
            signature |= dict.fromkeys(("scale", "column_scale", "column_bias"), "*fp32")
            name = f"decode[{books} of {a}x{b} / {divisors[-1]:g}{' permuted' if full else ''}]"
            yield _tile(name, decode_kernel, signature, constants, target)


def _tile(name: str, fn: Any, signature: dict[str, str], constants: dict[str, Any], target: Target) -> Tile:
    signature = signature | {f"table{i}": "*fp16" for i in range(BOOKS)}
    whole, ones = sized({n: _SIZES.get(n) for n in fn.arg_names if n not in signature and n not in constants})
    options = {"num_warps": THREADS // target.warp, "enable_fp_fusion": fn is product_kernel}
    return Tile(name=f"vq.{name}", fn=fn, signature=signature | whole, constants=constants | ones, options=options)
