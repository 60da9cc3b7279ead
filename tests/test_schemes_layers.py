"""Layers around the weights: online rotations, experts, plain modules, and the account of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qhal
from qhal import Indexed, Offsets, QTensor
from qhal.errors import CheckpointError, ShardError
from qhal.formats import Format
from qhal.layer_formats import ExpertsFormat, LinearFormat
from qhal.layers import prepare_experts
from qhal.rotations import sylvester
from qhal_schemes import open_checkpoint
from qhal_schemes.packing import pack

Write = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"


def ct(weights: dict[str, Any], fmt: str, inputs: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": fmt}
    return {"quant_method": "compressed-tensors", "version": "0.19.0", "config_groups": {"g": group}} | extra


def codes(bits: int, n: int, k: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (n, k), generator=g).to(torch.int8)


def scale(n: int, g: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.rand(n, g, generator=torch.Generator().manual_seed(9)) + 0.1).to(dtype)


# ---------------------------------------------------------------- rotations


def transform(apply: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    return {"config_groups": {"R4": {"type": "hadamard", "apply": apply} | settings}}


def test_online_hadamard_of_two_layers_that_share_one_matrix(write_checkpoint: Write) -> None:
    k, n = 64, 8
    modules = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    tensors = {f"{modules[0]}.R4_input.weight": sylvester(k).clone()}
    q = codes(8, n, k)
    for m in modules:
        tensors |= {f"{m}.weight": q, f"{m}.weight_scale": scale(n, 1)}
    online = transform([{"location": "input", "targets": ["re:.*down_proj$"], "inverse": False}])
    config = ct({"num_bits": 8, "strategy": "channel"}, "int-quantized", transform_config=online)
    ckpt = open_checkpoint(write_checkpoint(tensors, config, name="a"))
    for m in modules:
        assert ckpt.format(m).rotate_in == (("hadamard", k, 1, "", False),)
        expected = (ckpt.stored(m).double() @ sylvester(k) / k**0.5).float()
        assert torch.equal(ckpt.dequantize(m), expected)
    tensors[f"{modules[0]}.R4_input.weight"][0, 0] = -1
    broken = open_checkpoint(write_checkpoint(tensors, config, name="b"))
    with pytest.raises(CheckpointError, match="expected the natural-order Hadamard matrix"):
        broken.spec(modules[1])
    del tensors[f"{modules[0]}.R4_input.weight"]
    with pytest.raises(CheckpointError, match=r"R4_input\.weight is missing"):
        open_checkpoint(write_checkpoint(tensors, config, name="c"))


def test_two_transforms_of_one_input_run_last_first(write_checkpoint: Write) -> None:
    k, n = 16, 8
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(k, k, generator=g, dtype=torch.float64) for _ in range(2))
    tensors = {
        f"{Q}.weight": codes(8, n, k),
        f"{Q}.weight_scale": scale(n, 1),
        f"{Q}.A_input.weight": a,
        f"{Q}.B_input.weight": b,
    }
    one = {"type": "random-matrix", "apply": [{"location": "input", "targets": [Q]}]}
    config = ct(
        {"num_bits": 8, "strategy": "channel"},
        "int-quantized",
        transform_config={"config_groups": {"A": one, "B": one}},
    )
    ckpt = open_checkpoint(write_checkpoint(tensors, config))
    want = (ckpt.stored(Q).double() @ (b @ a).T).float()  # the hook that is registered last runs first
    assert torch.allclose(ckpt.dequantize(Q), want, rtol=1e-5)


@pytest.mark.parametrize("inverse", [False, True])
def test_random_matrix_on_both_sides_and_a_bias(write_checkpoint: Write, inverse: bool) -> None:
    n, k, b = 8, 64, 16
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(s, s, generator=g, dtype=torch.float64) for s in (b, n))
    apply = [
        {"location": "input", "targets": [Q], "inverse": inverse},
        {"location": "output", "targets": [Q], "inverse": inverse},
    ]
    tensors = {
        f"{Q}.weight": codes(8, n, k),
        f"{Q}.weight_scale": scale(n, 1),
        f"{Q}.bias": torch.ones(n),
        f"{Q}.R4_input.weight": left,
        f"{Q}.R4_output.weight": right,
    }
    groups = transform(apply, type="random-matrix")["config_groups"]
    groups = {"R4": groups["R4"] | {"apply": [apply[0]], "head_dim": b}, "U": groups["R4"] | {"apply": [apply[1]]}}
    tensors[f"{Q}.U_output.weight"] = tensors.pop(f"{Q}.R4_output.weight")
    config = ct({"num_bits": 8, "strategy": "channel"}, "int-quantized", transform_config={"config_groups": groups})
    spec = open_checkpoint(write_checkpoint(tensors, config)).spec(Q)
    x = torch.randn(3, k, generator=g, dtype=torch.float64)
    rotated = (x.view(3, k // b, b) @ left).flatten(1)
    y = (rotated @ spec.stored().double().T + 1) @ right  # the file's bias is added before the output transform
    assert spec.bias is not None
    got = x @ spec.effective().double().T + spec.bias.double()
    assert (got - y).abs().max() / y.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("apply", "match"),
    [
        ([{"location": "k_cache", "targets": ["re:.*self_attn$"]}], "unsupported: .*online transform at 'k_cache'"),
        ([{"location": "q_attn", "targets": ["re:.*self_attn$"]}], "unsupported: .*online transform at 'q_attn'"),
        ([{"location": "input", "targets": ["re:.*nothing$"]}], "which match no quantized module"),
        ([{"location": "input", "targets": [Q]}], r"R4_input\.weight is missing"),
        ("input", "apply: expected a list of objects"),
    ],
)
def test_transforms_that_cannot_be_applied(write_checkpoint: Write, apply: Any, match: str) -> None:
    tensors = {f"{Q}.weight": codes(8, 8, 32), f"{Q}.weight_scale": scale(8, 1)}
    config = ct({"num_bits": 8, "strategy": "channel"}, "int-quantized", transform_config=transform(apply))
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(write_checkpoint(tensors, config))


def test_transform_tensor_without_configuration_is_an_error(write_checkpoint: Write) -> None:
    tensors = {f"{Q}.weight": codes(8, 8, 32), f"{Q}.weight_scale": scale(8, 1)}
    tensors[f"{Q}.R4_input.weight"] = torch.eye(32, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"R4_input\.weight is extra"):
        open_checkpoint(write_checkpoint(tensors, ct({"num_bits": 8, "strategy": "channel"}, "int-quantized")))


@pytest.mark.parametrize("case", ["ct_hadamard_online_r4", "ct_hadamard_block32_randomized_r1"])
def test_golden_transforms_restore_the_original_weight(golden: Path, case: str) -> None:
    folder = golden / "rotations" / case
    if not folder.is_dir():
        pytest.skip("needs the full golden set")
    from safetensors.torch import load_file

    ckpt, expected = open_checkpoint(folder / "checkpoint"), load_file(folder / "expected.safetensors")
    modules = [key.removesuffix(".weight_original") for key in expected if key.endswith(".weight_original")]
    assert modules
    for m in modules:
        assert torch.equal(ckpt.stored(m), expected[f"{m}.weight"])
        assert (ckpt.dequantize(m) - expected[f"{m}.weight_original"]).abs().max() < 1e-6
        y = expected[f"{m}.input"] @ ckpt.dequantize(m).T
        assert (y - expected[f"{m}.output"]).abs().max() < 1e-5


# ---------------------------------------------------------------- experts


def expert_tensors(names: tuple[str, str, str], count: int = 3, prefix: str = "model.layers.0.mlp") -> dict[str, Any]:
    gate, up, down = names
    tensors = {}
    for e in range(count):
        for i, (name, n, k) in enumerate(((gate, 16, 32), (up, 16, 32), (down, 32, 16))):
            m = f"{prefix}.experts.{e}.{name}"
            tensors |= {f"{m}.weight": codes(8, n, k, 10 * e + i), f"{m}.weight_scale": scale(n, 1)}
    return tensors


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_experts_are_stacked_gate_first(write_checkpoint: Write, names: tuple[str, str, str]) -> None:
    inputs = {"num_bits": 8, "strategy": "token", "dynamic": True}
    config = ct({"num_bits": 8, "strategy": "channel"}, "int-quantized", inputs)
    ckpt = open_checkpoint(write_checkpoint(expert_tensors(names), config))
    prefix = "model.layers.0.mlp.experts"
    spec = ckpt.experts_spec(prefix)
    assert spec.format == ckpt.experts_format(prefix)
    assert isinstance(spec.gate_up.weight, QTensor) and spec.gate_up.weight.shape == (3, 32, 32)
    for e in range(3):
        gate, up, down = (ckpt.dequantize(f"{prefix}.{e}.{n}") for n in names)
        assert torch.equal(spec.gate_up.stored()[e], torch.cat([gate, up]))
        assert torch.equal(spec.down.stored()[e], down)
    part = ckpt.experts_spec(prefix, range(1, 3))
    assert torch.equal(part.down.stored(), spec.down.stored()[1:])
    assert torch.equal(ckpt.experts_spec(prefix, (1, 2)).down.stored(), spec.down.stored()[1:])
    formats = ckpt.layer_formats()
    assert len(formats) == 1 and isinstance(formats[0], ExpertsFormat) and formats[0].experts == 3
    for wrong in (range(2, 5), range(0, 3, 2), (0, 0)):
        with pytest.raises(CheckpointError, match="experts"):
            ckpt.experts_spec(prefix, wrong)


def test_experts_that_cannot_be_stacked(write_checkpoint: Write) -> None:
    names = ("gate_proj", "up_proj", "down_proj")
    weights = {"num_bits": 8, "strategy": "channel"}
    tensors = expert_tensors(names)
    for suffix in ("weight", "weight_scale"):
        del tensors[f"model.layers.0.mlp.experts.1.up_proj.{suffix}"]
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj is missing; .*has experts up to 2"):
        open_checkpoint(write_checkpoint(tensors, ct(weights, "int-quantized"), name="missing"))
    tensors = expert_tensors(names)
    for i, m in enumerate(sorted({n.rpartition(".")[0] for n in tensors})):
        tensors[f"{m}.input_scale"] = torch.tensor([1.0 + i])
    inputs = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
    ckpt = open_checkpoint(write_checkpoint(tensors, ct(weights, "int-quantized", inputs), name="static"))
    with pytest.raises(ShardError, match=r"gate_proj.*up_proj.*input quantization differs, and one product has one"):
        ckpt.experts_spec("model.layers.0.mlp.experts")
    odd = open_checkpoint(
        write_checkpoint(
            expert_tensors(names), ct(weights, "int-quantized"), model={"hidden_act": "mish"}, name="activation"
        )
    )
    with pytest.raises(CheckpointError, match=r"unsupported: .*hidden_act 'mish'"):
        odd.experts_spec("model.layers.0.mlp.experts")


def test_experts_with_input_scales_of_their_own(write_checkpoint: Write) -> None:
    """Static W8A8: gate and up of an expert share a scale, experts do not. It used to be refused."""
    names, prefix = ("gate_proj", "up_proj", "down_proj"), "model.layers.0.mlp.experts"
    tensors = expert_tensors(names)
    for e in range(3):
        for name in names:
            scale = torch.tensor([0.25 + e + 8 * (name == "down_proj")])
            tensors[f"{prefix}.{e}.{name}.input_scale"] = scale.bfloat16()
    inputs = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
    config = ct({"num_bits": 8, "strategy": "channel"}, "int-quantized", inputs)
    ckpt = open_checkpoint(write_checkpoint(tensors, config))
    spec = ckpt.experts_spec(prefix)
    assert spec.format in ckpt.layer_formats()
    for part, base in ((spec.gate_up, 0.25), (spec.down, 8.25)):
        assert part.input is not None and part.input.per_expert and part.input.scale is not None
        assert part.input.scale.tolist() == [[base], [base + 1], [base + 2]]
    one = ckpt.experts_spec(prefix, range(1, 2)).gate_up.input
    assert one is not None and one.scale is not None and one.scale.tolist() == [[1.25]]
    ops = qhal.select("cpu_reference")
    layer = prepare_experts(spec, ops)
    k = spec.format.gate_up.k
    x = torch.randn(6, k).bfloat16()
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0], [2, 1]], dtype=torch.int32)
    y = layer(x, Indexed(ids, torch.full((6, 2), 0.5)))
    assert y.shape == x.shape and bool(torch.isfinite(y).all())
    alone = prepare_experts(spec.experts(1, 1), ops)
    rows = x[(ids == 1).any(1)]
    only = torch.where(ids == 1, ids, -1)[(ids == 1).any(1)]
    whole = layer(rows, Indexed(only, torch.ones(only.shape)))
    assert torch.equal(alone(rows, Offsets(torch.tensor([0, rows.shape[0]], dtype=torch.int32))), whole)


# ---------------------------------------------------------------- plain checkpoints and accounts


def test_checkpoint_without_quantization(write_checkpoint: Write) -> None:
    tensors = {
        f"{Q}.weight": torch.randn(8, 32).bfloat16(),
        f"{Q}.bias": torch.randn(8).bfloat16(),
        "model.embed_tokens.weight": torch.randn(8, 32).bfloat16(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.norm.weight": torch.ones(32).bfloat16(),
    }
    ckpt = open_checkpoint(write_checkpoint(tensors, shards=2))
    assert ckpt.method == "" and ckpt.modules() == (Q,) and ckpt.modules(quantized=True) == ()
    assert ckpt.excluded == {Q: "the checkpoint is not quantized"}
    assert torch.equal(ckpt.dequantize(Q), tensors[f"{Q}.weight"].float())
    assert torch.equal(ckpt.tensor("model.norm.weight"), tensors["model.norm.weight"])
    assert ckpt.layer_formats() == []
    assert ckpt.format(Q) == LinearFormat(Q, 8, 32, Format("bf16"), bias=True)
    assert ckpt.format(Q) == ckpt.spec(Q).format and ckpt.dtype == torch.bfloat16
    totals = ckpt.summary()["totals"]
    assert totals["tensors"] == 5 and totals["consumed"] + totals["plain"] + totals["extra"] == 5
    assert list(ckpt.account.extra) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_every_golden_tensor_is_accounted_for(golden: Path) -> None:
    for family in ("compressed_tensors", "awq", "gptq"):
        for folder in sorted((golden / family).glob("*")):
            ckpt = open_checkpoint(folder / "checkpoint")
            totals = ckpt.summary()["totals"]
            assert totals["consumed"] + totals["plain"] + totals["extra"] == totals["tensors"], folder
            assert totals["extra"] == 0, folder
            assert sum(row["modules"] for row in ckpt.summary()["formats"]) == totals["modules_quantized"]


def test_older_places_of_the_configuration(write_checkpoint: Write) -> None:
    import json

    from qhal_schemes.packing import pack_awq

    awq = {"qweight": pack_awq(torch.ones(8, 32)), "qzeros": pack_awq(torch.zeros(8, 1)), "scales": torch.ones(1, 8)}
    folder = write_checkpoint({f"{Q}.{k}": t for k, t in awq.items()}, name="awq")
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(old))
    assert open_checkpoint(folder).method == "awq"
    assert torch.equal(open_checkpoint(folder).dequantize(Q), torch.ones(8, 32))
    gptq = {
        "qweight": pack(torch.full((8, 32), 9), 4).t(),
        "qzeros": pack(torch.full((1, 8), 7), 4),
        "scales": torch.ones(1, 8),
        "g_idx": torch.zeros(32, dtype=torch.int32),
    }
    folder = write_checkpoint({f"{Q}.{k}": t for k, t in gptq.items()}, name="gptq")
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True}))
    assert open_checkpoint(folder).method == "gptq"
    assert torch.equal(open_checkpoint(folder).dequantize(Q), torch.ones(8, 32))
    (folder / "quantize_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"quantize_config\.json: expected a JSON object"):
        open_checkpoint(folder)
