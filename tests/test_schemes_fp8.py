"""quant_method fp8: tiles of the configuration, every form of scales and inputs, stacked experts, contradictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qhal
from qhal.errors import CheckpointError, ShardError
from qhal.groups import Indexed
from qhal_schemes import Checkpoint, CheckpointWarning, open_checkpoint
from qhal_schemes.packing import pack_nibbles

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
Q, D = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
P = "model.layers.0.mlp.experts"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
G = torch.Generator().manual_seed(0)


def codes(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G).to(torch.float8_e4m3fn)


def tiled(n: int, k: int, tile: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.float32) -> Tensors:
    grid = (-(-n // tile[0]), -(-k // tile[1]))
    return {"weight": codes(n, k), "weight_scale_inv": (torch.rand(grid, generator=G) + 0.1).to(dtype)}


def named(module: str, tensors: Tensors) -> Tensors:
    return {f"{module}.{leaf}": t for leaf, t in tensors.items()}


def expanded(scale: torch.Tensor, tile: tuple[int, int], n: int, k: int) -> torch.Tensor:
    return torch.stack([torch.stack([scale[i // tile[0], j // tile[1]] for j in range(k)]) for i in range(n)])


def opened(write: Write, tensors: Tensors, change: dict[str, Any] | None = None, **options: Any) -> Checkpoint:
    return open_checkpoint(write(tensors, FP8 | (change or {}), **options))


def refused(action: Callable[[], object], match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as info:
        action()
    assert len(str(info.value)) < 6000


@pytest.mark.parametrize(("n", "k"), [(192, 576), (128, 128), (130, 7), (1, 300)])
def test_tiles_start_at_the_top_left_and_the_last_are_short(write_checkpoint: Write, n: int, k: int) -> None:
    t = tiled(n, k)
    ckpt = opened(write_checkpoint, named(Q, t))
    wanted = t["weight"].float() * expanded(t["weight_scale_inv"], (128, 128), n, k)
    assert torch.equal(ckpt.stored(Q), wanted)
    assert str(ckpt.format(Q).weight) == "e4m3fn.128x128*fp32" and str(ckpt.format(Q).input) == "e4m3fn.g128*fp32"


def test_the_tile_is_the_configurations(write_checkpoint: Write) -> None:
    t = tiled(96, 64, (32, 16))
    ckpt = opened(write_checkpoint, named(Q, t), {"weight_block_size": [32, 16]})
    assert torch.equal(ckpt.stored(Q), t["weight"].float() * expanded(t["weight_scale_inv"], (32, 16), 96, 64))
    wrong = write_checkpoint(named(Q, t), FP8, name="wrong")
    refused(lambda: open_checkpoint(wrong), r"weight_scale_inv: expected .* \[1, 1\], found F32 \[3, 4\]")


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_tensor(write_checkpoint: Write, leaf: str, shape: tuple[int, ...]) -> None:
    weight, scale = codes(8, 16), torch.full(shape, 0.25)
    ckpt = opened(write_checkpoint, named(Q, {"weight": weight, leaf: scale}), {"weight_block_size": None})
    assert torch.equal(ckpt.stored(Q), weight.float() * 0.25)
    assert str(ckpt.format(Q).input) == "e4m3fn.row*fp32"


@pytest.mark.parametrize(("leaf", "dtype"), [("input_scale", torch.float32), ("activation_scale", torch.bfloat16)])
def test_static_inputs(write_checkpoint: Write, leaf: str, dtype: torch.dtype) -> None:
    t = {"weight": codes(8, 16), "weight_scale": torch.tensor(0.5), leaf: torch.tensor(0.125, dtype=dtype)}
    change = {"weight_block_size": None, "activation_scheme": "static"}
    spec = opened(write_checkpoint, named(Q, t), change).spec(Q)
    assert spec.input is not None and spec.input.scale is not None and spec.input.scale.item() == 0.125
    del t[leaf]
    missing = write_checkpoint(named(Q, t), FP8 | change, name="missing")
    refused(lambda: open_checkpoint(missing), "input_scale is missing")
    t[leaf] = torch.tensor(0.125)
    dynamic = write_checkpoint(named(Q, t), FP8 | {"weight_block_size": None}, name="dynamic")
    refused(lambda: open_checkpoint(dynamic), f"{leaf} is extra")


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8, torch.float32])
def test_scales_that_are_powers_of_two(write_checkpoint: Write, dtype: torch.dtype) -> None:
    exponents = torch.randint(110, 140, (2, 1), generator=G).to(torch.uint8)
    value = torch.exp2(exponents.float() - 127)
    scale = {torch.uint8: exponents, torch.float32: value}.get(dtype, exponents.view(torch.float8_e8m0fnu))
    weight = codes(200, 64)
    ckpt = opened(write_checkpoint, named(Q, {"weight": weight, "weight_scale_inv": scale}), {"scale_fmt": "ue8m0"})
    assert torch.equal(ckpt.stored(Q), weight.float() * expanded(value, (128, 128), 200, 64))
    assert str(ckpt.format(Q).input) == "e4m3fn.g128*e8m0@e8m0=ceil"
    tensors = named(Q, {"weight": weight, "weight_scale_inv": scale})
    if dtype != torch.float32:
        plain = write_checkpoint(tensors, FP8 | {"scale_fmt": "float"}, name="plain")
        refused(lambda: open_checkpoint(plain), "weight_scale_inv: expected ")


def test_shards_and_fusion_are_those_of_the_decoded_weight(write_checkpoint: Write) -> None:
    a, b = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
    ckpt = opened(write_checkpoint, named(a, tiled(256, 384)) | named(b, tiled(256, 384)) | named(D, tiled(384, 256)))
    both = torch.cat([ckpt.stored(a), ckpt.stored(b)])
    assert torch.equal(ckpt.linear_spec([a, b]).stored(), both)
    assert torch.equal(ckpt.linear_spec("model.layers.0.mlp.gate_up_proj").stored(), both)
    assert torch.equal(ckpt.linear_spec(D, (0, 1, 3)).stored(), ckpt.stored(D)[128:256])
    assert torch.equal(ckpt.linear_spec(D, (1, 1, 2)).stored(), ckpt.stored(D)[:, 128:])
    with pytest.raises(ShardError, match="128x128"):
        ckpt.linear_spec(D, (1, 0, 4))


def test_deepseek_layers(write_checkpoint: Write) -> None:
    """Per-expert modules, a router, partial tiles of kv_a_proj, and what its files keep plain without a word."""
    tensors = {"model.embed_tokens.weight": torch.ones(4, 128).bfloat16(), "lm_head.weight": torch.ones(4, 128)}
    tensors |= named("model.layers.0.self_attn.kv_a_proj_with_mqa", tiled(72, 128))
    for e in range(3):
        for name, (n, k) in {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}.items():
            tensors |= named(f"{P}.{e}.{name}", tiled(n, k))
    tensors["model.layers.0.mlp.gate.weight"] = torch.ones(3, 128).bfloat16()
    tensors["model.layers.1.eh_proj.weight"] = torch.ones(128, 256).bfloat16()
    tensors |= named("model.layers.1.self_attn.q_a_proj", tiled(128, 128))
    ckpt = opened(write_checkpoint, tensors)
    assert dict(ckpt.excluded) == {
        "lm_head": "outside the quantized blocks model.layers.*",
        "model.layers.0.mlp.gate": "a router is not quantized by this method",
        "model.layers.1.eh_proj": "eh_proj is plain in every checkpoint of this method",
    }
    # 64 rows of gate end within a tile: fused, up's would continue it
    with pytest.raises(ShardError, match="128x128"):
        ckpt.experts_spec(P)


def test_plain_weights_need_a_rule(write_checkpoint: Write) -> None:
    plain = {f"{D}.weight": torch.ones(256, 128).bfloat16()}
    folder = write_checkpoint(named(Q, tiled(128, 128)) | plain, FP8)
    refused(lambda: open_checkpoint(folder), f"{D}: the configuration quantizes every Linear layer of its block")
    ckpt = opened(
        write_checkpoint,
        named(Q, tiled(128, 128)) | plain,
        {"modules_to_not_convert": ["model.layers.0.mlp"]},
        name="b",
    )
    assert ckpt.excluded[D] == "modules_to_not_convert 'model.layers.0.mlp'"
    odd = {f"{D}.weight": torch.ones(200, 128).bfloat16()}
    ckpt = opened(write_checkpoint, named(Q, tiled(128, 128)) | odd, name="c")
    assert ckpt.excluded[D] == "a weight without whole 128x128 tiles is left plain by the writer"
    quantized = write_checkpoint(named(Q, tiled(128, 128)), FP8 | {"ignored_layers": ["q_proj"]}, name="d")
    refused(lambda: open_checkpoint(quantized), "excluded by ignored_layers 'q_proj', but the file holds it quantized")


def stacked(transposed: bool) -> Tensors:
    gate_up, down = codes(2, 512, 384), codes(2, 384, 256)
    scales = torch.rand(2, 4, 3, generator=G) + 0.1, torch.rand(2, 3, 2, generator=G) + 0.1
    tensors = {f"{P}.gate_up_proj": gate_up, f"{P}.down_proj": down}
    tensors |= {f"{P}.gate_up_proj_scale_inv": scales[0], f"{P}.down_proj_scale_inv": scales[1]}
    return {name: t.transpose(1, 2).contiguous() for name, t in tensors.items()} if transposed else tensors


def test_stacked_experts_in_both_orders(write_checkpoint: Write) -> None:
    straight = stacked(False)
    turned = {name: t.transpose(1, 2).contiguous() for name, t in straight.items()}
    a, b = opened(write_checkpoint, straight, name="a"), opened(write_checkpoint, turned, name="b")
    wanted = straight[f"{P}.gate_up_proj"].float()
    scale = straight[f"{P}.gate_up_proj_scale_inv"].repeat_interleave(128, 1).repeat_interleave(128, 2)
    assert torch.equal(a.experts_spec(P).gate_up.stored(), wanted * scale)
    x = torch.randn(3, 384, generator=G)
    groups = Indexed(torch.tensor([[0], [1], [0]], dtype=torch.int32), torch.ones(3, 1))
    ys = []
    for ckpt in (a, b):
        assert torch.equal(ckpt.experts_spec(P, (1, 1)).down.stored(), a.experts_spec(P).down.stored()[1:])
        ys.append(ckpt.load_experts(P, qhal.select("cpu_reference"), dtype=torch.float32)(x, groups))
    assert torch.equal(*ys)


def test_stacked_experts_with_static_inputs(write_checkpoint: Write) -> None:
    scales = {f"{P}.{p}_proj_activation_scale": torch.tensor([0.5, 0.25]) for p in ("gate_up", "down")}
    ckpt = opened(write_checkpoint, stacked(False) | scales, {"activation_scheme": "static"})
    spec = ckpt.experts_spec(P, (1, 1))
    assert spec.gate_up.input is not None and spec.gate_up.input.per_expert
    assert spec.gate_up.input.expert(0).scale == torch.tensor([0.25])


def test_fp4_experts(write_checkpoint: Write) -> None:
    raw = torch.randint(0, 16, (64, 128), generator=G).to(torch.uint8)
    exponents = torch.randint(120, 130, (64, 4), generator=G).to(torch.uint8)
    tensors = named(Q, tiled(128, 128))
    for e in range(2):
        for name in ("gate_proj", "up_proj"):
            weight, scale = pack_nibbles(raw).view(torch.int8), exponents.view(torch.float8_e8m0fnu)
            tensors |= named(f"{P}.{e}.{name}", {"weight": weight, "weight_scale_inv": scale})
        down = pack_nibbles(torch.randint(0, 16, (128, 64), generator=G).to(torch.uint8)).view(torch.int8)
        scale = torch.full((128, 2), 126, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        tensors |= named(f"{P}.{e}.down_proj", {"weight": down, "weight_scale_inv": scale})
    ckpt = opened(write_checkpoint, tensors, {"expert_dtype": "fp4", "scale_fmt": "ue8m0"})
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    wanted = torch.where(raw < 8, 1.0, -1.0) * values[(raw & 7).long()]
    wanted = wanted * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    assert torch.equal(ckpt.stored(f"{P}.1.up_proj"), wanted)
    assert torch.equal(ckpt.experts_spec(P).gate_up.stored()[0, :64], wanted)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight_block_size": [128]}, "weight_block_size: expected .rows, columns. or null"),
        ({"weight_block_size": [0, 128]}, "weight_block_size: expected"),
        ({"weight_block_size": "128x128"}, "weight_block_size: expected"),
        ({"activation_scheme": "sometimes"}, "activation_scheme: expected one of dynamic, static, found 'sometimes'"),
        ({"fmt": "e5m2"}, "fmt: expected one of e4m3"),
        ({"scale_fmt": "e4m3"}, "scale_fmt: expected one of float, ue8m0"),
        ({"expert_dtype": "int4"}, "expert_dtype: expected one of fp8, fp4"),
        ({"modules_to_convert": ["model.embed_tokens"]}, "unsupported: .*modules_to_convert"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert: expected a list of names"),
        ({"modules_to_not_convert": ["(a+)+"]}, "neither a name nor a regular expression"),
        ({"modules_to_not_convert": ["a"], "ignored_layers": ["b"]}, "ignored_layers: expected the same list"),
    ],
)
def test_configurations(write_checkpoint: Write, change: dict[str, Any], match: str) -> None:
    refused(lambda: opened(write_checkpoint, named(Q, tiled(128, 128)), change), match)


def test_quantized_embeddings_are_refused(write_checkpoint: Write) -> None:
    refused(lambda: opened(write_checkpoint, named("model.embed_tokens", tiled(128, 128))), "unsupported: .*embedding")


def test_unknown_keys_are_named(write_checkpoint: Write) -> None:
    with pytest.warns(CheckpointWarning, match="new_idea: no key of fp8"):
        opened(write_checkpoint, named(Q, tiled(128, 128)), {"new_idea": 1})


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda t: t.pop("weight_scale_inv"), "weight_scale_inv is missing"),
        (lambda t: t.update(weight=t["weight"].float()), r"weight: expected F8_E4M3"),
        (lambda t: t.update(weight_scale_inv=t["weight_scale_inv"].double()), "weight_scale_inv: expected"),
        (lambda t: t["weight_scale_inv"].fill_(0), "weight_scale_inv: expected finite scales that are not zero"),
        (lambda t: t["weight_scale_inv"].fill_(float("nan")), "1 NaN, 0 Inf, 0 zero of 1"),
        (lambda t: t["weight"].view(torch.uint8).fill_(0x7F), "weight: expected FP8 codes that are numbers"),
        (lambda t: t.update(extra=torch.ones(3)), "extra is extra"),
        (lambda t: t.update(bias=torch.ones(7)), r"bias: expected .*\[128\], found F32 \[7\]"),
    ],
)
def test_tensors(write_checkpoint: Write, spoil: Callable[[Tensors], Any], match: str) -> None:
    t = tiled(128, 128)
    spoil(t)
    refused(lambda: opened(write_checkpoint, named(Q, t)).spec(Q), match)
