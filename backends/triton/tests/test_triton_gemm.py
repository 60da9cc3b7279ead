"""Products by the kernels, interpreted where no GPU is (level L2): the suite's cases, every format, every branch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_ops import CDNA, DEVICE, HOPPER, Emulated, cases, matrix_product, product_and_reference

import qhal
from qhal.formats import Format
from qhal.requests import GemmRequest, NumericsClass
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance import datasets
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_triton.gemm.config import config, memory
from qhal_triton.gemm.paths import DENSE_FROM, SHORT_FROM, plan
from qhal_triton.target import Target

OPS = Emulated()
CASES = cases("gemm", OPS, 2)
ROW, FP8 = "int8.row*fp32", "e4m3fn.row*fp32"


def request_of(w: str, x: str = "bf16", **more: object) -> GemmRequest:
    made = GemmRequest(w=Format.parse(w), n=48, k=256, x=(Format.parse(x),), m=(1, 32))
    return replace(made, **more)  # type: ignore[arg-type]


def test_the_suite_asks_every_type() -> None:
    found = {s.type for c in CASES if (p := plan(OPERATIONS["gemm"].request(c), HOPPER)) for s in p.specs}  # type: ignore[arg-type]
    assert found >= {"bf16", "fp16", "int8", "fp8"}


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_a_case_of_the_suite(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix_product(monkeypatch)
    record = run_case(case, OPS)
    assert record.outcome.status is Status.PASS, record.outcome.reason


MADE_PLANES = {
    "nf4.flat64*(lut8.flat256*fp32+fp32)": {"made.scale"},
    "uint4.g32*(uint6.g8*fp16)-(uint6.g8*fp16)": {"made.scale", "made.offset"},
}
"""Planes that no kernel reads as they are: kept decoded too."""

TAKEN = [
    ("int4.g32*bf16", "bf16", 256, "word32", NumericsClass.FP32_ACC),
    ("int4.g128*fp16", "fp16", 384, "word16", NumericsClass.FP32_ACC),
    ("int4.g128*fp16", "bf16", 512, "word32", NumericsClass.FP32_ACC),
    ("int4.g32*bf16", "fp32", 96, "nibble16", NumericsClass.FP32_ACC),
    ("int4.g64*bf16", "bf16", 320, "nibble32", NumericsClass.FP32_ACC),
    ("int4.row*fp32", "bf16", 95, "canonical", NumericsClass.FP32_ACC),
    ("int4.g64*fp32", "bf16", 90, "nibble", NumericsClass.FP32_ACC),
    ("uint4-uint4.g32*fp16", "bf16", 256, "word32", NumericsClass.FP32_ACC),
    ("uint4-fp16.g64*fp16", "bf16", 256, "word32", NumericsClass.DEQUANT_16),
    ("uint4.g32*fp16+fp16", "bf16", 256, "word32", NumericsClass.DEQUANT_16),
    ("uint4.g32*fp16-fp16", "fp32", 256, "word32", NumericsClass.FP32_ACC),
    ("int2.g64*bf16", "bf16", 256, "word32", NumericsClass.FP32_ACC),
    ("int3.g32*fp16", "fp16", 256, "word32", NumericsClass.FP32_ACC),
    ("int5.row*fp32", "bf16", 97, "canonical", NumericsClass.FP32_ACC),
    ("int8.row*fp32", "bf16", 256, "canonical", NumericsClass.FP32_ACC),
    ("int8.g128*bf16", "bf16", 200, "canonical", NumericsClass.FP32_ACC),
    ("uint8-uint8.g64*fp16", "bf16", 256, "canonical", NumericsClass.FP32_ACC),
    ("int8.tensor*fp32", "bf16", 256, "canonical", NumericsClass.FP32_ACC),
    ("e4m3fn.row*fp32", "bf16", 256, "canonical", NumericsClass.FP32_ACC),
    ("e4m3fn.128x128*fp32", "bf16", 320, "canonical", NumericsClass.FP32_ACC),
    ("e4m3fnuz.row*fp32", "bf16", 256, "canonical", NumericsClass.FP32_ACC),
    ("e5m2.row*fp32", "fp16", 256, "canonical", NumericsClass.FP32_ACC),
    ("e5m2fnuz.row*fp32", "bf16", 256, "canonical", NumericsClass.FP32_ACC),
    ("e2m1.g32*e8m0", "bf16", 256, "word32", NumericsClass.FP32_ACC),
    ("e3m2.g32*e8m0", "bf16", 256, "canonical", NumericsClass.FP32_ACC),
    ("e2m3.g32*e8m0", "bf16", 256, "canonical", NumericsClass.FP32_ACC),
    ("e2m1.g16*(e4m3fn.tensor*fp32)", "bf16", 256, "word16", NumericsClass.FP32_ACC),
    ("e2m1.g16*(e4m3fn.row*fp32)", "bf16", 256, "word16", NumericsClass.FP32_ACC),
    ("e2m1.g16*(e4m3fn.tensor/fp32)", "bf16", 256, "word16", NumericsClass.FP32_ACC),
    ("int8.row*(fp32.tensor/fp32)", "fp16", 256, "canonical", NumericsClass.FP32_ACC),
    ("uint4.g32*(uint6.g8*fp16)-(uint6.g8*fp16)", "bf16", 512, "word32", NumericsClass.DEQUANT_16),
    ("int6.g16*(int8.g16*fp16)", "bf16", 512, "canonical", NumericsClass.FP32_ACC),
    ("nf4.flat64*(lut8.flat256*fp32+fp32)", "bf16", 256, "word32", NumericsClass.DEQUANT_16),
    ("e4m3fn.row*bf16%2:4", "bf16", 256, "canonical", NumericsClass.FP32_ACC),
    ("e2m1.g32*(e8m0.g16*fp32)", "bf16", 512, "word32", NumericsClass.FP32_ACC),
    ("e2m1.g32*(e8m0.g16*fp32)", "e2m1.g32*(e8m0.g16*fp32)", 1024, "word32", NumericsClass.FP32_ACC),
    ("fp32", "fp32", 97, "canonical", NumericsClass.FP32_ACC),
    ("bf16", "fp32", 64, "canonical", NumericsClass.FP32_ACC),
    ("nf4.g64*fp32", "bf16", 256, "word32", NumericsClass.DEQUANT_16),
    ("nf4.flat64*fp32", "bf16", 256, "word32", NumericsClass.DEQUANT_16),
    (ROW, ROW, 97, "canonical", NumericsClass.FP32_ACC),
    (ROW, "int8.tensor*fp32", 256, "canonical", NumericsClass.FP32_ACC),
    (ROW, "int8-int8.row*fp32", 97, "canonical", NumericsClass.FP32_ACC),
    (ROW, "int8-fp32.row*fp32", 97, "canonical", NumericsClass.FP32_ACC),
    ("uint4-uint4.g32*fp16", "uint8-fp32.row*fp32", 96, "canonical", NumericsClass.FP32_ACC),
    ("int8.row*(fp32.tensor/fp32)", "int8-fp32.row*fp32", 97, "canonical", NumericsClass.FP32_ACC),
    ("e2m1.g16*(e4m3fn.tensor/fp32)", "e2m1.g16*(e4m3fn.tensor/fp32)", 256, "word16", NumericsClass.FP32_ACC),
    ("uint8-uint8.row*fp32", "uint8-uint8.row*fp32", 97, "canonical", NumericsClass.FP32_ACC),
    ("uint4-uint4.g32*fp16", "uint8-uint8.row*fp32", 96, "canonical", NumericsClass.FP32_ACC),
    ("int4.g32*bf16", ROW, 256, "word32", NumericsClass.FP32_ACC),
    ("int4.g16*bf16", ROW, 256, "word16", NumericsClass.FP32_ACC),
    ("int4.g128*bf16", FP8, 256, "nibble128", NumericsClass.REDUCED_ACC),
    ("int4.g128*bf16", FP8, 384, "nibble64", NumericsClass.REDUCED_ACC),
    ("int4.g128*fp16", "e4m3fn.g128*fp32", 512, "nibble128", NumericsClass.REDUCED_ACC),
    ("int4.g96*bf16", FP8, 192, "nibble32", NumericsClass.REDUCED_ACC),
    ("int4.g32*bf16", FP8, 96, "canonical", NumericsClass.REDUCED_ACC),
    ("int4.g64*bf16", FP8, 130, "nibble", NumericsClass.REDUCED_ACC),
    ("int4.row*fp32", FP8, 512, "nibble128", NumericsClass.REDUCED_ACC),
    ("int4.g16*bf16", FP8, 256, "word16", NumericsClass.FP32_ACC),
    ("uint4-uint4.g128*bf16", FP8, 256, "word32", NumericsClass.FP32_ACC),
    ("int3.g32*fp16", FP8, 256, "nibble32", NumericsClass.REDUCED_ACC),
    ("e2m1.g32*e8m0", FP8, 256, "nibble32", NumericsClass.REDUCED_ACC),
    ("e2m1.row*fp32", "e4m3fn.tensor*fp32", 96, "nibble", NumericsClass.REDUCED_ACC),
    (FP8, FP8, 97, "canonical", NumericsClass.REDUCED_ACC),
    ("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32", 320, "canonical", NumericsClass.REDUCED_ACC),
    ("e4m3fn.g32*e8m0", "e4m3fn.g32*e8m0", 256, "canonical", NumericsClass.REDUCED_ACC),
    ("e2m1.g32*e8m0", "e4m3fn.g32*e8m0", 256, "nibble32", NumericsClass.REDUCED_ACC),
    ("e2m1.g32*e8m0", "e2m1.g32*e8m0", 256, "word32", NumericsClass.FP32_ACC),
    ("e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*(e4m3fn.tensor*fp32)", 256, "word16", NumericsClass.FP32_ACC),
]
"""weight, x, K, the layout that is kept, the class"""


@pytest.mark.parametrize("target", [HOPPER] + [CDNA] * (DEVICE == "cpu"), ids=lambda target: target.arch)
@pytest.mark.parametrize(("w", "x", "k", "layout", "numerics"), TAKEN, ids=[f"{t[0]}~{t[1]}-{t[2]}" for t in TAKEN])
def test_a_format_is_taken_and_right(
    w: str, x: str, k: int, layout: str, numerics: NumericsClass, target: Target
) -> None:
    ops, request = Emulated(target), request_of(w, x, k=k, n=33, bias=True)
    answer = ops.supports(replace(request, graph=True))
    assert answer.level == "full" and answer.graph and "Triton" in answer.executes
    other = target is CDNA and answer.numerics == NumericsClass.FP32_ACC
    assert answer.numerics == numerics or other
    assert answer.layouts == (layout,) or (other and numerics == NumericsClass.REDUCED_ACC)
    y, expected = product_and_reference(ops, request, 5)
    assert (y - expected).norm() <= 2.0**-7 * expected.norm()


@pytest.mark.parametrize("k", [256, 160])
@pytest.mark.parametrize("w", ["int4.g32*bf16", "uint4-uint4.g32*fp16", "int8.g32*bf16"])
def test_columns_in_any_order_of_groups(w: str, k: int) -> None:
    y, expected = product_and_reference(OPS, request_of(w, k=k, group_index=True), 3)
    assert (y - expected).norm() <= 2.0**-7 * expected.norm()


def test_a_weight_rounded_to_the_operand_of_the_product() -> None:
    request = request_of("int4.g32*bf16", FP8, operand=Format.parse(FP8))
    y, expected = product_and_reference(OPS, request, 3)
    assert (y - expected).norm() <= 2.0**-7 * expected.norm()


@pytest.mark.parametrize(
    "request_",
    [
        request_of("bf16"),
        request_of("int4.g32*bf16", numerics=NumericsClass.EXACT),
        request_of("nf4.g64*fp32", numerics=NumericsClass.FP32_ACC),
        request_of("uint4-fp16.g32*fp16", ROW),
        request_of("int4.g24*bf16", k=240),
        request_of("int4.col*bf16"),
        request_of("int4.g32/bf16"),
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_portable(request_: GemmRequest) -> None:
    assert plan(request_, HOPPER) is None or request_.w.plain  # type: ignore[union-attr]
    assert "Triton" not in OPS.supports(request_).executes


@pytest.mark.parametrize(("w", "x"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("bf16", "fp16")])
def test_plain_products_where_no_library_leaves_its_sums_in_fp32(w: str, x: str) -> None:
    request = request_of(w, x, n=33, bias=True)
    answer = Emulated(CDNA).supports(request)
    assert "Triton" in answer.executes and "Triton" not in Emulated(HOPPER).supports(request).executes
    assert answer.numerics == (NumericsClass.FP32_ACC if w == x else NumericsClass.DEQUANT_16)
    y, expected = product_and_reference(Emulated(CDNA), request, 5)
    assert (y - expected).norm() <= 2.0**-7 * expected.norm()


def test_an_instruction_of_coarser_sums_is_not_taken_where_it_is_not_allowed() -> None:
    strict = plan(request_of(FP8, FP8, numerics=NumericsClass.FP32_ACC), HOPPER)
    assert strict is not None and [s.type for s in strict.specs] == ["bf16"]


@pytest.mark.parametrize("w", ["int4.g32*bf16", "nf4.g64*fp32", "e2m1.g16*(e4m3fn.tensor*fp32)", "e4m3fn.128x128*fp32"])
@pytest.mark.parametrize("m", [80, DENSE_FROM[1]])
def test_many_rows_are_multiplied_with_a_decoded_weight(w: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix_product(monkeypatch)
    request = request_of(w, n=16, k=128, m=(1, 4096), bias=True)
    assert OPS.supports(request).numerics == NumericsClass.DEQUANT_16
    y, expected = product_and_reference(OPS, request, m)
    assert (y - expected).norm() <= 2.0**-7 * expected.norm()


@pytest.mark.parametrize("w", ["int8.row*bf16", "e4m3fn.row*bf16", "e3m2.row*bf16"])
@pytest.mark.parametrize("m", [SHORT_FROM - 1, SHORT_FROM])
def test_codes_in_bytes_take_longer_steps_at_few_rows(w: str, m: int) -> None:
    """On Hopper, where a tile of many rows has no memory for them; the class is the same."""
    request = request_of(w, n=48, k=256, m=(1, 256), out=torch.float32, numerics=NumericsClass.FP32_ACC)
    made = plan(request, HOPPER)
    assert made is not None and made.many is not None and not made.packed and made.many_from == SHORT_FROM
    assert (made.specs[0].chunk, made.many.chunk, made.numerics) == (128, 64, NumericsClass.FP32_ACC)
    assert plan(replace(request, batch_invariant=True), HOPPER).many is None  # type: ignore[union-attr]
    assert plan(replace(request, m=(1, SHORT_FROM - 1)), HOPPER).many is None  # type: ignore[union-attr]
    groups = plan(replace(request, w=Format.parse(w.replace("row", "g128"))), HOPPER)
    assert groups is not None and groups.specs[0].chunk == 64 and groups.many is None
    y, expected = product_and_reference(OPS, request, m)
    assert (y - expected).norm() <= 2.0**-20 * expected.norm()


@pytest.mark.parametrize(
    ("w", "x", "least"),
    [
        ("int4.g128*bf16", "bf16", 65),
        ("uint4-uint4.g128*fp16", "fp16", 65),
        ("int4.g32*bf16", "bf16", 33),
        ("e2m1.g32*e8m0", "bf16", 33),
        ("int4.g128*fp32", "bf16", None),  # the scale is not of x's type: rounded twice
        ("e2m1.g32*e8m0", "fp16", None),
        ("e2m1.g16*(e4m3fn.tensor*fp32)", "bf16", None),
        ("nf4.g64*fp32", "bf16", None),
        ("int8.g128*bf16", "bf16", None),
    ],
)
def test_weights_of_many_rows_are_rounded_once(w: str, x: str, least: int | None) -> None:
    """To what `dequantize` rounds them to: the numbers are those of a 16-bit weight, sums in fp32."""
    request = request_of(w, x, n=48, k=512, m=(1, 128), out=torch.float32)
    made = plan(request, HOPPER)
    assert made is not None and (made.many is None) == (least is None)
    if least is None:
        return
    assert made.many_from == least and made.many is not None and made.many.packed
    assert plan(replace(request, m=(1, least - 1)), HOPPER).many is None  # type: ignore[union-attr]
    assert plan(replace(request, batch_invariant=True), HOPPER).many is None  # type: ignore[union-attr]
    assert plan(replace(request, numerics=NumericsClass.FP32_ACC), HOPPER).many is None  # type: ignore[union-attr]
    weight = datasets.weight("t", "w", request.w, 48, 512, "normal")  # type: ignore[arg-type]
    kind = torch.bfloat16 if x == "bf16" else torch.float16
    rows = torch.randn(least, 512, generator=torch.Generator().manual_seed(0)).to(kind)
    y = OPS.gemm(rows.to(DEVICE), OPS.prepare(weight.to(DEVICE), request)).cpu().double()
    rounded = weight.dequantize(kind).double()
    exact, size = rows.double() @ rounded.T, rows.double().abs() @ rounded.abs().T
    assert bool(((y - exact).abs() <= (request.k + 4) * 2.0**-24 * size).all())


def test_a_weight_that_fp16_cannot_hold_is_refused_where_many_rows_round_it() -> None:
    f = Format.parse("int4.g128*fp16")
    w = QTensor(f, torch.full((16, 256), 7, dtype=torch.int8), torch.full((16, 2), 20000.0, dtype=torch.float16))
    few, many = (request_of("int4.g128*fp16", "fp16", n=16, m=(1, most)) for most in (64, 65))
    OPS.prepare(w.to(DEVICE), few)
    with pytest.raises(qhal.FormatError, match="magnitude 140000 overflows fp16"):
        OPS.prepare(w.to(DEVICE), many)


def test_rows_do_not_depend_on_their_number_if_that_is_asked() -> None:
    request = request_of("int4.g32*bf16", batch_invariant=True, m=(1, 4096))
    answer = OPS.supports(request)
    assert answer.batch_invariant and "torch.mm" not in answer.executes
    weight = datasets.weight("t", "w", request.w, request.n, request.k, "normal")  # type: ignore[arg-type]
    prepared = OPS.prepare(weight.to(DEVICE), request)
    x = torch.randn(70, request.k, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    whole = OPS.gemm(x, prepared)
    assert torch.equal(OPS.gemm(x[:1], prepared), whole[:1]) and torch.equal(OPS.gemm(x[20:69], prepared), whole[20:69])


@pytest.mark.parametrize("w", [ROW, "uint8-uint8.row*fp32", "int4.g32*bf16"])
@pytest.mark.parametrize("zero", [-3.0, 2.5, 127.49999, -200.25, 70000.125])
def test_zero_points_of_x_need_not_be_whole_numbers(w: str, zero: float) -> None:
    """Within fp32 sums of the product of decoded operands, however far the zero point is from every code."""
    x = Format.parse("int8-fp32.tensor*fp32")
    request = replace(request_of(w, n=33), x=(x,), static=(True,), out=torch.float32)
    assert "exact int32 sums" in OPS.supports(request).executes
    weight = datasets.weight("t", "w", request.w, 33, 256, "normal")  # type: ignore[arg-type]
    operand = Operand(x, torch.tensor([0.03], device=DEVICE), torch.tensor([zero], device=DEVICE))
    prepared = OPS.prepare(weight.to(DEVICE), request, inputs=(operand,))
    rows = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) * 0.8 - 0.03 * max(min(zero, 128.0), -128.0)
    q = OPS.quantize(rows.bfloat16().to(DEVICE), operand).to("cpu").dequantize().double()
    value = weight.dequantize().double()
    far = (OPS.gemm(rows.bfloat16().to(DEVICE), prepared).cpu().double() - q @ value.T).abs()
    assert bool((far <= (2 * 256**0.5 + 4) * 2.0**-24 * (q.abs() @ value.T.abs())).all())


def test_a_zero_point_that_is_no_number_stays_one() -> None:
    x = Format.parse("int8-fp32.row*fp32")
    request = request_of(ROW, str(x), out=torch.float32)
    prepared = OPS.prepare(datasets.weight("t", "w", request.w, 48, 256, "normal").to(DEVICE), request)  # type: ignore[arg-type]
    zero = torch.tensor([[torch.nan], [1.0]], device=DEVICE)
    q = QTensor(x, torch.ones(2, 256, dtype=torch.int8, device=DEVICE), torch.ones(2, 1, device=DEVICE), zero)
    y = OPS.gemm(q, prepared)
    assert bool(y[0].isnan().all()) and not y[1].any()


@pytest.mark.parametrize("w", ["int4.g32*bf16", "uint4-uint4.g32*fp16", "int8.row*fp32", *MADE_PLANES])
def test_a_refit_changes_what_a_graph_reads(w: str) -> None:
    request = request_of(w, bias=True)
    old, new = (datasets.weight("t", name, request.w, 48, 256, "normal").to(DEVICE) for name in ("old", "new"))  # type: ignore[arg-type]
    prepared = OPS.prepare(old, request, bias=torch.zeros(48))
    held = prepared.run  # type: ignore[attr-defined]
    OPS.prepare(new, request, bias=torch.ones(48), into=prepared)
    fresh = OPS.prepare(new, request, bias=torch.ones(48))
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    assert torch.equal(held(x, 0, None), OPS.gemm(x, fresh))
    assert prepared.tensors().keys() == fresh.tensors().keys()
    assert {name for name in fresh.tensors() if name.startswith("made.")} == MADE_PLANES.get(w, set())
    back = OPS.restore(prepared)
    assert isinstance(back, QTensor) and back.equal(new)


@pytest.mark.parametrize("k", [256, 8192])
def test_the_result_is_written_where_it_is_wanted(k: int) -> None:
    """k: one part, and several that are summed."""
    request = request_of(ROW, k=k)
    prepared = OPS.prepare(datasets.weight("t", "w", request.w, 48, k, "normal").to(DEVICE), request)  # type: ignore[arg-type]
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    room = torch.full((3, 100), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    y = OPS.gemm(x, prepared, out=room[:, 20:68])
    assert y.data_ptr() == room[:, 20:].data_ptr() and torch.equal(y, OPS.gemm(x, prepared))
    assert bool(room[:, :20].isnan().all()) and bool(room[:, 68:].isnan().all())
    with pytest.raises(qhal.FormatError, match=r"out is torch\.float32"):
        OPS.gemm(x, prepared, out=room[:, :48].float())


@pytest.mark.parametrize("target", [HOPPER, CDNA], ids=["sm_90", "gfx942"])
@pytest.mark.parametrize("w", ["int4.g128*bf16", "int4.g32*bf16", "int8.row*fp32", "e4m3fn.row*fp32"])
def test_tiles_have_room(w: str, target: Target) -> None:
    for x in ("bf16", "fp32", ROW):
        made = plan(request_of(w, x, n=8192, k=8192), target)
        assert made is not None
        for m in (1, 16, 17, 64, 65, 200, 5000):
            for spec in (made.specs[0], *([] if made.many is None else [made.many])):
                c = config(spec, m, 8192, 32, target)
                assert memory(spec, c.bm, c.bn, c.stages) <= target.shared
                assert c.parts == 1 or m <= 256


def test_another_type_of_x_is_refused() -> None:
    request = request_of("int4.g32*bf16")
    prepared = OPS.prepare(datasets.weight("t", "w", request.w, 48, 256, "normal").to(DEVICE), request)  # type: ignore[arg-type]
    with pytest.raises(qhal.FormatError, match=r"x arrives as torch.float32, the weight was prepared for gemm x=bf16"):
        OPS.gemm(torch.zeros(2, 256, device=DEVICE), prepared)


def test_a_weight_that_half_cannot_hold_is_refused_when_many_rows_are_announced() -> None:
    f = Format.parse("int8.row*fp32")
    w = QTensor(f, torch.full((48, 256), 100, dtype=torch.int8), torch.full((48, 1), 1e4))
    with pytest.raises(qhal.FormatError, match="overflows fp16"):
        OPS.prepare(w.to(DEVICE), request_of(ROW, "fp16", m=(1, 4096)))
    small = QTensor(f, w.codes, torch.ones(48, 1)).to(DEVICE)
    prepared = OPS.prepare(small, request_of(ROW, "fp16", m=(1, 4096)))
    with pytest.raises(qhal.FormatError, match="overflows fp16"):
        OPS.prepare(w.to(DEVICE), request_of(ROW, "fp16", m=(1, 4096)), into=prepared)
    kept = OPS.restore(prepared)
    assert isinstance(kept, QTensor) and torch.equal(kept.scale, small.scale)  # type: ignore[arg-type]
    few = OPS.prepare(w.to(DEVICE), request_of(ROW, "fp16", out=torch.float32))
    y = OPS.gemm(torch.ones(1, 256, dtype=torch.float16, device=DEVICE), few)
    assert torch.equal(y.cpu(), torch.full((1, 48), 256e6))
