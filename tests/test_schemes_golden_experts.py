"""Golden checkpoints, what is larger than a layer: experts as their modules say, whole blocks, the scales of caches."""

from __future__ import annotations

import re
from dataclasses import replace

import golden_cases
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import qhal
import qhal_schemes
from qhal.groups import Indexed

CASES = golden_cases.cases()
CACHE_SCALE = re.compile(r"\.[kv](_scale|_proj\.(output_scale|[kv]_scale|kv_cache_scale))$")


EXPERTS = [c for c in CASES if qhal_schemes.open_checkpoint(golden_cases.path(c) / "checkpoint").summary()["experts"]]


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_are_stacked_as_their_modules_say(case: str) -> None:
    ckpt = qhal_schemes.open_checkpoint(golden_cases.path(case) / "checkpoint")
    for group in ckpt.summary()["experts"]:
        prefix, count = group["prefix"], group["experts"]
        spec, part = ckpt.experts_spec(prefix), ckpt.experts_spec(prefix, (count - 1, 1))
        planned, found = ckpt.experts_format(prefix), spec.format
        # gate and up with a scale each get per-row scales when they are fused, which only their values can show
        fused = replace(found, gate_up=replace(found.gate_up, weight=planned.gate_up.weight))
        assert planned == (fused if ".tensor*" in str(planned.gate_up.weight) else found)
        if prefix not in ckpt.stacked:
            names = [m.rpartition(".")[2] for m in ckpt.modules() if m.startswith(f"{prefix}.0.")]
            names = ["w1", "w3", "w2"] if "w1" in names else ["gate_proj", "up_proj", "down_proj"]
            for e in range(count):
                gate, up, down = (ckpt.stored(f"{prefix}.{e}.{name}") for name in names)
                assert torch.equal(spec.gate_up.stored()[e], torch.cat([gate, up]))
                assert torch.equal(spec.down.stored()[e], down)
        for whole, one in ((spec.gate_up, part.gate_up), (spec.down, part.down)):
            assert torch.equal(one.stored(), whole.stored()[-1:])
            if whole.input is not None and one.input is not None and whole.input.scale is not None:
                assert one.input.scale is not None
                last = whole.input.expert(count - 1).scale
                assert last is not None and last.flatten().tolist() == one.input.scale.flatten().tolist()
        layer = ckpt.load_experts(prefix, qhal.select("cpu_reference"))
        assert layer.format.experts == count


def blocks(case: str) -> list[str]:
    with safe_open(golden_cases.path(case) / "expected.safetensors", "pt") as f:
        return [key.removesuffix(".output") for key in f.keys() if key.endswith("mlp.output")]  # noqa: SIM118


@pytest.mark.parametrize("case", [c for c in EXPERTS if blocks(c)])
def test_blocks_of_experts(case: str) -> None:
    """A whole block in bf16: router, both products, activation. At most 16 roundings lie on the way of every term."""
    ckpt = qhal_schemes.open_checkpoint(golden_cases.path(case) / "checkpoint")
    expected = load_file(golden_cases.path(case) / "expected.safetensors")
    for block in blocks(case):
        x, spec = expected[f"{block}.input"], ckpt.experts_spec(f"{block}.experts")
        router = [ckpt.tensor(f"{block}.router.{name}").float() for name in ("weight", "bias")]
        values, ids = (x @ router[0].T + router[1]).topk(ckpt.config["num_experts_per_tok"])
        weights = values.softmax(-1)
        layer = ckpt.load_experts(f"{block}.experts", qhal.select("cpu_reference"), dtype=torch.float32)
        y = layer(x, Indexed(ids.int(), weights)).double()
        gate_up, down = spec.gate_up.stored().double(), spec.down.stored().double()
        assert spec.gate_up.bias is not None and spec.down.bias is not None
        size = torch.zeros_like(y)
        for t in range(x.shape[0]):
            for e, share in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
                hidden = gate_up[e].abs() @ x[t].double().abs() + spec.gate_up.bias[e].abs()
                gate, up = hidden.chunk(2)  # |act(gate) * (up + 1)| <= |gate| (|up| + 1)
                size[t] += share * (down[e].abs() @ (gate * (up + 1)) + spec.down.bias[e].abs())
        error = (y - expected[f"{block}.output"]).abs()
        assert (error <= 16 * 2.0**-9 * size).all()
        assert error.max() <= 16 * 2.0**-9 * y.abs().max(), "and terms do not cancel here"


@pytest.mark.parametrize("case", CASES)
def test_caches_have_the_scales_of_the_file(case: str) -> None:
    ckpt = qhal_schemes.open_checkpoint(golden_cases.path(case) / "checkpoint")
    scales = [name for name in ckpt.account.consumed if CACHE_SCALE.search(name)]
    found: list[float] = []
    for layer in ckpt.kv_layers if scales else []:
        spec = ckpt.kv_format(layer)
        assert spec is not None
        found += [float(v) for o in (spec.k, spec.v) if o.scale is not None for v in o.scale.flatten()]
    assert sorted(found) == sorted(float(v) for name in scales for v in ckpt.tensor(name).flatten())
