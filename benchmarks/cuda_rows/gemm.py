"""gemm: every weight and activation format of the bars, against torch, humming and FlashInfer.

humming is called as it is shipped: its split sums ("stream-K") add partial results in 16 bits, in the order in which
blocks finish. Where that happens the row shows it and does not judge by it: the contract here is one rounding.

Products of two quantized operands begin with x in bf16, so their peers are a library's quantization followed by a
library's product. A product alone, of codes that are there already, is shown beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from cuda_rows import humming_peer
from cuda_rows.bench import Bench, Call, Group, Measured, codes, copies
from qhal.elements import element
from qhal.formats import Format
from qhal.requests import GemmRequest
from qhal.specs import Operand
from qhal.tensors import QTensor

MS = (1, 8, 16, 64, 256, 4096)
_LOOSER = {"humming": "partial sums added in 16 bits"}
_PART = "x is quantized already"


@dataclass(frozen=True, eq=False)
class Kind:
    """One line of formats. humming: its names of weight, scale, group (and input) types; other: peers by name."""

    name: str
    w: str
    x: str = "bf16"
    unit: str = "bf16"
    n: int = 8192
    k: int = 8192
    ms: tuple[int, ...] = MS
    humming: dict[str, Any] | None = None
    act: dict[str, Any] | None = None
    other: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(f"{self.name}/{self.n}x{self.k}/m{m}" for m in self.ms)


def _grouped(dtype: str, group: int = 128, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "group_size": group, **more}


KINDS = (
    Kind("w4a16", "int4.g128*bf16", ms=(1, 2, 4, 8, 16, 32, 64, 128, 256, 4096), humming=_grouped("uint4")),
    Kind("w4a16", "int4.g128*bf16", n=14336, k=4096, ms=(1, 2, 4, 8, 16, 32, 64, 128, 256), humming=_grouped("uint4")),
    Kind("w4a16-many", "int4.g128*bf16", ms=(64, 128, 256, 4096), humming=_grouped("uint4")),
    Kind("w8a16-int8", "int8.row*bf16", humming=_grouped("uint8", 0)),
    Kind("w8a16-fp8", "e4m3fn.row*bf16", humming=_grouped("float8e4m3", 0)),
    Kind("w6a16-e3m2", "e3m2.g128*bf16", humming=_grouped("float6e3m2")),
    Kind("w4a16-zero", "uint4-uint4.g128*bf16", humming=_grouped("uint4", has_zero_point=True)),
    Kind("w4a16-mxfp4", "e2m1.g32*e8m0", humming=_grouped("float4e2m1", 32, scale_dtype="float8e8m0")),
    Kind(
        "w4a16-nvfp4",
        "e2m1.g16*(e4m3fn.tensor*fp32)",
        humming=_grouped("float4e2m1", 16, scale_dtype="float8e4m3", scale_2_type="tensor"),
    ),
    Kind("w3a16", "int3.g128*bf16", humming=_grouped("uint3")),
    Kind("w2a16-zero", "uint2-uint2.g128*bf16", humming=_grouped("uint2", has_zero_point=True)),
    Kind("w4a8-int8", "int4.g128*bf16", "int8.row*fp32", "int8", humming=_grouped("uint4"), act={"dtype": "int8"}),
    Kind(
        "w4a8-fp8",
        "int4.g128*bf16",
        "e4m3fn.row*fp32",
        "fp8",
        ms=(1, 16, 64, 256, 4096),
        humming=_grouped("uint4"),
        act={"dtype": "float8e4m3"},
    ),
    Kind(
        "w8a8-int8",
        "int8.row*fp32",
        "int8.row*fp32",
        "int8",
        ms=(1, 16, 64, 256, 4096),
        humming=_grouped("int8", 0),
        act={"dtype": "int8"},
        other=("int_mm", "humming quantize, int_mm"),
    ),
    Kind(
        "w8a8-fp8-row",
        "e4m3fn.row*fp32",
        "e4m3fn.row*fp32",
        "fp8",
        ms=(1, 16, 64, 256, 4096),
        humming=_grouped("float8e4m3", 0),
        act={"dtype": "float8e4m3"},
        other=("scaled_mm row", "humming quantize, scaled_mm row"),
    ),
    Kind(
        "w8a8-fp8-tensor",
        "e4m3fn.tensor*fp32",
        "e4m3fn.tensor*fp32",
        "fp8",
        ms=(1, 16, 64, 256, 4096),
        other=("scaled_mm tensor",),
    ),
    Kind(
        "w8a8-fp8-block",
        "e4m3fn.128x128*fp32",
        "e4m3fn.g128*fp32",
        "fp8",
        humming=_grouped("float8e4m3", 128, group_size_n=128),
        act={"dtype": "float8e4m3", "group_size": 128},
        other=("flashinfer blockscale", "scaled_mm block", "humming quantize, scaled_mm block"),
    ),
)


def run(kind: Kind, bench: Bench, wanted: Sequence[str]) -> Iterator[Measured]:
    """Weights once, then every row count."""
    w, xf = Format.parse(kind.w), Format.parse(kind.x)
    n, k, device = kind.n, kind.k, bench.device
    plain, inputs = xf.plain, () if xf.plain else (Operand(xf),)
    request = GemmRequest(
        w=w, n=n, k=k, x=(xf,), m=(min(kind.ms), max(kind.ms)), out=None if plain else torch.bfloat16, graph=True
    )
    answer = bench.ops.supports(request)
    nbytes = int(n * k * w.bits / 8)
    weights = [codes(w, (n, k), device)]
    ours: list[Any] = []
    failed = ""
    if answer and answer.graph:
        try:
            for _ in range(copies(nbytes)):
                ours.append(bench.ops.prepare(weights[0], request, inputs=inputs))
        except Exception as error:
            failed = f"failed: prepare: {error}"
    dense = _dense(n, k, device)
    for m in kind.ms:
        row = f"{kind.name}/{n}x{k}/m{m}"
        if row not in wanted:
            continue
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        us, note = None, failed
        if not failed:
            us, note = bench.ours(answer, lambda x=x: [partial(bench.ops.gemm, x, p) for p in ours])
        peers = {"torch bf16": lambda x=x: [partial(linear, x, d) for d in dense]}
        if kind.humming is not None:
            peers["humming"] = lambda x=x: humming_peer.calls(_made(kind), [x], copies(nbytes))
        for name in kind.other:
            peers[name] = lambda x=x, name=name: _OTHER[name](x, weights, copies(nbytes))
        bits = element(xf.element).bits
        yield Measured(
            row, us, answer.executes, answer.numerics.label if answer.numerics is not None else "",
            bench.peers(peers), (_LOOSER if kind.humming else {}) | {p: _PART for p in kind.other if p in _ALONE},
            bench.floor(nbytes + m * k * bits / 8 + 2 * m * n, 2.0 * m * n * k, kind.unit), nbytes, note=note,
        )  # fmt: skip


@cache
def _made(kind: Kind) -> Any:
    """The library's kernels for this kind."""
    return humming_peer.made(kind.humming or {}, kind.act, kind.n, kind.k, kind.ms)


