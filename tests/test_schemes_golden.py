"""Golden checkpoints: every case of the implemented families decodes to its tool's own numbers, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import qhal
import qhal_schemes
from qhal.encoding import encode
from qhal.layers import prepare_linear
from qhal.specs import LinearSpec

GOLDEN = Path(os.environ.get("QHAL_GOLDEN", Path(__file__).parent / "golden"))
FAMILIES = ("compressed_tensors", "awq", "gptq", "modelopt", "bitsandbytes", "torchao")
NEAR = {"int8.row*(fp32.tensor/fp32)": 1e-6}
"""Weight formats whose tool multiplies in another order: the last bit of float32 differs."""
INPUT_ARITHMETIC = {"compressed_tensors": "bf16", "modelopt": "fp32"}
"""What a tool computes scale and quotient of an input in; NVFP4 inputs are fp32 everywhere."""
FLOAT32_LAYERS = ("modelopt",)
"""Tools whose fixtures were computed in float32 throughout: whole layers are compared, within the bound of a sum."""


def read_keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as f:
        return list(f.keys())


CASES = [f"{family}/{path.name}" for family in FAMILIES for path in sorted((GOLDEN / family).glob("*"))]
KEYS = {c: {k.rpartition(".")[2] for k in read_keys(GOLDEN / c / "expected.safetensors")} for c in CASES}
PRECISION = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def sha256(w: torch.Tensor) -> str:
    return hashlib.sha256(w.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize("case", CASES)
def test_case_decodes_exactly(case: str) -> None:
    folder = GOLDEN / case
    provenance = json.loads((folder / "provenance.json").read_text())
    precision = PRECISION[provenance["verify"]["best"]["peer_value_precision"]]
    ckpt = qhal_schemes.open_checkpoint(folder / "checkpoint")
    assert ckpt.modules(quantized=True)
    compared = set()
    with safe_open(folder / "expected.safetensors", "pt") as expected:
        for key in expected.keys():  # noqa: SIM118 - not a dict
            module = key.removesuffix(".weight")
            if key.endswith(".weight"):
                w, right = ckpt.stored(module).to(precision).float(), expected.get_tensor(key)
                near = NEAR.get(str(ckpt.format(module).weight))
                same = torch.equal(w, right) if near is None else torch.allclose(w, right, rtol=near, atol=0)
                assert same, key
                compared.add(module)
    for key, digest in provenance["weight_sha256"].items():
        w = ckpt.stored(key.removesuffix(".weight")).to(precision).float()
        near = NEAR.get(str(ckpt.format(key.removesuffix(".weight")).weight))
        assert near is not None or digest in (sha256(w), sha256(w + 0.0)), key
        compared.add(key.removesuffix(".weight"))
    assert set(ckpt.modules(quantized=True)) <= compared, "every quantized module was compared"


def rotated(spec: LinearSpec, x: torch.Tensor) -> torch.Tensor:
    turned = qhal.select("cpu_reference").hadamard(x, spec.rotate_in) if spec.rotate_in else x
    assert isinstance(turned, torch.Tensor)
    return turned


@pytest.mark.parametrize("case", [c for c in CASES if "input_qdq" in KEYS[c]])
def test_inputs_are_quantized_as_by_the_tool(case: str) -> None:
    """With the tool's arithmetic every element is the tool's own, as the bf16 number that the product reads."""
    ckpt = qhal_schemes.open_checkpoint(GOLDEN / case / "checkpoint")
    expected = load_file(GOLDEN / case / "expected.safetensors")
    for module in (key.removesuffix(".input_qdq") for key in expected if key.endswith(".input_qdq")):
        spec = ckpt.spec(module)
        got, want = rotated(spec, expected[f"{module}.input"]), expected[f"{module}.input_qdq"]
        if spec.input is not None:
            arith = "fp32" if spec.input.format.element == "e2m1" else INPUT_ARITHMETIC[case.partition("/")[0]]
            fmt = replace(spec.input.format, rule=replace(spec.input.format.rule, arith=arith))
            got = encode(got, fmt, scale=spec.input.scale, zero=spec.input.zero).dequantize()
        assert torch.equal(got.bfloat16(), want.bfloat16()), module
        if case.startswith(FLOAT32_LAYERS):  # code * (amax / 448) here, code / (448 / amax) there: four roundings
            assert bool(((got - want).abs() <= want.abs() * 4 * 2**-24).all()), module


DECIDED_BY_THE_BATCH = ("bitsandbytes/int8_llm_int8",)
"""Cases whose inputs are quantized but for columns that the batch decides: see test_schemes_bitsandbytes.py."""


@pytest.mark.parametrize("case", [c for c in CASES if "output" in KEYS[c] and c not in DECIDED_BY_THE_BATCH])
def test_outputs_follow_from_weight_input_and_bias(case: str) -> None:
    ckpt = qhal_schemes.open_checkpoint(GOLDEN / case / "checkpoint")
    expected = load_file(GOLDEN / case / "expected.safetensors")
    outputs = [key.removesuffix(".output") for key in expected if key.endswith("_proj.output")]
    assert outputs
    for module in outputs:
        spec = ckpt.spec(module)
        x = expected.get(f"{module}.input_qdq")  # what the product reads: behind the input's rotation
        weight = spec.effective() if x is None else spec.stored()
        y = (expected[f"{module}.input"] if x is None else x).double() @ weight.double().T
        if spec.bias is not None:
            y = y + spec.bias.double()
        peak = expected[f"{module}.output"].abs().max()
        assert (y - expected[f"{module}.output"]).abs().max() / peak < 1e-2, module


@pytest.mark.parametrize("case", [c for c in CASES if "output" in KEYS[c] and c.startswith(FLOAT32_LAYERS)])
def test_whole_layers_give_the_tools_outputs(case: str) -> None:
    """Rotation, input quantization and product on the reference; the bound is that of a float32 sum of K products."""
    ckpt, ops = qhal_schemes.open_checkpoint(GOLDEN / case / "checkpoint"), qhal.select("cpu_reference")
    expected = load_file(GOLDEN / case / "expected.safetensors")
    for module in (key.removesuffix(".output") for key in expected if key.endswith(".output")):
        spec = replace(ckpt.spec(module), operand=None)  # the fixtures hold the stored weight, not the rounded one
        layer = prepare_linear(spec, ops, dtype=torch.float32)
        y, want = layer(expected[f"{module}.input"]), expected[f"{module}.output"]
        x = expected[f"{module}.input_qdq"].abs().double()
        bound = (x.shape[-1] + 2) * 2.0**-24 * (x @ spec.stored().abs().double().T)
        assert bool(((y.double() - want.double()).abs() <= bound).all()), module


def test_some_case_of_every_family_is_present() -> None:
    assert {case.partition("/")[0] for case in CASES} == set(FAMILIES)
