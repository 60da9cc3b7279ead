"""What compile checks ask for: the vectors and books of AQLM, VPTQ and QuIP#."""

from __future__ import annotations

from collections.abc import Iterator

from qhal_triton.target import Target
from qhal_triton.tiles import Tile
from qhal_triton.vq.kernels import decode_kernel
from qhal_triton.vq.launch import BOOKS, SHARE

_VECTORS = ((1, 8, 1, (1.0,)), (1, 8, 2, (1.0, 1.0)), (8, 1, 2, (1.0, 1.0)), (12, 1, 1, (1.0,)), (1, 8, 2, (1.0, 2.04)))
"""Rows and columns of a vector, books, divisors."""


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
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
            signature |= {f"table{i}": "*fp16" for i in range(BOOKS)}
            signature |= dict.fromkeys(("scale", "column_scale", "column_bias"), "*fp32")
            whole = {n: "i32" for n in decode_kernel.arg_names if n not in signature and n not in constants}
            yield Tile(
                name=f"vq.decode[{books} of {a}x{b} / {divisors[-1]:g}{' permuted' if full else ''}]",
                fn=decode_kernel,
                signature=signature | whole,
                constants=constants,
                options={"num_warps": 4, "enable_fp_fusion": False},
            )
