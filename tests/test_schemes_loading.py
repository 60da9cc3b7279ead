"""Loading: checkpoints of three families become layers of one backend; fused, cut and stacked as engines ask for it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qhal
from qhal.interface import QuantOps
from qhal_schemes import open_checkpoint, packing

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
INT4 = ("compressed_tensors/w4a16_g128_sym", "awq/autoawq_b4_g128_gemm", "gptq/b4_g128_sym_v1")


@pytest.fixture(scope="module")
def ops() -> QuantOps:
    return qhal.select("cpu_reference")


@pytest.mark.parametrize("case", [*INT4, "gptq/b4_g128_sym_desc_act_v1"])
def test_a_layer_gives_the_tools_output(golden: Path, ops: QuantOps, case: str) -> None:
    folder = golden / case
    ckpt, expected = open_checkpoint(folder / "checkpoint"), load_file(folder / "expected.safetensors")
    module = f"{ATTENTION}.q_proj"
    layer = ckpt.load_linear(module, ops)
    y = layer(expected[f"{module}.input"].to(ckpt.dtype))
    assert y.dtype == ckpt.dtype
    peak = expected[f"{module}.output"].abs().max()
    assert (y.float() - expected[f"{module}.output"]).abs().max() / peak < 1e-2


@pytest.mark.parametrize("case", INT4)
def test_fused_and_cut_layers_are_the_parts(golden: Path, ops: QuantOps, case: str) -> None:
    ckpt = open_checkpoint(golden / case / "checkpoint")
    names = [f"{ATTENTION}.{p}_proj" for p in "qkv"]
    x = torch.randn(3, ckpt.format(names[0]).k, generator=torch.Generator().manual_seed(0)).to(ckpt.dtype)
    single = [ckpt.load_linear(n, ops)(x) for n in names]
    assert torch.equal(ckpt.load_linear(names, ops)(x), torch.cat(single, -1))
    assert torch.equal(ckpt.load_linear(f"{ATTENTION}.qkv_proj", ops)(x), torch.cat(single, -1))
    ranks = [ckpt.load_linear(names, ops, shard=(0, r, 2))(x) for r in range(2)]
    halves = [torch.cat([y.chunk(2, -1)[r] for y in single], -1) for r in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(ranks, halves, strict=True))


def test_a_column_cut_sums_to_the_layer(golden: Path, ops: QuantOps) -> None:
    ckpt = open_checkpoint(golden / INT4[0] / "checkpoint")
    module = f"{ATTENTION}.q_proj"
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    parts = [
        ckpt.load_linear(module, ops, shard=(1, r, 2), dtype=torch.float32)(x[:, 128 * r :][:, :128]) for r in (0, 1)
    ]
    assert torch.allclose(parts[0] + parts[1], x @ ckpt.dequantize(module).T, atol=1e-4)


def test_experts_are_the_weighted_sum_of_their_modules(golden: Path, ops: QuantOps) -> None:
    ckpt = open_checkpoint(golden / "compressed_tensors" / "moe_qwen3_w4a16_g64_ct013" / "checkpoint")
    prefix = f"{MLP}.experts"
    layer = ckpt.load_experts(prefix, ops, dtype=torch.float32)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 3], [1, 2], [3, 1], [2, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.25, 0.75]] * 4)
    y = layer(x, qhal.Indexed(ids, weights))
    want = torch.zeros_like(x)
    for t in range(4):
        for e, weight in zip(ids[t].tolist(), weights[t], strict=True):
            gate, up, down = (ckpt.dequantize(f"{prefix}.{e}.{p}_proj") for p in ("gate", "up", "down"))
            want[t] += weight * (down @ (torch.nn.functional.silu(gate @ x[t]) * (up @ x[t])))
    assert torch.allclose(y, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", INT4)
def test_a_plan_needs_no_weights(golden: Path, ops: QuantOps, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = open_checkpoint(golden / case / "checkpoint")
    monkeypatch.setattr(type(ckpt), "spec", None)
    plan = qhal.resolve(ckpt, ops, policy="error")
    assert "q_proj" in plan.explain()


def test_without_numba_the_same_codes() -> None:
    packed = torch.randint(-(2**31), 2**31, (30, 64), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    codes = [packing.unpack(packed, 3, 600), packing.unpack_awq(packed), packing.unpack_down(packed, 5, 192)]
    program = """
import sys
sys.modules["numba"] = None
import hashlib, torch
from qhal_schemes import packing
from qhal_schemes.compiled import loops
assert loops("words") is None
packed = torch.randint(-2**31, 2**31, (30, 64), generator=torch.Generator().manual_seed(0)).to(torch.int32)
codes = [packing.unpack(packed, 3, 600), packing.unpack_awq(packed), packing.unpack_down(packed, 5, 192)]
print(hashlib.sha256(b"".join(c.numpy().tobytes() for c in codes)).hexdigest())
"""
    found = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert found.strip() == hashlib.sha256(b"".join(c.numpy().tobytes() for c in codes)).hexdigest()