def _int_mm(x: Tensor, weights: list[QTensor], count: int) -> list[Call]:
    if x.shape[0] <= 16:
        raise ValueError("torch._int_mm takes more than 16 rows")
    a = torch.randint(-128, 128, x.shape, dtype=torch.int8, device=x.device)
    return [partial(torch._int_mm, a, w.codes.T) for w in _many(weights, count)]


def _scaled(x: Tensor, weights: list[QTensor], count: int, *, scales: str) -> list[Call]:
    a, (of_x, of_w) = x.to(torch.float8_e4m3fn), _ones(x, weights[0], scales)
    how = {"scale_a": of_x, "scale_b": of_w, "out_dtype": torch.bfloat16, "use_fast_accum": False}
    return [partial(torch._scaled_mm, a, w.codes.T, **how) for w in _many(weights, count)]


def _ones(x: Tensor, w: QTensor, scales: str) -> tuple[Tensor, Tensor]:
    """Scales of x and of a weight in the shapes and strides that `_scaled_mm` takes."""
    (m, k), n, one = x.shape, w.codes.shape[0], partial(torch.ones, device=x.device)
    if scales == "tensor":
        return one(()), one(())
    if scales == "row":
        return one(m, 1), one(1, n)
    return one(k // 128, m).t(), one(n // 128, k // 128).t()


def _after(x: Tensor, weights: list[QTensor], count: int, *, mode: str, dtype: str, scales: str = "") -> list[Call]:
    """The product of what humming's kernel quantizes x to; int8: without scales, which are one more kernel."""
    from humming import ops

    if not scales and x.shape[0] <= 16:
        raise ValueError("torch._int_mm takes more than 16 rows")
    how = {"quant_mode": mode, "quant_dtype": dtype} | ({"quant_group_size": 128} if scales == "block" else {})
    of_w = _ones(x, weights[0], scales)[1]

    def call(w: QTensor) -> Tensor:
        a, of_groups, of_rows = ops.process_input(x, **how)  # type: ignore[arg-type]
        if not scales:
            return torch._int_mm(a, w.codes.T)
        given = of_rows.reshape(-1, 1) if scales == "row" else of_groups.t().contiguous().t()
        how_ = {"scale_a": given, "scale_b": of_w, "out_dtype": torch.bfloat16, "use_fast_accum": False}
        return torch._scaled_mm(a, w.codes.T, **how_)

    return [partial(call, w) for w in _many(weights, count)]


def _blockscale(x: Tensor, weights: list[QTensor], count: int) -> list[Call]:
    from flashinfer.gemm import fp8_blockscale_gemm_sm90

    return [partial(fp8_blockscale_gemm_sm90, x, w.codes, None, w.scale) for w in _many(weights, count)]


def _many(weights: list[QTensor], count: int) -> list[QTensor]:
    """As many copies at addresses of their own."""
    while len(weights) < count:
        weights.append(replace(weights[0], codes=weights[0].codes.clone()))
    return weights[:count]


@cache
def _dense(n: int, k: int, device: torch.device) -> list[Tensor]:
    return [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]


_OTHER = {
    "int_mm": _int_mm,
    "scaled_mm row": partial(_scaled, scales="row"),
    "scaled_mm tensor": partial(_scaled, scales="tensor"),
    "scaled_mm block": partial(_scaled, scales="block"),
    "flashinfer blockscale": _blockscale,
    "humming quantize, int_mm": partial(_after, mode="dynamic_token", dtype="int8"),
    "humming quantize, scaled_mm row": partial(_after, mode="dynamic_token", dtype="float8e4m3", scales="row"),
    "humming quantize, scaled_mm block": partial(_after, mode="dynamic_group", dtype="float8e4m3", scales="block"),
}
_ALONE = ("int_mm", "scaled_mm row", "scaled_mm block")
GROUPS = tuple(
    Group(kind.rows, partial(run, kind), {} if kind.humming is None else {"humming": partial(_made, kind)})
    for kind in KINDS
)
