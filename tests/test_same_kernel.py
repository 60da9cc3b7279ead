"""int4 g128 from AWQ, GPTQ and compressed-tensors: one kernel, one layout, one meaning, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qhal
from qhal import Format, GemmRequest, LinearSpec, QTensor
from qhal.layers import gemm_request, prepare_linear
from qhal_schemes import Checkpoint, open_checkpoint

CASES = {
    "awq/autoawq_b4_g128_gemm": "uint4-uint4.g128*fp16",
    "gptq/b4_g128_sym_v1": "uint4-uint4.g128*fp16",
    "compressed_tensors/w4a16_g128_sym": "int4.g128*bf16",
}


def _open(golden: Path, case: str) -> tuple[Checkpoint, str]:
    """The checkpoint and its first quantized module."""
    ckpt = open_checkpoint(golden / case / "checkpoint")
    return ckpt, ckpt.modules(quantized=True)[0]


def test_the_three_families_reach_the_same_kernel_and_layout(golden: Path) -> None:
    ops = qhal.select("cpu_reference")
    specs = {case: ckpt.spec(module) for case in CASES for ckpt, module in [_open(golden, case)]}
    assert {case: str(spec.format.weight) for case, spec in specs.items()} == CASES
    layers = [prepare_linear(spec, ops, dtype=torch.bfloat16) for spec in specs.values()]
    supports = [layer.weight.support for layer in layers]
    assert len({s.executes for s in supports}) == 1
    assert len({s.layouts for s in supports}) == 1
    assert len({s.numerics for s in supports}) == 1
    assert len({type(layer.weight) for layer in layers}) == 1
    codes = [next(t for name, t in layer.weight.tensors().items() if name.endswith("codes")) for layer in layers]
    assert len({(t.dtype, t.dim()) for t in codes}) == 1


def test_the_same_numbers_in_three_dresses_give_the_same_bits() -> None:
    """One weight written by hand in all three conventions: signed, unsigned with zero 8, unsigned fp16 with zero 8."""
    generator = torch.Generator().manual_seed(3)
    signed = torch.randint(-8, 8, (48, 256), generator=generator, dtype=torch.int8)
    scale = torch.rand(48, 2, generator=generator).to(torch.bfloat16)
    unsigned, eight = (signed.short() + 8).to(torch.uint8), torch.full((48, 2), 8, dtype=torch.uint8)
    dresses = [
        QTensor(Format.parse("int4.g128*bf16"), signed, scale),
        QTensor(Format.parse("uint4-uint4.g128*bf16"), unsigned, scale, eight),
        QTensor(Format.parse("uint4-uint4.g128*fp32"), unsigned, scale.float(), eight),
    ]
    x = torch.randn(5, 256, generator=generator).to(torch.bfloat16)
    ops = qhal.select("cpu_reference")
    results = [prepare_linear(LinearSpec(w), ops)(x) for w in dresses]
    assert all(torch.equal(results[0], y) for y in results[1:])


@pytest.mark.parametrize("case", CASES)
def test_the_plan_names_the_kernel_that_runs(golden: Path, case: str) -> None:
    ckpt, module = _open(golden, case)
    ops = qhal.select("cpu_reference")
    plan = qhal.resolve(ckpt, ops)
    layer = ckpt.load_linear(module, ops)
    assert isinstance(layer.weight.request, GemmRequest)
    assert layer.weight.request == gemm_request(ckpt.format(module), ckpt.dtype)
    entry = next(e for e in plan.entries if module in e.layers)
    assert entry.request == layer.weight.request
    assert entry.support.executes == layer.weight.support.executes
