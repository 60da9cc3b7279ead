"""What compile checks ask for: every kernel with the formats that engines quantize activations and caches to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qhal.elements import element
from qhal.formats import Format
from qhal_triton.quantize.config import CHUNK, PARTS, config
from qhal_triton.quantize.kernels.grids import block_kernel, long_kernel, part_kernel, tensor_kernel
from qhal_triton.quantize.recipe import recipe
from qhal_triton.target import Target
from qhal_triton.tiles import Tile, sized

FORMATS = (
    "int8.row*fp32",
    "int8.g128*bf16",
    "int8.tensor*fp32",
    "int8-int8.row*fp32@domain=minmax",
    "uint4-uint4.g32*bf16@domain=minmax",
    "int4.row*fp32",
    "e4m3fn.row*fp32",
    "e4m3fn.g128*fp32",
    "e4m3fn.128x128*fp32",
    "e4m3fn.tensor*fp32",
    "e5m2.row*fp32",
    "e4m3fnuz.row*fp32",
    "e4m3fnuz.g128*fp32",
    "e4m3fn.g32*e8m0",
    "e2m3.g32*e8m0@e8m0=ceil",
    "e2m1.g32*e8m0@e8m0=even",
    "e2m1.g16*(e4m3fn.tensor*fp32)",
    "e2m1.g16*(e4m3fn.tensor/fp32)",
)
_COLS = 8192
_TYPES = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    for name in FORMATS:
        f = Format.parse(name)
        for x in ("bf16", "fp32"):
            for static in (False, True):
                yield from _tiles(f, x, static, target)


def _tiles(f: Format, x: str, static: bool, target: Target) -> Iterator[Tile]:
    made = recipe(f, element(x).storage, static=static, target=target)
    if made is None:
        return
    assert f.block is not None and f.scale is not None
    outer = f.scale.scale if f.scale.scale is not None else f.scale
    pointers = {
        "x": f"*{x}",
        "codes": "*u8",
        "scale": _type(f.scale),
        "zero": _type(f.zero or outer),
        "outer": _type(outer),
        "parts": "*i32",
    }
    known = {**pointers, "low_kept": "fp32", "high_kept": "fp32"}
    of = {"rows": None, "cols": _COLS, "stride": _COLS, "across": f.block.grid(1, _COLS)[1], "count": None}
    size = config(_COLS if f.block.kind == "row" else f.block.rows * f.block.cols, _COLS)
    one = {"F": made, "C": CHUNK}
    whole_tensor = {**one, "PARTS": PARTS, "WIDTH": CHUNK}
    blocks = {"F": made, "C": size.elements, "NB": size.blocks, "PARTS": PARTS, "ROWS": f.block.rows}
    blocks["COLS"] = 0 if f.block.kind == "row" else f.block.cols
    kernels: list[tuple[Any, dict[str, Any], int]] = [(block_kernel, blocks, size.warps)]
    if f.block.kind == "tensor":
        of |= {"rows": 1, "beside": None}  # a tensor without gaps is one row
        kernels = [(part_kernel, whole_tensor, 8), (tensor_kernel, whole_tensor, 8)]
    elif f.block.kind == "row":
        kernels.append((long_kernel, one, 8))
    for fn, constants, width in kernels:
        names = [name for name in fn.arg_names if name not in constants]
        whole, ones = sized({n: of[n] for n in names if n not in known})
        yield Tile(
            name=f"quantize.{fn.__name__}[{x} to {f}{' static' if static else ''}]",
            fn=fn,
            signature={n: known[n] for n in names if n in known} | whole,
            constants=constants | ones,
            options={"num_warps": width, "enable_fp_fusion": False},
            variant=static or x != "bf16",
        )


def _type(f: Format) -> str:
    return _TYPES.get(element(f.element).storage, "*u8")
