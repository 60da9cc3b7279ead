"""What compile checks ask for: every cut of a transform, alone and with a quantization; factors by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qhal.formats import Format
from qhal.requests import HadamardRequest
from qhal_triton.hadamard.config import MANY
from qhal_triton.hadamard.kernels.mix import left_kernel, right_kernel, scale_kernel
from qhal_triton.hadamard.kernels.rotate import rotate_kernel
from qhal_triton.hadamard.launch import constants, rotated
from qhal_triton.hadamard.mixing import LEFT, RIGHT, SCALED, WARPS
from qhal_triton.target import Target
from qhal_triton.tiles import Tile, sized

ORDERS = ((64, 1, ""), (128, 1, ""), (512, 1, ""), (1024, 1, ""), (4096, 1, ""), (8192, 1, ""), (16384, 1, ""),
          (160, 40, "quarot-40"), (5120, 20, "quarot-20"), (14336, 28, "quarot-28"))  # fmt: skip
STANDING = (4096, 5120, 8192)
"""Orders that stand for all: one and two factors of 2^k, and a table."""
QUANTIZED = (None, "e4m3fn.row*fp32", "int8.row*fp32", "e2m1.g32*e8m0")


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    few = 8 if target.kind == "cuda" else 0  # one value, moved once in the two thousand instructions of a tile
    for order, k, table in ORDERS:
        hadamard: tuple[object, ...] = ("hadamard", order, k, table, False)
        for chain in ((hadamard,), (("diagonal", order), hadamard)):
            for to in QUANTIZED:
                f = None if to is None else Format.parse(to)
                request = HadamardRequest(kinds=chain, n=order, x=torch.bfloat16, quantize=f)
                path = rotated(request, target)
                if path is None or (f is not None and path.recipe is None):
                    continue
                fixed: dict[str, Any] = constants(path.plan, len(chain) > 1, False, path if f is not None else None)
                operand = "*fp16" if len(chain) > 1 else "*bf16"
                scale = "*u8" if to is not None and to.endswith("e8m0") else "*fp32"
                signature = {"x": "*bf16", "y": "*bf16" if f is None else "*u8", "scale": scale, "zero": scale}
                signature |= {"left": operand, "right": "*fp16" if path.plan.left else operand, "factor": "fp32"}
                signature |= {"before": "*fp32", "after": "*fp32"}
                sizes = {"across": order // path.plan.width, "stride": order, "ystride": order}
                names = [n for n in rotate_kernel.arg_names if n not in signature and n not in fixed]
                whole, ones = sized({n: sizes.get(n) for n in names})
                yield Tile(
                    name=f"hadamard.rotate[{order}{' scaled' * (len(chain) > 1)} to {to or 'bf16'}]",
                    fn=rotate_kernel,
                    signature=signature | whole,
                    constants=fixed | ones,
                    options={"num_warps": path.plan.warps, "num_stages": path.plan.stages, "enable_fp_fusion": False},
                    matrix=True,
                    native="16",
                    spills=few if path.plan.rows * path.plan.columns <= MANY else 1024,
                    variant=order not in STANDING or (len(chain) > 1 and f is not None),
                )
    floats = {"x": "*bf16", "y": "*bf16", "table": "*fp32", "before": "*fp32", "after": "*fp32", "factor": "fp32"}
    for kernel, tile in ((right_kernel, RIGHT), (left_kernel, LEFT)):
        fixed = {**tile, "BEFORE": True, "AFTER": True}
        signature = {name: floats.get(name, "i32") for name in kernel.arg_names if name not in fixed}
        options = {"num_warps": WARPS, "enable_fp_fusion": False}
        name = f"hadamard.{kernel.fn.__name__.removesuffix('_kernel')}[fp32]"
        yield Tile(name=name, fn=kernel, signature=signature, constants=fixed, options=options)
    plain = {"x": "*bf16", "y": "*bf16", "values": "*fp32", "n": "i32", "stride": "i32", "ystride": "i32"}
    yield Tile(name="hadamard.scale", fn=scale_kernel, signature=plain, constants={"BLOCK": SCALED}, options={})
