"""What to compile for a target: the product of every kind of operands, for few and for many rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from qhal.elements import element
from qhal.formats import Format
from qhal.requests import GemmRequest
from qhal_triton.gemm.config import Config, config
from qhal_triton.gemm.kernels.dense import dense
from qhal_triton.gemm.kernels.finish import finish
from qhal_triton.gemm.kernels.gather import gather
from qhal_triton.gemm.kernels.product import product
from qhal_triton.gemm.launch import product_constants
from qhal_triton.gemm.paths import Spec, choose, plan
from qhal_triton.gemm.planes import steps_of
from qhal_triton.gemm.sides import WIDE_KIND, Side
from qhal_triton.target import Target
from qhal_triton.tiles import Tile, sized

PAIRS = (
    ("int4.g128*bf16", "bf16"),
    ("int4.g32*fp16", "fp16"),
    ("uint4-uint4.g128*fp16", "bf16"),
    ("uint4-fp16.g64*fp16", "bf16"),
    ("uint4.g32*fp16+fp16", "bf16"),
    ("int2.g64*bf16", "bf16"),
    ("int8.row*fp32", "bf16"),
    ("int4.g128*bf16", "fp32"),
    ("e4m3fn.128x128*fp32", "bf16"),
    ("e5m2.row*fp32", "fp16"),
    ("e2m1.g32*e8m0", "bf16"),
    ("e3m2.g32*e8m0", "bf16"),
    ("e2m1.g16*(e4m3fn.tensor*fp32)", "bf16"),
    ("nf4.g64*fp32", "bf16"),
    ("e2m1.g16*(e4m3fn.tensor/fp32)", "bf16"),
    ("nf4.flat64*(lut8.flat256*fp32+fp32)", "bf16"),
    ("uint4.g32*(uint6.g8*fp16)-(uint6.g8*fp16)", "bf16"),
    ("int8.row*fp32", "int8.row*fp32"),
    ("int8.row*(fp32.tensor/fp32)", "int8-fp32.tensor*fp32"),
    ("uint8-uint8.row*fp32", "uint8-uint8.row*fp32"),
    ("int4.g128*bf16", "int8.row*fp32"),
    ("int4.g128*bf16", "e4m3fn.row*fp32"),
    ("int4.g128*bf16", "e4m3fn.g128*fp32"),
    ("e2m1.g32*e8m0", "e4m3fn.row*fp32"),
    ("e4m3fn.row*fp32", "e4m3fn.row*fp32"),
    ("e4m3fnuz.row*fp32", "e4m3fnuz.row*fp32"),
    ("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32"),
    ("e4m3fn.g32*e8m0", "e4m3fn.g32*e8m0"),
    ("e2m1.g32*e8m0", "e4m3fn.g32*e8m0"),
    ("e2m1.g32*e8m0", "e2m1.g32*e8m0"),
    ("e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*(e4m3fn.tensor*fp32)"),
    ("e2m1.g16*(e4m3fn.tensor/fp32)", "e2m1.g16*(e4m3fn.tensor/fp32)"),
    ("fp32", "fp32"),
    ("bf16", "bf16"),
)
"""Weight and activation of every branch of the kernel."""
_N, _K, _EXPERTS = 4096, 4096, 8
_WORDS = {2: "*u8", 8: "*i32"}
"""Pointers to words of so many codes."""


def tiles(target: Target) -> Iterator[Tile]:
    """What to compile for `target`, one tile for every kernel and format."""
    for indexed in (False, True):
        for w, x in PAIRS[: 1 if indexed else None]:
            request = GemmRequest(w=Format.parse(w), x=(Format.parse(x),), n=_N, k=_K, group_index=indexed)
            made = plan(request, target)
            if made is None or choose(request, target) is None:
                continue
            for m in (1, 128, *([256] if indexed else [])):
                c = config(made.specs[0], m, _N, _K // 128, target)
                name = f"gemm.product[{w} x {x} m={m}{' indexed' * indexed}]"
                yield replace(product_tile(request, made.specs[0], c, target, name), variant=m == 1)
            if made.many is not None:
                for m in (made.many_from, 256):
                    c = config(made.many, m, _N, _K // 128, target)
                    name = f"gemm.product[{w} x {x} m={m} {'rounded' if made.packed else 'in short steps'}]"
                    yield replace(product_tile(request, made.many, c, target, name), variant=m == 256)
            if made.dense:
                yield _dense_tile(request, made.specs[0], target, f"gemm.dense[{w} as {x}{' indexed' * indexed}]")
    given: dict[str, str | None] = {"x": "*bf16", "order": "*i32", "y": "*bf16"}
    sizes = {"k": _K, "x_row": _K}
    yield _tile("gemm.gather[bf16]", gather, given, {"BLOCK": 1024}, sizes, 4, 2, True, matrix=False)
    constants = {"PARTS": 4, "TOP": 1, "WEIGHTED": False, "NAME": "", "GATED": False, "LIMITED": False, "BLOCK": 256}
    yield finish_tile("gemm.finish[bf16]", constants)


def product_tile(request: GemmRequest, spec: Spec, c: Config, target: Target, name: str, form: str = "") -> Tile:
    """The product of one Spec with a tile shape, results in fp32."""
    w = request.operand or request.w
    assert isinstance(w, Format)
    x = next(f for f, s in zip(request.x, plan_specs(request, spec), strict=True) if s)
    given = {
        "x": _pointer(x.element),
        "w": _WORDS.get(spec.parts) or _pointer(w.element),
        "y": "*fp32",
        "bias": "*fp32" if request.bias else None,
        **_planes("x", x, spec.x.made),
        **_planes("w", w, spec.w.made),
        "table": "*fp32" if spec.w.kind == "table" else None,
        "index": "*i32" if spec.indexed else None,
        "order": "*i32" if form == "indexed" else None,
        "starts": "*i32" if form else None,
    }
    experts = _EXPERTS if form else 0
    constants = product_constants(spec, request, c, target, form=form, top=1, experts=experts)
    native = {"int8": "int8", "fp8": "fp8", "bf16": "16", "fp16": "16"}.get(spec.type, "")
    sizes = {"n": _N, "k": _K, "experts": experts, "x_row": _K, "w_row": _K // spec.parts, "y_row": _N, "y_part": _N}
    sizes |= _strides("x", x, spec.x) | _strides("w", w, spec.w, experts)
    sizes |= {"w_exp": experts * _K, "b_exp": experts * _N} | ({} if form == "masked" else {"spread": 1})
    matrix = (target.kind == "hip" and target.warp == 64) or spec.type != "fp32"  # only CDNA has some for fp32 operands
    made = _tile(name, product, given, constants, sizes, c.warps, c.stages, spec.mode != "early", matrix, native)
    both = target.kind == "hip" and spec.x.kind != WIDE_KIND and spec.type == "bf16"
    return replace(made, spills=12 if both else 0)  # AMD's compiler puts some aside where both are decoded in registers


def finish_tile(name: str, constants: dict[str, Any]) -> Tile:
    """The sum of parts with what follows it, to bf16."""
    weighted = constants["WEIGHTED"]
    given = {
        "part": "*fp32",
        "y": "*bf16",
        "weights": "*fp32" if weighted else None,
        "ids": "*i32" if weighted else None,
        **dict.fromkeys(("alpha", "limit", "shift"), "fp32"),
    }
    sizes = {"n": _N, "width": _N, "y_row": _N, "part_stride": _N}
    return _tile(name, finish, given, constants, sizes, 4, 2, True, matrix=False)


def _dense_tile(request: GemmRequest, s: Spec, target: Target, name: str) -> Tile:
    w = request.operand or request.w
    assert isinstance(w, Format)
    given = {
        "w": _WORDS.get(s.parts) or _pointer(w.element),
        "y": f"*{s.type}",
        **_planes("w", w, s.w.made),
        "table": "*fp32" if s.w.kind == "table" else None,
        "index": "*i32" if s.indexed else None,
    }
    names = ("WKIND", "SW", "OW", "OVERW", "ZW", "FW", "GW", "RW", "CHUNK", "PARTS", "APART", "INDEXED")
    every = product_constants(s, request, Config(16, 32, 1, 4, 2), target, form="", top=1, experts=0)
    sizes = {"n": _N, "k": _K, "w_row": _K // s.parts, **_strides("w", w, s.w)}
    return _tile(name, dense, given, {**{n: every[n] for n in names}, "BN": 32}, sizes, 4, 2, False, matrix=False)


def plan_specs(request: GemmRequest, spec: Spec) -> list[bool]:
    """Which of the request's formats of x a Spec is for: the first."""
    return [i == 0 for i in range(len(request.x))]


