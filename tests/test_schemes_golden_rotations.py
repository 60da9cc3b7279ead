"""Golden checkpoints with online rotations: stored weights, rotated and quantized inputs, layers, MLPs, logits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qhal
from qhal import rotations
from qhal.encoding import encode
from qhal.specs import LinearSpec
from qhal_schemes import Checkpoint, CheckpointWarning, open_checkpoint

GOLDEN = Path(os.environ.get("QHAL_GOLDEN", Path(__file__).parent / "golden")) / "rotations"
NO_CHECKPOINTS = {
    "fht_reference": "inputs and outputs of one operation: tested through ops.hadamard",
    "quarot_hadamard_sizes": "tables and inputs and outputs of one operation: tested through the rotation types",
}
"""Fixtures of the family that are no checkpoints, and why."""
CASES = sorted(path.name for path in GOLDEN.glob("*") if path.name not in NO_CHECKPOINTS)
PLANES = ("weight_original", "weight_transformed", "weight_rotated", "weight_unrotated")
FLAT, QUAROT, SPIN = "flatquant_w4a4_mlp", "quarot_w4a4_down_proj", "spinquant_r1_r2_r4"
ONLINE = ("ct_hadamard_block32_randomized_r1", "ct_hadamard_online_r4")
U = 2.0**-24  # half an ulp of float32

pytestmark = pytest.mark.filterwarnings("ignore:.*does not say with how many bits:qhal_schemes.CheckpointWarning")


def case(name: str) -> tuple[Checkpoint, dict[str, Tensor]]:
    if name not in CASES:
        pytest.skip(f"{name} is not among the golden checkpoints in {GOLDEN} (set QHAL_GOLDEN)")
    return open_checkpoint(GOLDEN / name / "checkpoint"), load_file(GOLDEN / name / "expected.safetensors")


def turned(spec: LinearSpec, x: Tensor) -> Tensor:
    found = qhal.select("cpu_reference").hadamard(x, spec.rotate_in)
    assert isinstance(found, Tensor)
    return found


def product_bound(spec: LinearSpec, q: Tensor) -> Tensor:
    """(K + 8) u S of a float32 product with the quantized input q, summed in any order."""
    return (spec.weight.shape[-1] + 8) * U * (q.double().abs() @ spec.stored().double().abs().T)


def within(found: Tensor, wanted: Tensor, bound: Tensor) -> bool:
    return bool(((found.double() - wanted.double()).abs() <= bound).all())


def rotation_bound(spec: LinearSpec, x: Tensor) -> Tensor:
    """Of a float32 transform of K features: (K + 8) u of the magnitudes."""
    k = x.shape[-1]
    return (k + 8) * U * (x.double().abs() @ rotations.matrix(spec.rotate_in, k).abs())


def folded(spec: LinearSpec) -> Tensor:
    """float64 [N, K]: |R_out| |W| |R_in|, what bounds the sums behind `effective`."""
    n, k = spec.weight.shape
    w = spec.stored().double().abs() @ rotations.matrix(spec.rotate_in, k).abs().T
    return rotations.matrix(spec.rotate_out, n).abs().T @ w


def test_the_fixtures_that_are_no_checkpoints_are_known() -> None:
    assert CASES and all(not (GOLDEN / name / "checkpoint" / "config.json").exists() for name in NO_CHECKPOINTS)


@pytest.mark.parametrize("name", [c for c in CASES if c != SPIN])
def test_stored_weights_are_the_tools_own(name: str) -> None:
    ckpt, expected = case(name)
    keys = [key for key in expected if key.endswith("_proj.weight")]
    for key in keys:
        stored = ckpt.stored(key.removesuffix(".weight"))
        assert torch.equal(stored, expected[key]), key
    assert {key.removesuffix(".weight") for key in keys} == set(ckpt.modules(quantized=True))


@pytest.mark.parametrize("name", ONLINE)
def test_layers_of_compressed_tensors_with_online_transforms(name: str) -> None:
    """Float layers: both transforms and the product are float32 sums."""
    ckpt, expected = case(name)
    for module in (key.removesuffix(".output") for key in expected if key.endswith("_proj.output")):
        spec, x = ckpt.spec(module), expected[f"{module}.input"]
        n, k = spec.weight.shape
        size = x.double().abs()
        size = size @ rotations.matrix(spec.rotate_in, k).abs() @ spec.stored().double().abs().T
        size = size @ rotations.matrix(spec.rotate_out, n).abs()
        layer = ckpt.load_linear(module, qhal.select("cpu_reference"), dtype=torch.float32)
        assert within(layer(x), expected[f"{module}.output"], (2 * k + n + 8) * U * size), module
        assert within(spec.effective(), expected[f"{module}.weight_original"], (n + k + 8) * U * folded(spec)), module


def test_quarot_rotates_clips_and_multiplies_as_quarot_does() -> None:
    ckpt, expected = case(QUAROT)
    spec, x = ckpt.spec("down_proj"), expected["down_proj.input"]
    assert spec.rotate_in[0].kind == ("hadamard", 448, 28, "quarot-28", False)
    assert spec.input is not None and spec.input.clip == (0.9, 0.9)
    rotated = turned(spec, x)
    assert within(rotated, expected["down_proj.input_rotated"], rotation_bound(spec, x))
    ours = encode(rotated, spec.input.format, clip=spec.input.clip)
    tools = encode(expected["down_proj.input_rotated"], spec.input.format, clip=spec.input.clip)
    assert torch.equal(ours.codes, tools.codes)
    layer = ckpt.load_linear("down_proj", qhal.select("cpu_reference"), dtype=torch.float32)
    q = tools.dequantize()
    scale_error = rotation_bound(spec, x).amax(1, keepdim=True) / rotated.abs().amax(1, keepdim=True).double()
    bound = product_bound(spec, q) + scale_error * (q.double().abs() @ spec.stored().double().abs().T)
    assert within(layer(x), expected["down_proj.output"], bound)


def test_flatquant_gives_flatquants_mlp() -> None:
    """gate and up read input_scaled: the norm before them has taken the diagonal. float32 throughout."""
    ckpt, expected = case(FLAT)
    ops, x = qhal.select("cpu_reference"), expected["mlp.input_scaled"]
    specs = {name: ckpt.spec(f"mlp.{name}_proj") for name in ("gate", "up", "down")}
    layers = {n: ckpt.load_linear(f"mlp.{n}_proj", ops, dtype=torch.float32) for n in specs}
    assert within(turned(specs["gate"], x), expected["mlp.input_transformed"], rotation_bound(specs["gate"], x))
    down_in = expected["mlp.down_in"]
    rotated, want = turned(specs["down"], down_in), expected["mlp.down_in_transformed"]
    assert within(rotated, want, rotation_bound(specs["down"], down_in))
    results, errors = {}, {}
    for name, given, theirs in (
        ("gate", x, expected["mlp.input_transformed"]),
        ("up", x, expected["mlp.input_transformed"]),
        ("down", down_in, want),
    ):
        spec = specs[name]
        assert spec.input is not None and 0.9 < min(spec.input.clip) <= max(spec.input.clip) < 1
        ours = encode(turned(spec, given), spec.input.format, clip=spec.input.clip)
        q = encode(theirs, spec.input.format, clip=spec.input.clip)
        assert torch.equal(ours.codes, q.codes), name
        assert isinstance(ours.scale, Tensor) and isinstance(q.scale, Tensor)
        step = ((ours.scale - q.scale).abs() / q.scale).double()
        size = q.dequantize().double().abs() @ spec.stored().double().abs().T
        errors[name] = product_bound(spec, q.dequantize()) + step * size
        results[name] = layers[name](given)
    assert within(results["down"], expected["mlp.output"], errors["down"])
    # |silu'| < 1.1 and |silu(g)| <= |g|; the function itself is good to a few ulps
    gate, up = results["gate"].double(), results["up"].double()
    bound = 1.1 * errors["gate"] * (up.abs() + errors["up"]) + gate.abs() * errors["up"] + 16 * U * (gate * up).abs()
    ours = torch.nn.functional.silu(results["gate"]) * results["up"]
    assert within(ours, down_in, bound)
    whole = layers["down"](ours)
    operand = specs["down"].input
    assert operand is not None
    codes = [encode(turned(specs["down"], h), operand.format, clip=operand.clip) for h in (ours, down_in)]
    assert torch.equal(codes[0].codes, codes[1].codes), "the same codes, so that only the steps of tokens differ"
    step = ((codes[0].scale - codes[1].scale).abs() / codes[1].scale).double()
    q = codes[1].dequantize().double().abs()
    assert within(whole, expected["mlp.output"], errors["down"] + step * (q @ specs["down"].stored().double().abs().T))


def test_flatquant_says_what_it_assumes() -> None:
    if FLAT not in CASES:
        pytest.skip("no FlatQuant case here (set QHAL_GOLDEN)")
    with pytest.warns(CheckpointWarning, match="does not say with how many bits inputs are quantized; 4 is assumed"):
        open_checkpoint(GOLDEN / FLAT / "checkpoint")


def test_spinquant_rotates_weights_as_spinquant_does() -> None:
    """Weights: the tool rounds to float32 after each of at most three steps, once here. Layers: what they were."""
    ckpt, expected = case(SPIN)
    assert torch.equal(expected["R1"], torch.load(GOLDEN / SPIN / "checkpoint/R.bin", weights_only=True)["R1"])
    for module in ckpt.modules(quantized=True):
        spec, want = ckpt.spec(module), expected[f"{module}.weight"]
        n, k = want.shape
        bound = 3 * U * want.abs().double() + 2 * U * want.abs().max() * max(n, k) ** 0.5
        assert within(spec.stored(), want, bound), module
    assert ckpt.format("model.layers.0.mlp.down_proj").rotate_in == (("hadamard", 112, 28, "quarot-28", False),)
    original = load_file(GOLDEN / SPIN / "checkpoint/model.safetensors")
    specs = {p: ckpt.spec(f"model.layers.0.self_attn.{p}_proj") for p in "qkvo"}
    weights = {p: original[f"{spec.name}.weight"].double() for p, spec in specs.items()}
    for p in "qk":  # rounded once as it was stored, and once behind the rotations
        assert within(specs[p].effective(), weights[p], 2 * U * folded(specs[p])), p
    for columns in (slice(0, 32), slice(32, 64)):  # v leaves the turn of its heads to o: their product is what it was
        found = specs["o"].effective().double()[:, columns] @ specs["v"].effective().double()
        bound = 4 * U * folded(specs["o"])[:, columns] @ folded(specs["v"])
        assert within(found, weights["o"][:, columns] @ weights["v"], bound)
