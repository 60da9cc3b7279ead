"""Which product takes which path, and the paths' arithmetic on a processor (level L2): no GPU is needed here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

import qhal
from qhal.formats import Format
from qhal.requests import GemmRequest, NumericsClass
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance import datasets
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_cuda import products
from qhal_cuda.kernels import COLUMNS, ROWS
from qhal_cuda.ops import CudaOps
from qhal_portable.prepared import PreparedWeight

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tensors of the processor, for the interpreter; on a GPU the suite asks the paths"
)


class Emulated(CudaOps):
    """The same code on the processor, where torch has int8 and fp8 products of the same meaning."""

    interface: ClassVar[tuple[int, int]] = (1, 0)

    def synchronize(self) -> None:
        """Nothing runs beside."""

    def _path(self, request: Any) -> None:
        """No shared kernel, so that torch's products are what is tested."""


def paths(level: int) -> Iterator[tuple[str, Case]]:
    for case in catalogue(level):
        request = OPERATIONS[case.operation].request(case)
        if isinstance(request, GemmRequest):
            path = products.choose(request, (9, 0))
            if path is not None:
                yield path.kernel, case


def tiles(case: Case) -> int:
    """Tiles of the kernel that finishes a product: the interpreter takes a good while for each."""
    return -(-case.size("m") // ROWS) * -(-case.size("n") // COLUMNS)


EVERY = list(paths(0))
CASES = [(kind, case) for kind, case in EVERY if tiles(case) <= 4]
CASES += [next((kind, case) for kind, case in EVERY if kind == "fp8" and tiles(case) > 4)]
CASES += [(kind, case) for kind, case in paths(1) if kind == "block" and "m128_n256" in case.id]  # too small at level 0


def test_every_path_is_asked() -> None:
    assert {kind for kind, _ in CASES} == {"16 bits", "fp8", "block"}


@pytest.mark.parametrize(("kind", "case"), CASES, ids=[case.id for _, case in CASES])
def test_the_arithmetic_of_a_path_is_in_its_class(kind: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "block" or kind.startswith("codes"):
        monkeypatch.setattr(torch, "_scaled_mm", blocks)
    record = run_case(case, Emulated("sm_90", "cpu"))
    assert record.outcome.status is Status.PASS, record.outcome.reason


def blocks(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> torch.Tensor:
    """What a GPU's `_scaled_mm` makes of blocks, or of groups of both operands, in the strides that it asks for."""
    assert scale_a.stride(0) == 1 and scale_a.stride(1) % 4 == 0 and not use_fast_accum
    groups, n = scale_b.shape
    assert scale_a.shape == (a.shape[0], groups) and groups == a.shape[1] // 128
    assert {t.dtype for t in (a, b)} == {torch.float8_e4m3fn} and {t.dtype for t in (scale_a, scale_b)} == {
        torch.float32
    }
    if n == b.shape[1]:
        assert scale_b.T.stride() == (1, n) and n % 4 == 0  # its test of 1 x 128, of b.T and scale_b.T
    else:
        assert scale_b.stride(0) == 1 and n == b.shape[1] // 128
        scale_b = scale_b.repeat_interleave(128, 1)
    y = torch.zeros(a.shape[0], b.shape[1])
    for g in range(a.shape[1] // 128):
        at = slice(128 * g, 128 * g + 128)
        y += a[:, at].float() @ b[at].float() * scale_a[:, g : g + 1] * scale_b[g]
    return y.to(out_dtype)


def request_of(w: str, x: str, **more: object) -> GemmRequest:
    made = GemmRequest(w=Format.parse(w), n=64, k=128, x=(Format.parse(x),))
    return replace(made, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "capability", "kind"),
    [
        (request_of("int4.g32*bf16", "bf16"), (8, 0), "16 bits"),
        (request_of("int4.g32*bf16", "fp32"), (9, 0), None),
        (request_of("int8.row*fp32", "int8.row*fp32"), (8, 0), None),
        (request_of("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32", n=256, k=512), (9, 0), "block"),
        (request_of("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32", n=256, k=512), (8, 9), None),
        (request_of("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32", n=256, k=640), (9, 0), None),
        (request_of("e4m3fn.128x128*bf16", "e4m3fn.g128*fp32", n=256, k=512), (9, 0), None),
        (request_of("int4.g128*bf16", "e4m3fn.row*fp32", k=512), (9, 0), "codes"),
        (request_of("int4.g128*fp32", "e4m3fn.tensor*fp32", k=512), (9, 0), "codes"),
        (request_of("int4.g128*fp16", "e4m3fn.g128*fp32", k=512), (9, 0), "codes by group"),
        (request_of("int4.g128*bf16", "e4m3fn.row*fp32", k=512), (8, 9), None),
        (request_of("int4.g128*bf16", "e4m3fn.row*fp32", k=384), (9, 0), None),
        (request_of("int4.g128*bf16", "e4m3fn.row*fp32", k=512, n=72), (9, 0), None),
        (request_of("int4.g128*bf16", "e4m3fn.row*fp32", k=512, group_index=True), (9, 0), None),
        (request_of("int4.g128*bf16", "e4m3fn.row*bf16", k=512), (9, 0), None),
        (request_of("int4.g64*bf16", "e4m3fn.row*fp32", k=512), (9, 0), None),
        (request_of("uint4-uint4.g128*bf16", "e4m3fn.row*fp32", k=512), (9, 0), None),
        (request_of("int4.g128*bf16", "e4m3fn.row*fp32", k=512, numerics=NumericsClass.FP32_ACC), (9, 0), None),
        (request_of("e4m3fn.row*fp32", "e4m3fn.row*fp32"), (8, 6), None),
        (request_of("e4m3fn.row*fp32", "e4m3fn.row*fp32"), (8, 9), "fp8"),
        (request_of("e4m3fn.row*fp32", "e4m3fn.row*fp32", numerics=NumericsClass.EXACT), (9, 0), None),
        (request_of("e4m3fn.row*fp32", "e4m3fn.row*fp32", batch_invariant=True), (9, 0), None),
        (request_of("e2m1.g32*e8m0", "e2m1.g32*e8m0"), (9, 0), None),
    ],
)
def test_the_path_of_a_request(request_: GemmRequest, capability: tuple[int, int], kind: str | None) -> None:
    path = products.choose(request_, capability)
    assert (path.kernel if path else None) == kind
    ops = CudaOps(f"sm_{capability[0]}{capability[1]}", "meta")
    answer = ops.supports(request_)
    assert answer
    if kind == "16 bits" and ops._path(request_) is not None:  # a shared kernel reads the quantized weight
        assert "Triton" in answer.executes
    elif path is not None:
        assert answer.executes.endswith(path.executes)


def test_graphs_are_claimed_where_nothing_reads_the_host() -> None:
    ops = CudaOps("sm_90", "meta")
    assert ops.supports(request_of("int4.g32*bf16", "bf16", graph=True)).graph
    refused = ops.supports(request_of("int4.g32*bf16", "fp32", numerics=NumericsClass.EXACT, graph=True))
    assert not refused and refused.nearest == request_of("int4.g32*bf16", "fp32", numerics=NumericsClass.EXACT)


def test_a_weight_that_half_cannot_hold_is_refused_when_it_is_prepared() -> None:
    w = torch.full((16, 16), 1e6, dtype=torch.float32)
    request = GemmRequest(w=Format.parse("fp32"), n=16, k=16, x=(Format.parse("fp16"),))
    with pytest.raises(qhal.FormatError, match="overflows fp16"):
        Emulated("sm_90", "cpu").prepare(w, request)


def test_a_refit_that_half_cannot_hold_is_refused_before_anything_is_written() -> None:
    ops, request = Emulated("sm_90", "cpu"), GemmRequest(w=Format("fp32"), n=16, k=16, x=(Format("fp16"),))
    old = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    prepared = ops.prepare(old, request)
    with pytest.raises(qhal.FormatError, match="overflows fp16"):
        ops.prepare(torch.full((16, 16), 1e6), request, into=prepared)
    assert torch.equal(ops.restore(prepared), old)  # type: ignore[arg-type]


@pytest.mark.parametrize("w", ["int8.row*bf16", "e4m3fn.row*fp16", "int8.row*fp32"])
def test_what_a_graph_holds_reads_a_refit(w: str) -> None:
    """A captured product keeps tensors: after prepare(into=) it must meet the new scales, of 16 bits too."""
    ops, f = Emulated("sm_90", "cpu"), Format.parse(w)
    x = Format.parse(f"{f.element}.row*fp32")
    request = GemmRequest(w=f, n=32, k=64, x=(x,))
    old, new = (datasets.weight("refit", name, f, 32, 64, "normal") for name in ("old", "new"))
    prepared = ops.prepare(old, request, inputs=[Operand(x)])
    assert isinstance(prepared, PreparedWeight) and prepared.run is not None
    held, rows = prepared.run, torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    ops.prepare(new, request, inputs=[Operand(x)], into=prepared)
    fresh = ops.prepare(new, request, inputs=[Operand(x)])
    assert torch.equal(held(rows, 0, None), ops.gemm(rows, fresh))


def test_plain_inputs_are_counted_and_rounded_as_the_contract_says() -> None:
    ops, f = Emulated("sm_90", "cpu"), Format.parse("bf16")
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    prepared = ops.prepare(w, GemmRequest(w=f, n=8, k=16, x=(f,), out=torch.float32), inputs=[Operand(f)])
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ops.gemm(x, prepared), x.bfloat16().float() @ w.float().T)
    with pytest.raises(qhal.FormatError, match="input=1: the weight was prepared with 1 inputs"):
        ops.gemm(x, prepared, input=1)


@pytest.mark.parametrize("rows", [1, 3, 4, 6])
def test_rows_that_blocks_do_not_align_are_kept_and_none_is_added(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", blocks)
    ops, x = Emulated("sm_90", "cpu"), Format.parse("e4m3fn.g128*fp32")
    request = request_of("e4m3fn.128x128*fp32", str(x), n=256, k=512, out=torch.float32)
    w = datasets.weight("rows", "w", request.w, 256, 512, "normal")  # type: ignore[arg-type]
    given = torch.randn(rows, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = ops.gemm(given, ops.prepare(w, request, inputs=[Operand(x)]))
    expected = ops.quantize(given, x).dequantize().double() @ w.dequantize().double().T
    assert y.shape == (rows, 256) and (y - expected).norm() <= 2.0**-20 * expected.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("w", "x", "rows"),
    [
        ("int4.g128*bf16", "e4m3fn.row*fp32", 1),
        ("int4.g128*fp16", "e4m3fn.row*fp32", 6),
        ("int4.g128*fp32", "e4m3fn.tensor*fp32", 5),
        ("int4.g128*bf16", "e4m3fn.g128*fp32", 8),
    ],
)
def test_codes_as_fp8_with_scales_of_groups(
    w: str, x: str, rows: int, out: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", blocks)
    ops, f = Emulated("sm_90", "cpu"), Format.parse(x)
    request = request_of(w, x, n=48, k=1024, out=out, bias=bias)
    old, new = (datasets.weight("codes", name, request.w, 48, 1024, "normal") for name in ("old", "new"))  # type: ignore[arg-type]
    shift = torch.randn(48, generator=torch.Generator().manual_seed(1)) if bias else None
    prepared = ops.prepare(old, request, inputs=[Operand(f)], bias=shift)
    assert isinstance(prepared, PreparedWeight) and prepared.run is not None
    held = prepared.run
    given = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    value = ops.quantize(given, f).dequantize().double()
    for weight in (old, new):  # the second by a refit: what a graph holds reads it
        ops.prepare(weight, request, inputs=[Operand(f)], bias=shift, into=prepared)
        back = ops.restore(prepared)
        assert isinstance(back, QTensor) and back.equal(weight)  # type: ignore[arg-type]
        y = held(given, 0, None)
        expected = value @ weight.dequantize().double().T + (0.0 if shift is None else shift)  # type: ignore[union-attr]
        near = 2.0**-20 if out == torch.float32 else 2.0**-7
        assert y.dtype == out and y.shape == (rows, 48) and (y - expected).norm() <= near * expected.norm()
    assert held(given[:0], 0, None).shape == (0, 48)


def test_few_rows_are_the_shared_kernels_and_many_are_written_as_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    class Both(CudaOps):
        interface: ClassVar[tuple[int, int]] = (1, 0)

        def synchronize(self) -> None:
            """Nothing runs beside."""

    calls: list[int] = []

    def counted(a: torch.Tensor, b: torch.Tensor, **more: Any) -> torch.Tensor:
        calls.append(a.shape[0])
        return blocks(a, b, **more)

    monkeypatch.setattr(torch, "_scaled_mm", counted)
    ops, x = Both("sm_90", "cpu"), Format.parse("e4m3fn.row*fp32")
    request = request_of("int4.g128*bf16", str(x), n=16, k=512, m=(1, 128), out=torch.float32)
    answer, least = ops.supports(request), products.FEW["codes"]
    assert f"; from {least} rows: W4A8: codes written as e4m3fn" in answer.executes
    assert answer.layouts == ("nibble128",) and answer.numerics == NumericsClass.REDUCED_ACC
    w = datasets.weight("rows", "w", request.w, 16, 512, "normal")  # type: ignore[arg-type]
    prepared = ops.prepare(w, request, inputs=[Operand(x)])
    assert isinstance(prepared, PreparedWeight) and prepared.stored.layout == "nibble128"  # type: ignore[union-attr]
    given = torch.randn(least, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = ops.quantize(given, x).dequantize().double() @ w.dequantize().double().T  # type: ignore[union-attr]
    for rows, met in ((least - 1, []), (least, [-(-least // 4) * 4])):
        y = ops.gemm(given[:rows], prepared)
        assert calls == met and (y - expected[:rows]).norm() <= 2.0**-20 * expected[:rows].norm()


def test_an_unknown_architecture_is_one_error() -> None:
    with pytest.raises(qhal.UnsupportedError, match="no compute capability"):
        CudaOps("hopper", "meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape_a", "shape_b"), [((19, 1), (300, 1)), ((1, 1), (300, 1)), ((19, 1), (1, 1)), (None, None)]
)
def test_what_follows_a_product_rounds_once(
    dtype: torch.dtype, shape_a: tuple[int, int] | None, shape_b: tuple[int, int] | None
) -> None:
    chance = torch.Generator().manual_seed(0)
    y = torch.randn(19, 300, generator=chance) * 3e4
    bias = torch.randn(300, generator=chance)
    scales, expected = None, y
    if shape_a is not None and shape_b is not None:
        scales = (torch.rand(shape_a, generator=chance).half(), torch.rand(shape_b, generator=chance).bfloat16())
        expected = expected * scales[0].float() * scales[1].float().T
    wide = torch.empty(19, 320, dtype=dtype)[:, :300]
    for b, reference in ((bias, expected + bias), (None, expected)):
        assert torch.equal(products.finish(y, scales, b, wide), reference.to(dtype))
    assert products.finish(y[:0], scales, bias, wide[:0]).shape == (0, 300)
