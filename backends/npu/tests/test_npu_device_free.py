"""What needs no operator: no float64 on the device, refits, restored layouts, shards, ModelSlim's static layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import qhal_npu_emulation as emulation
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qhal
from qhal.encoding import encode
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.layers import prepare_linear
from qhal.requests import GemmRequest
from qhal.specs import LinearSpec, Operand
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_npu.ops import NpuOps
from qhal_npu.weights import NpuWeight

CALLED = ("quantize", "gemm", "grouped_gemm", "quant_kv", "attention", "hadamard", "vq_decode")


class NoFloat64(TorchDispatchMode):
    """Fails at the first tensor of float64: on a device there is none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(found):
            assert not (isinstance(t, torch.Tensor) and t.dtype == torch.float64), f"{func} made float64"
        return found


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[QuantOps]:
    """An A5 whose calls may not touch float64; `prepare` may, on the host."""
    ops = emulation.ops("A5")
    for name in CALLED:
        inner = getattr(NpuOps, name)

        def called(self: NpuOps, *args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            with NoFloat64():
                return _inner(self, *args, **kwargs)

        monkeypatch.setattr(NpuOps, name, called)
    yield ops


def test_no_call_computes_in_float64(strict: QuantOps) -> None:
    bad = []
    for case in catalogue(0):
        if not case.required or case.operation in ("comm_quant", "contract"):
            continue
        request = OPERATIONS[case.operation].request(case)
        if request is None or "on the host" in strict.supports(request).executes:
            continue
        outcome = run_case(case, strict).outcome
        if outcome.status in (Status.FAIL, Status.ERROR):
            bad.append(f"{case.id}: {outcome.reason}")
    assert not bad, bad[:5]


def weight(f: str, n: int = 32, k: int = 64, seed: int = 0) -> qhal.QTensor:
    return encode(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), Format.parse(f))


@pytest.mark.parametrize(
    ("w", "x", "arch"),
    [
        ("int8.row*fp32", "int8.row*fp32", "A2"),
        ("int4.row*fp32", "int8.row*fp32", "A2"),
        ("int4.row*fp32", "int4.row*fp32", "A2"),
        ("int8.row*bf16", "bf16", "A2"),
        ("uint4-uint4.g32*bf16@domain=minmax", "bf16", "A2"),
        ("e4m3fn.row*fp32", "e4m3fn.row*fp32", "A5"),
        ("e2m1.g32*e8m0", "e2m1.g32*e8m0", "A5"),
        ("e2m1.g32*e8m0", "e4m3fn.g32*e8m0", "A5"),
        ("nf4_flat64", "bf16", "A2"),
    ],
)
def test_every_layout_is_restored_and_refitted_in_place(w: str, x: str, arch: str) -> None:
    ops, xf = emulation.ops(arch), Format.parse(x)
    request = GemmRequest(w=Format.parse(w), n=32, k=64, x=(xf,))
    inputs = () if xf.plain else (Operand(xf),)
    first, second = weight(w), weight(w, seed=1)
    made = ops.prepare(first, request, inputs=inputs)
    assert isinstance(made, NpuWeight)
    back = ops.restore(made)
    assert isinstance(back, qhal.QTensor)
    assert all(torch.equal(a.view(torch.uint8), first.planes()[k].view(torch.uint8)) for k, a in back.planes().items())
    places = {name: t.data_ptr() for name, t in made.tensors().items()}
    values = torch.randn(3, 64).bfloat16()
    assert ops.prepare(second, request, inputs=inputs, into=made) is made
    assert {name: t.data_ptr() for name, t in made.tensors().items()} == places
    fresh = ops.prepare(second, request, inputs=inputs)
    assert torch.equal(ops.gemm(values, made), ops.gemm(values, fresh))


def test_a_refit_may_change_whether_its_bias_folds() -> None:
    spec, ops = static_spec(), emulation.ops("A2")
    assert spec.bias is not None and spec.input is not None
    request = GemmRequest(w=spec.weight.format, n=32, k=128, x=(spec.input.format,), static=(True,), bias=True)  # type: ignore[union-attr]
    made = ops.prepare(spec.weight, request, inputs=(spec.input,), bias=spec.bias)
    x = torch.randn(5, 128).bfloat16()
    for bias in (spec.bias + 0.3, spec.bias):
        assert ops.prepare(spec.weight, request, inputs=(spec.input,), bias=bias, into=made) is made
        fresh = ops.prepare(spec.weight, request, inputs=(spec.input,), bias=bias)
        assert torch.equal(ops.gemm(x, made), ops.gemm(x, fresh))


