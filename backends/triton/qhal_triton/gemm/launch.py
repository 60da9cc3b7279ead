"""Host code of products: the arguments of a weight, looked up once, and one launch (or two) per call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from qhal.elements import element
from qhal.errors import FormatError
from qhal.requests import GemmRequest, GroupedRequest
from qhal.tensors import QTensor
from qhal_portable.gemm import quantized, write
from qhal_portable.prepared import PreparedWeight, Run
from qhal_triton.gemm.config import Config, candidates, config, problem
from qhal_triton.gemm.kernels.dense import dense
from qhal_triton.gemm.kernels.finish import finish
from qhal_triton.gemm.kernels.product import product
from qhal_triton.gemm.paths import DENSE_FROM, Plan, Spec, plan
from qhal_triton.gemm.planes import activation, planes
from qhal_triton.gemm.sides import WIDE_KIND
from qhal_triton.paths import Path
from qhal_triton.target import Target
from qhal_triton.tuning import Table
from qhal_triton.tuning import rows as buckets
from qhal_triton.wide import float_product

_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "int8": tl.int8}
_FIXED = 64
"""Rows of the tile of products whose rows must not depend on each other's number."""


@dataclass(frozen=True)
class Rows:
    """The rows of x by expert, on the device.

    form    "offsets", "masked" or "indexed"
    starts  int32: first row of every expert and one past the last one; masked: rows of every expert
    order   int32: rows of the result, sorted by expert (indexed)
    tiles   of rows at most, given the rows of a tile
    rows    of the result
    m       rows that are counted through; masked: rows that an expert has room for
    top     how many rows of the result read one row of x
    """

    form: str
    starts: Tensor
    order: Tensor | None
    tiles: Callable[[int], int]
    rows: int
    m: int
    top: int


