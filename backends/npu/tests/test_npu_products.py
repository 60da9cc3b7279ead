"""Which product takes which operator, which demand refuses it, and what is nearest. Needs no device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qhal
from qhal.formats import Format
from qhal.requests import GemmRequest, NumericsClass, QuantizeRequest
from qhal.rules import Rule
from qhal_npu import backend
from qhal_npu.table import DEMANDS, OPERATORS


def asked(w: str, x: str, n: int = 64, k: int = 128, **more: object) -> GemmRequest:
    made = GemmRequest(w=Format.parse(w), n=n, k=k, x=(Format.parse(x),))
    return replace(made, **more)  # type: ignore[arg-type]


def answer(request: GemmRequest, arch: str = "A2") -> qhal.Support:
    return backend().offline(arch).supports(request)


@pytest.mark.parametrize(
    ("w", "x", "arch", "operator"),
    [
        ("int8.row*fp32", "int8.row*fp32", "A2", "npu_quant_matmul -> aclnnQuantMatmulWeightNz"),
        ("int8.row*fp32", "int8.tensor*fp32", "A5", "npu_quant_matmul -> aclnnQuantMatmulWeightNz"),
        ("int4.row*fp32", "int8.row*fp32", "A3", "npu_grouped_matmul"),
        ("int4.row*fp32", "int4.row*fp32", "A3", "npu_quant_matmul"),
        ("int8.row*bf16", "bf16", "A2", "npu_weight_quant_batchmatmul"),
        ("uint4-uint4.g32*fp16", "fp16", "A2", "npu_weight_quant_batchmatmul"),
        ("e4m3fn.row*fp32", "e4m3fn.row*fp32", "A5", "npu_quant_matmul"),
        ("e4m3fn.g32*e8m0", "e4m3fn.g32*e8m0", "A5", "groups [1, 1, 32]"),
        ("e2m1.g32*e8m0", "e2m1.g32*e8m0", "A5", "groups [1, 1, 32]"),
        ("nf4_flat64", "bf16", "A2", "weight decoded to bf16 once"),
        ("bf16", "bf16", "310P", ""),
        ("fp16", "fp16", "310P", "linear in fp16"),
    ],
)
def test_the_plan_names_the_operator(w: str, x: str, arch: str, operator: str) -> None:
    found = answer(asked(w, x, static=("tensor" in x,)), arch)
    assert bool(found) == bool(operator), found.reason
    assert operator in found.executes


@pytest.mark.parametrize(
    ("request_", "arch", "demand"),
    [
        (asked("int8.row*fp32", "int8.row*fp32", n=70000), "A2", "last-axis"),
        (asked("int8.g128*fp32", "int8.row*fp32"), "A2", "one-scale-each"),
        (asked("int8-fp32.row*fp32", "int8.row*fp32"), "A2", "one-scale-each"),
        (asked("int8.row*fp32", "int8-int8.row*fp32@domain=minmax"), "A2", "one-scale-each"),
        (asked("e4m3fn.row*fp32", "e4m3fn.row*fp32"), "A3", "generation"),
        (asked("e4m3fn.g32*e8m0", "e4m3fn.g32*e8m0"), "A2", "generation"),
        (asked("int8.row*fp32", "int8.row*fp32"), "310P", "generation"),
        (asked("e2m1.g32*e8m0", "e2m1.g32*e8m0", k=63), "A5", "mx-even"),
    ],
)
def test_quantized_inputs_are_refused_by_name_with_something_near(
    request_: GemmRequest, arch: str, demand: str
) -> None:
    found = answer(request_, arch)
    assert not found
    assert f"[{demand}: {DEMANDS[demand]}]" in found.reason
    if demand not in ("generation",):
        assert isinstance(found.nearest, GemmRequest)
        assert answer(found.nearest, arch)


@pytest.mark.parametrize(
    ("request_", "demand"),
    [
        (asked("int4.g256*bf16", "bf16", k=512), "antiquant-int4-group"),
        (asked("int4.g48*bf16", "bf16", k=96), "antiquant-group"),
        (asked("int4.g32*bf16", "fp16"), "antiquant-scale-type"),
        (asked("int8.row*fp32", "bf16"), "antiquant-scale-type"),
        (asked("int8-fp32.row*bf16", "bf16"), "antiquant-scale-type"),
        (asked("int4.g32*bf16", "bf16", n=60), "int4-eights"),
        (asked("int4.g32*bf16", "bf16", group_index=True), "group-index"),
        (asked("int4.g32*fp16", "fp16", bias=True), "antiquant-bias"),
    ],
)
def test_plain_inputs_keep_a_decoded_weight_and_the_plan_says_why(request_: GemmRequest, demand: str) -> None:
    found = answer(request_)
    assert found.level == "conditional"
    assert demand in found.reason
    assert "kept decoded" in found.reason
    assert found.numerics == NumericsClass.DEQUANT_16


@pytest.mark.parametrize(
    ("request_", "arch", "demand"),
    [
        (asked("int4.row*fp32", "int8.row*fp32", bias=True), "A2", "scale-bias"),
        (asked("int4.row*fp32", "int8.row*fp32"), "A5", "generation"),
        (asked("int4.row*fp32", "int4.row*fp32", bias=True), "A3", "no-bias"),
        (asked("int4.row*fp32", "int4.row*fp32", k=100), "A2", "int4-eights"),
        (asked("int4.row*fp32", "int4.row*fp32", n=30), "A2", "int4-eights"),
        (asked("int4.row*fp32", "int4.row*fp32", out=torch.float32), "A2", "int4-out"),
        (asked("int4.row*fp32", "int4.row*fp32"), "A5", "generation"),
    ],
)
def test_int4_codes_that_no_int4_operator_takes_are_kept_as_int8(request_: GemmRequest, arch: str, demand: str) -> None:
    found = answer(request_, arch)
    assert found.executes.startswith("W8A8: npu_quant_matmul")
    assert f"[{demand}: " in found.reason
    assert "kept as int8" in found.reason


def test_weights_off_the_fractal_stay_nd_and_the_plan_says_so() -> None:
    found = answer(asked("int8.row*fp32", "int8.row*fp32", n=48))
    assert found.layouts == ("[K, N]",)
    assert "aclnnQuantMatmulV5" in found.executes


def test_float64_and_graphs_are_refused() -> None:
    assert "no float64" in answer(asked("bf16", "bf16", numerics=NumericsClass.EXACT)).reason
    found = answer(asked("int8.row*fp32", "int8.row*fp32", graph=True))
    assert "NPUGraph" in found.reason
    assert found.nearest is not None


@pytest.mark.parametrize(
    ("name", "static", "arch", "executes", "rule"),
    [
        ("int8.row*fp32", False, "A2", "npu_dynamic_quant", None),
        ("int8.tensor*fp32", True, "A2", "npu_quantize", None),
        ("int8-fp32.tensor*fp32", True, "A3", "npu_quantize", None),
        ("int4.g32*bf16", False, "A2", "qhal.encoding", None),
        ("e4m3fn.g32*e8m0", False, "A5", "npu_dynamic_mx_quant", None),
        ("e4m3fn.g32*e8m0@round=away", False, "A5", "npu_dynamic_mx_quant", Rule()),
        ("e2m1.g32*e8m0@e8m0=over1.75,round=away", False, "A5", "npu_dynamic_mx_quant", Rule(round="away")),
        ("e4m3fn.row*fp32", False, "A2", "", None),
        ("nf4_flat64", False, "A2", "on the host", None),
    ],
)
def test_quantizers(name: str, static: bool, arch: str, executes: str, rule: Rule | None) -> None:
    request = QuantizeRequest(x=torch.bfloat16, format=Format.parse(name), static=static)
    found = backend().offline(arch).supports(request)
    assert bool(found) == bool(executes), found.reason
    assert executes in found.executes
    assert found.rule == rule


def test_a_310p_says_what_is_not_written() -> None:
    ops = backend().offline("310P")
    assert (
        ops.supports(QuantizeRequest(x=torch.float16, format=Format.parse("int8.row*fp32"))).level == "not_implemented"
    )
    assert "linear in fp16" in answer(asked("int4.g32*fp16", "fp16"), "310P").executes
    assert "not documented for 310P" in answer(asked("int4.g32*bf16", "bf16"), "310P").reason


def test_every_line_of_the_table_has_a_source() -> None:
    assert all(line.source and line.aclnn and set(line.on) <= {"A2", "A3", "A5", "310P"} for line in OPERATORS)
