"""Host code of products: the arguments of a weight, looked up once, and one launch (or two) per call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from qhal.elements import element
from qhal.errors import FormatError
from qhal.requests import GemmRequest, GroupedRequest
from qhal.tensors import QTensor
from qhal_portable.gemm import quantized, write
from qhal_portable.prepared import ORDER, PreparedWeight, Run
from qhal_triton.gemm.config import Config, candidates, config, problem
from qhal_triton.gemm.gathering import gathering
from qhal_triton.gemm.kernels.dense import dense
from qhal_triton.gemm.kernels.eights import POWERS
from qhal_triton.gemm.kernels.product import product
from qhal_triton.gemm.paths import Plan, Spec, by_group, plan
from qhal_triton.gemm.planes import activation, planes
from qhal_triton.gemm.results import finished, given, place
from qhal_triton.gemm.sides import WIDE_KIND
from qhal_triton.launching import Launcher
from qhal_triton.paths import Path
from qhal_triton.target import Target
from qhal_triton.tuning import Table
from qhal_triton.tuning import rows as buckets
from qhal_triton.wide import float_product

_Call = tuple[tuple[int, int, int], tuple["Tensor | None", ...], tuple[int, ...]]
_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "int8": tl.int8}
_TENSORS = ("x", "y", "sx", "ox", "zx", "order", "starts")
_NUMBERS = ("m", "spread", "x_row", "sx_row", "sx_col", "zx_row", "zx_col", "ox_row", "y_row", "y_part")
"""Of a call: the kernel's names."""
_STRIDES = (
    "w_row", "sw_row", "sw_col", "zw_row", "zw_col", "fw_row", "fw_col", "ow_row",
    "w_exp", "sw_exp", "zw_exp", "fw_exp", "ow_exp",
)  # fmt: skip
"""Of a weight, in the order of `planes`."""
_MOST = 4096
"""Row counts for which a weight remembers its tile; they start anew beyond."""
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
        self._chosen: dict[tuple[int, int, tuple[int, int] | None], tuple[Config, Launcher]] = {}
        self._launchers: dict[tuple[int, Config, str, int], Launcher] = {}
        self._decoder: Launcher | None = None
        self.specs = {f.storage: s for f, s in zip(gemm.x, made.specs, strict=True)}
        wide = [s for s in reversed(made.specs) if s.x.kind == WIDE_KIND]  # of two for one type, the first
        self.plain = {element(s.type).storage: s for s in wide}
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
        """[rows, N] in `dtype` (`out`, if it can be), or parts [parts, rows, N] in fp32 that are to be summed.

        q: [rows of x, K], codes or numbers.
        """
        r = self.request
        total = q.shape[0] if rows is None else rows.rows
        key = (id(spec), m, None if rows is None else (total, rows.top))
        found = self._chosen.get(key)
        if found is None:
            if len(self._chosen) >= _MOST:
                self._chosen.clear()
            c = self.tile(spec, m, rows)
            found = self._chosen[key] = c, self._launcher(spec, c, rows)
        c, start = found
        if c.parts == 1:
            y = place((total, r.n), dtype, self.weight.device, out)
        else:
            y = torch.empty(c.parts, total, r.n, dtype=torch.float32, device=self.weight.device)
        start(*self._call(spec, q, y, c, rows))
        return y

    def again(self, spec: Spec, x: Tensor, dtype: torch.dtype) -> Again:
        """What `partial` did for this x that is not quantized, for others like it."""
        c, start = self._chosen[id(spec), x.shape[0], None]
        shape = (x.shape[0], self.request.n) if c.parts == 1 else (c.parts, x.shape[0], self.request.n)
        kind, device = dtype if c.parts == 1 else torch.float32, self.weight.device
        grid, _, numbers = self._call(spec, x, torch.empty(shape, dtype=kind, device="meta"), c, None)
        return Again(start, grid, numbers, shape, kind, dtype, device)

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
        """The product of one tile shape, into y [rows, N] or [parts, rows, N]."""
        self._launcher(spec, c, rows)(*self._call(spec, q, y, c, rows))

    def _call(self, spec: Spec, q: Tensor | QTensor, y: Tensor, c: Config, rows: Rows | None) -> _Call:
        """What the launcher takes: grid, tensors and numbers."""
        r, m = self.request, q.shape[0]
        codes, x = activation(q, spec)
        return (
            (-(-r.n // c.bn), -(-m // c.bm) if rows is None else rows.tiles(c.bm), c.parts),
            (codes, y, x["sx"], x["ox"], x["zx"], *((None, None) if rows is None else (rows.order, rows.starts))),
            (
                m if rows is None else rows.m, 1 if rows is None or rows.form != "masked" else -(-rows.m // c.bm),
                codes.stride(0), *x["strides"], y.stride(-2), y.stride(0) if y.dim() == 3 else 0,
            ),
        )  # fmt: skip

    def _launcher(self, spec: Spec, c: Config, rows: Rows | None) -> Launcher:
        """`product` with all that a weight and a tile fix; open are x and y, their strides, and the rows."""
        form, top = ("", 1) if rows is None else (rows.form, rows.top)
        key = (id(spec), c, form, top)
        found = self._launchers.get(key)
        if found is None:
            r, bias = self.request, self.weight.bias
            steps = -(-r.k // spec.span)
            fixed = {**self._planes(len(_STRIDES)), "bias": bias, "experts": self.experts, "b_exp": r.n}
            fixed |= {"steps": steps, "per_part": -(-steps // c.parts)}
            fixed |= product_constants(
                spec, r, c, self.target, form=form, top=top, experts=self.experts, bias=bias is not None
            )
            options = {"num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": spec.mode != "early"}
            found = self._launchers[key] = Launcher(product, _TENSORS, _NUMBERS, fixed, **options)
        return found

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in `dtype`: every number decoded in fp32 and rounded once."""
        r, s, b = self.request, self.made.specs[0], 32
        y = torch.empty(r.n, r.k, dtype=dtype, device=self.weight.device)
        if self._decoder is None:
            fixed = {
                **self._planes(8), "WKIND": s.w.kind, "SW": s.w.scale, "OW": s.w.outer, "OVERW": s.w.over,
                "ZW": s.w.zero, "FW": s.w.offset, "GW": 0 if s.indexed else s.w.group, "RW": s.w.rows,
                "CHUNK": s.chunk, "PARTS": s.parts, "APART": s.apart, "INDEXED": s.indexed, "BN": b,
            }  # fmt: skip
            self._decoder = Launcher(dense, ("y",), (), fixed, enable_fp_fusion=False)
        self._decoder((-(-r.n // b), -(-r.k // s.span), 1), (y,), ())
        return y

    def _planes(self, strides: int) -> dict[str, Any]:
        """The weight's planes, sizes and so many of their strides, by the kernels' names."""
        found = {name: self.planes[name] for name in ("w", "sw", "ow", "zw", "fw", "table", "index")}
        found |= dict(zip(_STRIDES[:strides], self.planes["strides"], strict=False))
        return found | {"n": self.request.n, "k": self.request.k}


class Again(NamedTuple):
    """A product of x of the type, shape, strides and device of an earlier one: nothing is left to check or choose."""

    start: Launcher
    grid: tuple[int, int, int]
    numbers: tuple[int, ...]
    shape: tuple[int, ...]
    kind: torch.dtype
    dtype: torch.dtype
    device: torch.device

    def run(self, x: Tensor) -> Tensor:
        """[rows, N]."""
        y = torch.empty(self.shape, dtype=self.kind, device=self.device)
        self.start(self.grid, (x, y, None, None, None, None, None), self.numbers)
        return y if len(self.shape) == 2 else finished(y, self.shape[1], self.shape[2], self.dtype)


def product_constants(
    s: Spec, r: GemmRequest, c: Config, target: Target, *, form: str, top: int, experts: int, bias: bool | None = None
) -> dict[str, Any]:
    """The compile-time arguments of `product`."""
    moved = s.type == "int8" and s.w.kind == "uint" and s.w.bits == 8
    return {
        "TYPE": _TYPES["bf16" if s.native else s.type],
        "NATIVE": s.native,
        "FOREIGN": s.foreign,
        "POWER": POWERS[s.w.kind] if s.expanded else 1.0,
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
    if ORDER not in p.made:
        return _bind(path, ops, p, request)
    moved = by_group(request, ops._target)
    assert moved is not None
    return gathering(_bind(path, ops, p, moved), request, p)


def _bind(path: Path, ops: Any, p: PreparedWeight, request: GemmRequest) -> Run:
    made = plan(request, ops._target)
    assert made is not None
    bound = Bound(p, request, made, ops._target, ops._table)
    wide = path.rounded

    known: dict[tuple[Any, ...], Again] = {}

    def run(x: Tensor | QTensor, index: int, out: Tensor | None) -> Tensor:
        plain = out is None and type(x) is Tensor
        like = (x.dtype, x.shape, x.stride(), x.device) if plain else ()  # type: ignore[union-attr]
        if plain and like in known:
            return known[like].run(x)  # type: ignore[arg-type]
        q, dtype = quantized(x, request, p, index, by=ops.quantize)
        rows = q.shape[0]
        spec = spec_of(bound, q, rows)
        if rows == 0:
            return write(torch.empty(0, request.n, dtype=dtype, device=p.device), out)
        if wide is not None and 0 < made.dense <= rows:
            value = q.codes if isinstance(q, QTensor) else q.detach()
            return write(float_product(value, bound.decoded(wide).T, dtype, p.bias), out)
        part = bound.partial(spec, q, rows, dtype, None, out)
        if plain and q is x:
            if len(known) >= _MOST:
                known.clear()
            known[like] = bound.again(spec, x, dtype)  # type: ignore[arg-type]
        return given(part if part.dim() == 2 else finished(part, rows, request.n, dtype, out), out)

    return run


def spec_of(bound: Bound, q: Tensor | QTensor, rows: int) -> Spec:
    """The Spec for that many rows (of an expert, on average) of x as it is multiplied.

    FormatError for a dtype that the request does not name.
    """
    made = bound.made
    if isinstance(q, QTensor):
        return bound.specs[q.format.storage]
    if made.many is not None and rows >= made.many_from and element(made.many.type).storage == q.dtype:
        return made.many
    spec = bound.plain.get(q.dtype)
    if spec is not None:
        return spec
    raise FormatError(f"x arrives as {q.dtype}, the weight was prepared for {bound.request}")
