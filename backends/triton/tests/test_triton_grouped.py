"""Grouped products by the kernels (level L2 where no GPU is): forms of groups, activations, what must not leak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton_ops import DEVICE, HOPPER, Emulated

from qhal.errors import BatchError, FormatError
from qhal.formats import Format
from qhal.groups import Groups, Indexed, Masked, Offsets
from qhal.layer_formats import Activation
from qhal.requests import GemmRequest, GroupedRequest, NumericsClass
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance import datasets
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_cpu_reference.ops import CpuReference
from qhal_portable.prepared import PreparedWeight
from qhal_triton.gemm.launch import Bound, Rows
from qhal_triton.grouped.kernels.order import order
from qhal_triton.grouped.paths import plan

OPS, REFERENCE = Emulated(), CpuReference()
EXPERTS, N, K = 5, 70, 128  # tiles of N have a tail; even, since gate and up are halves
ROW = "int8.row*fp32"
CASES = {c.id: c for c in catalogue(0) if c.operation == "grouped_gemm" and OPERATIONS[c.operation].request(c)}
WANTED = ("masked+full", "indexed+weights", "indexed+nowhere", "offsets+spare", "static", "q=", "swiglu")


def chosen() -> list[Case]:
    """One case of the suite for each thing that may be asked; interpreters are slow."""
    found = {}
    for word in WANTED:
        found[word] = next(c for c in CASES.values() if word in c.id)
    return list(found.values())


@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.id)
def test_a_case_of_the_suite(case: Case) -> None:
    request = OPERATIONS["grouped_gemm"].request(case)
    assert isinstance(request, GroupedRequest) and plan(request, HOPPER) is not None
    record = run_case(case, OPS)
    assert record.outcome.status is Status.PASS, record.outcome.reason


def experts(name: str) -> QTensor | torch.Tensor:
    parts = [datasets.weight("grouped", f"w{e}", Format.parse(name), N, K, "normal") for e in range(EXPERTS)]
    return torch.stack([p.codes for p in parts]) if name in ("bf16", "fp16") else QTensor.stack(parts)


def request_of(w: str, x: str, form: Any, **more: Any) -> GroupedRequest:
    static = more.pop("static", ())
    gemm = GemmRequest(w=Format.parse(w), n=N, k=K, x=(Format.parse(x),), m=(0, 64), bias=True, static=static)
    return GroupedRequest(gemm=gemm, experts=EXPERTS, groups=form, **more)


def both(request: GroupedRequest, x: torch.Tensor, groups: Groups, inputs: tuple[Operand, ...] = ()) -> None:
    """The kernel's result against the reference's, to the rounding of bf16."""
    w, bias = experts(str(request.gemm.w)), torch.randn(EXPERTS, N, generator=torch.Generator().manual_seed(1))
    answer = OPS.supports(request)
    assert "tiles of experts" in answer.executes and answer.graph and answer.level == "full"
    expected = REFERENCE.grouped_gemm(x, REFERENCE.prepare(w, request, bias=bias, inputs=inputs), groups)
    placed: Groups
    if isinstance(groups, Offsets):
        placed = Offsets(groups.offsets.to(DEVICE))
    elif isinstance(groups, Masked):
        placed = Masked(groups.counts.to(DEVICE))
    else:
        weights = None if groups.weights is None else groups.weights.to(DEVICE)
        placed = Indexed(groups.ids.to(DEVICE), weights, groups.pairs)
    prepared = OPS.prepare(w.to(DEVICE), request, bias=bias, inputs=inputs)
    y = OPS.grouped_gemm(x.to(DEVICE), prepared, placed)
    assert isinstance(y, torch.Tensor) and isinstance(expected, torch.Tensor) and y.dtype == expected.dtype
    got, must = y.float().cpu(), expected.float()
    assert (got - must).norm() <= 2.0**-7 * must.norm() and torch.equal((got == 0).all(-1), (must == 0).all(-1))
    target = torch.full_like(y, float("nan"))
    assert OPS.grouped_gemm(x.to(DEVICE), prepared, placed, out=target) is target and torch.equal(target, y)


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(seed)).bfloat16()


FORMATS = [
    ("int4.g32*bf16", "bf16"),
    ("uint4-uint4.g64*fp16", "bf16"),
    (ROW, ROW),
    ("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32"),
    ("int4.g128*bf16", "e4m3fn.row*fp32"),
    ("e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*(e4m3fn.tensor*fp32)"),
    ("bf16", "bf16"),
]


@pytest.mark.parametrize(("w", "x"), FORMATS, ids=[f"{w}~{x}" for w, x in FORMATS])
def test_rows_sorted_by_expert(w: str, x: str) -> None:
    inputs = () if x == "bf16" else (Operand(Format.parse(x)),)
    offsets = Offsets(torch.tensor([0, 3, 3, 21, 22, 22], dtype=torch.int32))
    both(request_of(w, x, "offsets"), rows(25), offsets, inputs)


def test_rows_past_a_count_do_not_leak() -> None:
    x = rows(EXPERTS * 18).reshape(EXPERTS, 18, K)
    counts = torch.tensor([18, 0, 1, 17, 2], dtype=torch.int32)
    for e, count in enumerate(counts.tolist()):
        x[e, count:] = torch.nan
    both(request_of(ROW, "int8.tensor*fp32", "masked"), x, Masked(counts), (Operand(Format.parse("int8.tensor*fp32")),))
    both(request_of("int4.g32*bf16", "bf16", "masked"), x, Masked(counts))


IDS = torch.tensor([[4, 0], [-1, 2], [0, 4], [2, -1], [-1, -1], [3, 0]], dtype=torch.int32)


@pytest.mark.parametrize("ids", [IDS, IDS.long()], ids=["int32", "int64"])
@pytest.mark.parametrize("weighted", [False, True])
def test_tokens_that_name_their_experts(ids: torch.Tensor, weighted: bool) -> None:
    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(2)) if weighted else None
    request = request_of("int4.g32*bf16", "bf16", "indexed", top_k=2)
    both(request, rows(6), Indexed(ids, weights))
    both(request, rows(12), Indexed(ids, weights, pairs=True))


@pytest.mark.parametrize(
    "activation",
    [
        Activation("silu"),
        Activation("gelu", gated=False),
        Activation("gelu_tanh"),
        Activation("relu2", gated=False),
        Activation("swiglu", alpha=1.702, limit=0.5, shift=1.0),
    ],
    ids=lambda a: a.name,
)
def test_activations(activation: Activation) -> None:
    request = request_of("int4.g32*bf16", "bf16", "offsets", activation=activation)
    both(request, rows(9), Offsets(torch.tensor([0, 3, 3, 7, 8, 9], dtype=torch.int32)))


NVFP4 = "e2m1.g16*(e4m3fn.tensor*fp32)"


@pytest.mark.parametrize("form", ["offsets", "masked", "indexed"])
@pytest.mark.parametrize(
    ("w", "x"),
    [(ROW, "int8.tensor*fp32"), (NVFP4, NVFP4), (NVFP4.replace("*fp32", "/fp32"), NVFP4.replace("*fp32", "/fp32"))],
)
def test_a_static_scale_for_each_expert(w: str, x: str, form: Any) -> None:
    f = Format.parse(x)
    scale = torch.linspace(0.01, 0.05, EXPERTS).reshape(-1, 1)
    scale = 2.0 / scale if "/" in x else scale
    request = request_of(w, x, form, static=(True,), top_k=2)
    inputs = (Operand(f, scale, per_expert=True),)
    if form == "masked":
        both(request, rows(15).reshape(5, 3, K), Masked(torch.tensor([3, 0, 1, 2, 2], dtype=torch.int32)), inputs)
    elif form == "indexed":
        both(request, rows(6), Indexed(IDS), inputs)
    else:
        both(request, rows(11), Offsets(torch.tensor([0, 3, 3, 7, 8, 9], dtype=torch.int32)), inputs)


def test_no_row_at_all() -> None:
    both(request_of("int4.g32*bf16", "bf16", "offsets"), rows(0), Offsets(torch.zeros(6, dtype=torch.int32)))
    none = Indexed(torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2))
    both(request_of("int4.g32*bf16", "bf16", "indexed", top_k=2), rows(0), none)


@pytest.mark.parametrize("pairs", [1, 7, 1500])
def test_pairs_are_sorted_by_expert_and_keep_their_order(pairs: int) -> None:
    ids = torch.randint(-1, EXPERTS, (pairs,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    starts = torch.empty(EXPERTS + 1, dtype=torch.int32, device=DEVICE)
    found = torch.empty(pairs, dtype=torch.int32, device=DEVICE)
    order[(EXPERTS + 1,)](ids.to(DEVICE), starts, found, pairs, EXPERTS, BLOCK=1024)
    keys = torch.where(ids < 0, EXPERTS, ids)
    assert torch.equal(found.cpu().long(), torch.argsort(keys, stable=True))
    assert torch.equal(starts.cpu(), torch.tensor([int((keys < e).sum()) for e in range(EXPERTS + 1)]).int())


def test_few_experts_with_many_rows_are_not_cut_into_parts() -> None:
    request = request_of(ROW, ROW, "offsets")
    made = plan(request, HOPPER)
    assert made is not None
    prepared = OPS.prepare(experts(ROW).to(DEVICE), request, bias=torch.zeros(EXPERTS, N))
    assert isinstance(prepared, PreparedWeight)
    bound = Bound(prepared, replace(request.gemm, k=8192), made, HOPPER)
    parts = [bound.tile(made.specs[0], -(-m // EXPERTS), rows_of(m)).parts for m in (8, 1 << 17)]
    assert parts[0] > 1 and parts[1] == 1


def rows_of(m: int) -> Rows:
    return Rows("offsets", torch.empty(0), None, lambda bm: m // bm + EXPERTS + 1, m, m, 1)


def test_ids_are_sorted_again_when_they_change() -> None:
    request = request_of("int4.g32*bf16", "bf16", "indexed", top_k=2)
    w, bias, x = experts("int4.g32*bf16").to(DEVICE), torch.zeros(EXPERTS, N), rows(6).to(DEVICE)
    prepared, groups = OPS.prepare(w, request, bias=bias), Indexed(IDS.to(DEVICE).clone())
    OPS.grouped_gemm(x, prepared, groups)
    groups.ids.copy_(IDS.flip(0))
    y, fresh = OPS.grouped_gemm(x, prepared, groups), OPS.grouped_gemm(x, prepared, Indexed(groups.ids.clone()))
    assert isinstance(y, torch.Tensor) and isinstance(fresh, torch.Tensor) and torch.equal(y, fresh)


def test_ids_of_inference_mode_are_sorted_in_every_call() -> None:
    request = request_of("int4.g32*bf16", "bf16", "indexed", top_k=2)
    with torch.inference_mode():
        groups = Indexed(IDS.to(DEVICE).clone())
        prepared = OPS.prepare(experts("int4.g32*bf16").to(DEVICE), request, bias=torch.zeros(EXPERTS, N))
        x = rows(6).to(DEVICE)
        first = OPS.grouped_gemm(x, prepared, groups)
        groups.ids.copy_(IDS.flip(0))
        second = OPS.grouped_gemm(x, prepared, groups)
        again = OPS.grouped_gemm(x, prepared, Indexed(IDS.flip(0).to(DEVICE)))
    assert torch.equal(second, again) and not torch.equal(first, second)  # type: ignore[arg-type]


def test_sizes_that_do_not_fit_are_one_error() -> None:
    w, bias = experts("int4.g32*bf16").to(DEVICE), torch.zeros(EXPERTS, N)
    x = rows(6).to(DEVICE)
    offsets = OPS.prepare(w, request_of("int4.g32*bf16", "bf16", "offsets"), bias=bias)
    with pytest.raises(BatchError, match="offsets are 5 numbers, must be 6 for 5 experts"):
        OPS.grouped_gemm(x, offsets, Offsets(torch.zeros(5, dtype=torch.int32, device=DEVICE)))
    with pytest.raises(FormatError, match=r"masked groups need \[E, M, K\]"):
        OPS.grouped_gemm(x, offsets, Masked(torch.zeros(5, dtype=torch.int32, device=DEVICE)))
    with pytest.raises(BatchError, match=r"x has 6 rows, ids \(6, 2\) need 12"):
        OPS.grouped_gemm(x, offsets, Indexed(IDS.to(DEVICE), pairs=True))


def test_what_no_kernel_takes_is_portable() -> None:
    exact = request_of("int4.g32*bf16", "bf16", "offsets")
    exact = GroupedRequest(
        gemm=GemmRequest(w=exact.gemm.w, n=N, k=K, x=exact.gemm.x, numerics=NumericsClass.EXACT),
        experts=EXPERTS,
        groups="offsets",
    )
    rowwise = request_of(ROW, "int8.col*fp32", "offsets", static=(True,))
    for request in (exact, rowwise):
        assert plan(request, HOPPER) is None and "Triton" not in OPS.supports(request).executes


def test_weights_of_many_rows_are_rounded_to_bf16_only() -> None:
    """fp16 could overflow, and the weights of all experts are not searched for that when they are prepared."""
    for x, least in (("bf16", 65), ("fp16", None)):
        gemm = GemmRequest(w=Format.parse(f"int4.g128*{x}"), n=64, k=256, x=(Format(x),))
        made = plan(GroupedRequest(gemm=gemm, experts=4, groups="offsets"), HOPPER)
        assert made is not None and not made.dense and (made.many is None) == (least is None)
        assert made.numerics == (NumericsClass.FP32_ACC if least is None else NumericsClass.DEQUANT_16)