def _tile(
    name: str, fn: Any, given: dict[str, str | None], constants: dict[str, Any], sizes: dict[str, int], warps: int,
    stages: int, fuse: bool, matrix: bool = True, native: Any = "",
) -> Tile:  # fmt: skip
    """Arguments that are not named are whole numbers of any value; those that are None do not exist."""
    absent = {n: None for n, t in given.items() if t is None}
    known = {n: t for n, t in given.items() if t is not None}
    whole, ones = sized({n: sizes.get(n) for n in fn.arg_names if n not in {*constants, *given}})
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fuse}
    return Tile(
        name=name,
        fn=fn,
        signature=known | whole,
        constants={**constants, **absent, **ones},
        options=options,
        matrix=matrix,
        native=native,
    )


def _strides(side: str, f: Format, s: Side, experts: int = 0) -> dict[str, int]:
    """Strides of the planes of x or w [_N, _K], as `planes` gives them: in rows, columns and experts."""
    inner = None if f.block is None else f.block.grid(_N, _K)
    outer = f.scale.scale.block if s.outer and f.scale is not None and f.scale.scale is not None else None
    grids = {"s": inner if s.scale else None, "z": inner if s.zero else None, "f": inner if s.offset else None}
    grids["o"] = outer.grid(_N, _K) if outer is not None else None
    found: dict[str, int] = {}
    for name, grid in grids.items():
        rows, columns = (0, 0) if grid is None else steps_of(torch.empty(grid, device="meta"))
        if s.flat and grid is not None and name != "o":
            rows, columns = _K // s.group, 1
        found |= {f"{name}{side}_row": rows, f"{name}{side}_col": columns}
        found[f"{name}{side}_exp"] = 0 if grid is None or not experts else grid[0] * grid[1]
    return found


def _planes(side: str, f: Format, made: tuple[str, ...] = ()) -> dict[str, str | None]:
    """Pointers to the planes of x or w: scale, outer scale, zero point, and w's offset; made: these are fp32."""
    scale, offset = (Format("fp32") if n in made else p for n, p in (("scale", f.scale), ("offset", f.offset)))
    outer = None if scale is None or scale.scale is None else scale.scale
    found = {
        f"s{side}": None if scale is None else _pointer(scale.element),
        f"o{side}": None if outer is None else _pointer(outer.element),
        f"z{side}": None if f.zero is None else _pointer(f.zero.element),
    }
    return found if side == "x" else {**found, "fw": None if offset is None else _pointer(offset.element)}


def _pointer(name: str) -> str:
    e = element(name)
    return f"*{name}" if e.wide else ("*i8" if e.kind == "int" else "*u8")