def test_a_changed_static_scale_is_no_refit() -> None:
    ops, xf = emulation.ops("A2"), Format.parse("int8.tensor*fp32")
    request = GemmRequest(w=Format.parse("int8.row*fp32"), n=32, k=64, x=(xf,), static=(True,))
    made = ops.prepare(weight("int8.row*fp32"), request, inputs=(Operand(xf, torch.tensor([0.5])),))
    with pytest.raises(qhal.FormatError, match="static scale changed"):
        ops.prepare(weight("int8.row*fp32"), request, inputs=(Operand(xf, torch.tensor([0.25])),), into=made)


def test_a_zero_point_that_is_no_whole_number_is_refused() -> None:
    ops, xf = emulation.ops("A2"), Format.parse("int8-fp32.tensor*fp32")
    request = GemmRequest(w=Format.parse("int8.row*fp32"), n=32, k=64, x=(xf,), static=(True,))
    operand = Operand(xf, torch.tensor([0.5]), torch.tensor([1.5]))
    with pytest.raises(qhal.FormatError, match=r"zero point 1\.5 is no whole number"):
        ops.prepare(weight("int8.row*fp32"), request, inputs=(operand,))


def test_a_foreign_zero_point_may_be_no_whole_number() -> None:
    ops, xf = emulation.ops("A2"), Format.parse("int8-fp32.tensor*fp32")
    request = GemmRequest(w=Format.parse("int8.row*fp32"), n=32, k=64, x=(xf,), static=(True,), out=torch.float32)
    w = weight("int8.row*fp32")
    made = ops.prepare(w, request)
    x = encode(torch.randn(4, 64), xf, scale=torch.tensor([0.02]), zero=torch.tensor([1.5]))
    exact = x.dequantize().double() @ w.dequantize().double().T
    size = x.dequantize().double().abs() @ w.dequantize().double().abs().T
    assert bool(((ops.gemm(x, made) - exact).abs() <= size * 2.0**-20).all())


def static_spec() -> LinearSpec:
    """A layer as ModelSlim's files state it: a bias that is a whole number of deq_scale."""
    xf = Format.parse("int8-fp32.tensor*fp32")
    w = weight("int8.row*fp32", 32, 128)
    scale, zero = torch.tensor([0.04]), torch.tensor([-7.0])
    assert isinstance(w.scale, torch.Tensor)
    steps = torch.arange(-16, 16).double() * 601
    bias = (steps * (w.scale[:, 0] * scale).double()).float()
    return LinearSpec(name="layer", weight=w, input=Operand(xf, scale, zero), bias=bias)


def test_a_bias_of_whole_steps_becomes_quant_bias() -> None:
    layer = prepare_linear(static_spec(), emulation.ops("A2"))
    assert isinstance(layer.weight, NpuWeight)
    assert {"deq_scale.0", "quant_bias.0", "folded.0"} <= set(layer.weight.kernel)
    other = static_spec()
    assert other.bias is not None
    moved = LinearSpec(name="l", weight=other.weight, input=other.input, bias=other.bias + 0.3)
    plain = prepare_linear(moved, layer.ops)
    assert isinstance(plain.weight, NpuWeight)
    assert "folded.0" not in plain.weight.kernel  # added in fp32 after the int32 sums
    x = torch.randn(5, 128).bfloat16()
    assert torch.allclose(plain(x).float() - layer(x).float(), torch.tensor(0.3), atol=0.5)


def test_shards_of_a_static_layer_add_up() -> None:
    """Row-parallel: every rank subtracts its own offset, one adds the bias."""
    spec, ops = static_spec(), emulation.ops("A2")
    x = torch.randn(5, 128).bfloat16()
    whole = prepare_linear(spec, ops, dtype=torch.float32)(x.float())
    parts = [
        prepare_linear(spec.shard(1, rank, 2), ops, dtype=torch.float32)(x.float()[:, 64 * rank : 64 * rank + 64])
        for rank in range(2)
    ]
    assert torch.allclose(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-3)


def test_scale_bias_of_shards_adds_up() -> None:
    ops, xf = emulation.ops("A2"), Format.parse("int8.row*fp32")
    w = weight("int4.row*fp32", 32, 128)
    spec = LinearSpec(name="layer", weight=w, input=Operand(xf))
    whole = prepare_linear(spec, ops).weight
    parts = [prepare_linear(spec.shard(1, rank, 2), ops).weight for rank in range(2)]
    assert isinstance(whole, NpuWeight)
    total = sum(p.kernel["scale_bias"] for p in parts if isinstance(p, NpuWeight))
    assert torch.allclose(torch.as_tensor(total), whole.kernel["scale_bias"], rtol=1e-6)