class Bound:
    """One weight [N, K] or [E, N, K] with its planes as kernel arguments."""

    def __init__(
        self, p: PreparedWeight, gemm: GemmRequest, made: Plan, target: Target, table: Table | None = None
    ) -> None:
        self.request, self.made, self.target, self.weight = gemm, made, target, p
        self.table = table or Table()
        self.tiles: dict[tuple[Spec, int], Config] = {}
        self.specs = {f.storage: s for f, s in zip(gemm.x, made.specs, strict=True)}
        self.experts = p.request.experts if isinstance(p.request, GroupedRequest) else 0
        self.planes = planes(p.multiplied, p.made, made.specs[0], gemm.k)

    def partial(
        self,
        spec: Spec,
        q: Tensor | QTensor,
        m: int,
        dtype: torch.dtype,
        rows: Rows | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """[parts, rows, N]: one part in `dtype` (`out`, if it can be), or more in fp32 that are to be summed.

        q: [rows of x, K], codes or numbers.
        """
        r = self.request
        c = self.tile(spec, m, rows)
        total = q.shape[0] if rows is None else rows.rows
        if c.parts == 1:
            y = place((total, r.n), dtype, self.weight.device, out).unsqueeze(0)
        else:
            y = torch.empty(c.parts, total, r.n, dtype=torch.float32, device=self.weight.device)
        self.launch(spec, q, y, c, rows)
        return y

    def tile(self, spec: Spec, m: int, rows: Rows | None) -> Config:
        """Measured for this bucket of row counts, if it was; else by rule."""
        r, steps = self.request, -(-self.request.k // spec.span)
        if r.batch_invariant:
            return config(spec, _FIXED, r.n, steps, self.target, tiles=1)
        if rows is not None:
            tiles = max(min(rows.rows, self.experts), rows.rows // 128, 1)
            return config(spec, m, r.n, steps, self.target, tiles=tiles)
        if not self.table.entries:
            return config(spec, m, r.n, steps, self.target)
        bucket = buckets(m)
        found = self.tiles.get((spec, bucket))
        if found is None:
            some = candidates(spec, bucket, r.n, steps, self.target)
            x = next(f for f, one in self.specs.items() if one is spec or spec is self.made.many)
            found = self.tiles[spec, bucket] = self.table.pick(problem(r, x, bucket), some)
        return found

    def launch(self, spec: Spec, q: Tensor | QTensor, y: Tensor, c: Config, rows: Rows | None) -> None:
        """The product of one tile shape, into y [parts, rows, N]."""
        r, p, m = self.request, self.weight, q.shape[0]
        tiles = -(-m // c.bm) if rows is None else rows.tiles(c.bm)
        steps = -(-r.k // spec.span)
        codes, x = activation(q, spec)
        bias = p.bias
        grid = (-(-r.n // c.bn), tiles, c.parts)
        product[grid](
            codes, self.planes["w"], y, bias, x["sx"], x["ox"], x["zx"],
            self.planes["sw"], self.planes["ow"], self.planes["zw"], self.planes["fw"],
            self.planes["table"], self.planes["index"],
            None if rows is None else rows.order, None if rows is None else rows.starts,
            m if rows is None else rows.m, r.n, r.k, self.experts, steps, -(-steps // c.parts),
            1 if rows is None or rows.form != "masked" else -(-rows.m // c.bm),
            codes.stride(0), *x["strides"], *self.planes["strides"],
            r.n, y.stride(1), y.stride(0),
            **product_constants(
                spec, r, c, self.target, form="" if rows is None else rows.form, top=1 if rows is None else rows.top,
                experts=self.experts, bias=bias is not None,
            ),
            num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=spec.mode != "early",
        )  # fmt: skip

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in `dtype`: every number decoded in fp32 and rounded once."""
        r, s = self.request, self.made.specs[0]
        y = torch.empty(r.n, r.k, dtype=dtype, device=self.weight.device)
        b, t = 32, self.planes
        grid = (-(-r.n // b), -(-r.k // s.span))
        dense[grid](
            t["w"], y, t["sw"], t["ow"], t["zw"], t["fw"], t["table"], t["index"], r.n, r.k, *t["strides"][:8],
            WKIND=s.w.kind, SW=s.w.scale, OW=s.w.outer, OVERW=s.w.over, ZW=s.w.zero, FW=s.w.offset,
            GW=0 if s.indexed else s.w.group, RW=s.w.rows, CHUNK=s.chunk, PARTS=s.parts, APART=s.apart,
            INDEXED=s.indexed, BN=b,
            enable_fp_fusion=False,
        )  # fmt: skip
        return y


def product_constants(
    s: Spec, r: GemmRequest, c: Config, target: Target, *, form: str, top: int, experts: int, bias: bool | None = None
) -> dict[str, Any]:
    """The compile-time arguments of `product`."""
    moved = s.type == "int8" and s.w.kind == "uint" and s.w.bits == 8
    return {
        "TYPE": _TYPES["bf16" if s.native else s.type],
        "NATIVE": s.native,
        "FOREIGN": s.foreign,
        "PTX": target.kind == "cuda" and "e4m3fn" in target.fp8,
        "PACKED": s.packed,
        "XKIND": "" if s.x.kind == WIDE_KIND else s.x.kind,
        "WKIND": s.w.kind,
        "MODE": s.mode,
        "SX": s.x.scale,
        "OX": s.x.outer,
        "OVERX": s.x.over,
        "ZX": s.x.zero,
        "GX": s.x.group,
        "SW": s.w.scale,
        "OW": s.w.outer,
        "OVERW": s.w.over,
        "ZW": s.w.zero,
        "FW": s.w.offset,
        "GW": 0 if s.indexed else s.w.group,
        "RW": s.w.rows,
        "WSHIFT": -128 if moved else 0,
        "CHUNK": s.chunk,
        "PARTS": s.parts,
        "APART": s.apart,
        "UNIT": s.unit,
        "INDEXED": s.indexed,
        "EVEN": r.k % s.span == 0,
        "BIAS": r.bias if bias is None else bias,
        "BM": c.bm,
        "BN": c.bn,
        "FORM": form,
        "TOP": top,
        "EXPERTS": 1 << experts.bit_length(),
    }


def bind(path: Path, ops: Any, p: PreparedWeight) -> Run:
    """The product of one weight with everything bound: the body of `gemm`."""
    request = p.request
    assert isinstance(request, GemmRequest)
    made = plan(request, ops._target)
    assert made is not None
    bound = Bound(p, request, made, ops._target, ops._table)
    wide = path.rounded

    def run(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        q, dtype = quantized(x, request, p, index, by=ops.quantize)
        rows = q.shape[0]
        spec = spec_of(bound, q, rows)
        if rows == 0:
            return write(torch.empty(0, request.n, dtype=dtype, device=p.device), out)
        if wide is not None and rows >= DENSE_FROM:
            value = q.codes if isinstance(q, QTensor) else q.detach()
            y = float_product(value, bound.decoded(wide).T)
            return write((y if p.bias is None else y.add_(p.bias)).to(dtype), out)
        part = bound.partial(spec, q, rows, dtype, None, out)
        return given(part[0] if part.shape[0] == 1 else finished(part, rows, request.n, dtype, out), out)

    return run


def place(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, out: Tensor | None) -> Tensor:
    """`out` where a kernel can write the result into it, else a new tensor."""
    fits = isinstance(out, Tensor) and (tuple(out.shape), out.dtype, out.device) == (shape, dtype, device)
    return out if fits and out.stride(1) == 1 else torch.empty(shape, dtype=dtype, device=device)  # type: ignore[union-attr, return-value]


def given(y: Tensor, out: Tensor | None) -> Tensor:
    """The result in `out`, where the kernel may have written it; FormatError if it does not fit."""
    return out if out is not None and y.data_ptr() == out.data_ptr() and y.shape == out.shape else write(y, out)


def finished(part: Tensor, rows: int, width: int, dtype: torch.dtype, out: Tensor | None = None, **more: Any) -> Tensor:
    """[rows, width] of the parts [parts, rows * TOP, N] of a product, see `kernels/finish.py`."""
    y = place((rows, width), dtype, part.device, out)
    block = 256
    asked = {"weights": None, "ids": None, "alpha": 1.0, "limit": 0.0, "shift": 0.0, **more}
    flags = {"TOP": 1, "WEIGHTED": False, "NAME": "", "GATED": False, "LIMITED": False}
    flags |= {name: asked.pop(name) for name in list(asked) if name in flags}
    finish[(rows, -(-width // block))](
        part, y, asked["weights"], asked["ids"], part.stride(0), part.shape[2], width, y.stride(0),
        asked["alpha"], asked["limit"], asked["shift"], PARTS=part.shape[0], BLOCK=block, num_warps=4, **flags,
    )  # fmt: skip
    return y


def spec_of(bound: Bound, q: Tensor | QTensor, rows: int) -> Spec:
    """The Spec for that many rows (of an expert, on average) of x as it is multiplied.

    FormatError for a dtype that the request does not name.
    """
    made = bound.made
    if isinstance(q, QTensor):
        return bound.specs[q.format.storage]
    if made.many is not None and rows >= made.many_from and element(made.many.type).storage == q.dtype:
        return made.many
    for spec in bound.made.specs:
        if spec.x.kind == WIDE_KIND and element(spec.type).storage == q.dtype:
            return spec
    raise FormatError(f"x arrives as {q.dtype}, the weight was prepared for {bound.request}")
