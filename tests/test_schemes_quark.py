"""Quark: every layout of weights and inputs, both nibble orders, overrides, caches, old names, contradictions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qhal
from qhal.errors import CheckpointError
from qhal.groups import Offsets
from qhal_schemes import Checkpoint, CheckpointWarning, open_checkpoint
from qhal_schemes.lanes import unpack_order
from qhal_schemes.packing import pack, pack_nibbles, pack_order, unpack_six

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
N, K, S = 24, 64, 32
A = "model.layers.0.self_attn"
Q, D = f"{A}.q_proj", "model.layers.0.mlp.down_proj"
P = "model.layers.0.mlp.experts"
G = torch.Generator().manual_seed(0)


def spec(dtype: str, qscheme: str = "per_channel", **more: Any) -> dict[str, Any]:
    axis = {"per_channel": 0, "per_group": -1}.get(qscheme)
    return {"dtype": dtype, "qscheme": qscheme, "ch_axis": axis, "is_dynamic": False, "symmetric": True} | more


def mx(dtype: str, **more: Any) -> dict[str, Any]:
    return spec(dtype, "per_group", group_size=32, symmetric=None, scale_format="e8m0") | more


def record(weight: Any, inputs: Any = None, outputs: Any = None) -> dict[str, Any]:
    return {"weight": weight, "input_tensors": inputs, "output_tensors": outputs, "bias": None}


def config(everything: dict[str, Any], order: str = "reorder", **more: Any) -> dict[str, Any]:
    section = {"quant_method": "quark", "global_quant_config": everything, "exclude": ["lm_head"], "version": "0.13"}
    return section | {"export": {"pack_method": order, "weight_format": "real_quantized"}} | more


def packed(codes: torch.Tensor, order: str) -> torch.Tensor:
    """int32 of eight codes along the last axis, padded with zeros."""
    codes = torch.nn.functional.pad(codes & 15, (0, -codes.shape[-1] % 8))
    return pack_order(codes) if order == "reorder" else pack(codes, 4)


def named(module: str, tensors: Tensors) -> Tensors:
    return {f"{module}.{leaf}": t for leaf, t in tensors.items()}


def opened(write: Write, tensors: Tensors, section: dict[str, Any], **options: Any) -> Checkpoint:
    return open_checkpoint(write(tensors, section | {"exclude": []}, **options))


def refused(action: Callable[[], object], match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as info:
        action()
    assert len(str(info.value)) < 6000


def integers(dtype: str, n: int = N, k: int = K) -> torch.Tensor:
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}[dtype]
    return torch.randint(low, high, (n, k), generator=G)


def scales(*shape: int) -> torch.Tensor:
    return (torch.rand(shape, generator=G) + 0.1).bfloat16()


# ---------------------------------------------------------------- weights


@given(st.integers(1, 5), st.integers(1, 6), st.randoms(use_true_random=False))
def test_the_order_of_nibbles(rows: int, words: int, random: Any) -> None:
    codes = torch.tensor([[random.randrange(16) for _ in range(8 * words)] for _ in range(rows)], dtype=torch.uint8)
    stored = pack_order(codes)
    assert torch.equal(unpack_order(stored), codes)
    word = int(stored[0, 0]) & 0xFFFFFFFF  # nibble i holds element [0, 2, 4, 6, 1, 3, 5, 7][i]
    assert [(word >> 4 * i) & 15 for i in range(8)] == [int(codes[0, j]) for j in (0, 2, 4, 6, 1, 3, 5, 7)]


@pytest.mark.parametrize("order", ["reorder", "order"])
@pytest.mark.parametrize("dtype", ["int4", "uint4"])
@pytest.mark.parametrize("n", [N, 21])
def test_groups_of_four_bits(write_checkpoint: Write, dtype: str, order: str, n: int) -> None:
    codes, scale = integers(dtype, n), scales(n, K // S)
    zero = integers(dtype, n, K // S) if dtype == "uint4" else torch.zeros(n, K // S, dtype=torch.int64)
    t = {"weight": packed(codes.t(), order), "weight_scale": scale.t(), "weight_zero_point": packed(zero.t(), order)}
    w = spec(dtype, "per_group", group_size=S, symmetric=dtype == "int4")
    ckpt = opened(write_checkpoint, named(Q, t), config(record(w), order))
    wanted = (codes - zero.repeat_interleave(S, 1)) * scale.float().repeat_interleave(S, 1)
    assert torch.equal(ckpt.stored(Q), wanted)
    other = {"reorder": "order", "order": "reorder"}[order]
    if n % 8 == 0:  # only the configuration tells the orders apart
        swapped = opened(write_checkpoint, named(Q, t), config(record(w), other), name="swapped")
        assert not torch.equal(swapped.stored(Q), wanted)


@pytest.mark.parametrize("order", ["reorder", "order"])
def test_channels_of_four_bits(write_checkpoint: Write, order: str) -> None:
    codes, scale, zero = integers("uint4"), scales(N), integers("uint4", 1, N)[0]
    t = {"weight": packed(codes, order), "weight_scale": scale, "weight_zero_point": packed(zero[None], order)[0]}
    ckpt = opened(write_checkpoint, named(Q, t), config(record(spec("uint4", symmetric=False)), order))
    assert torch.equal(ckpt.stored(Q), (codes - zero[:, None]) * scale.float()[:, None])


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_eight_bits(write_checkpoint: Write, dtype: str) -> None:
    storage = torch.int8 if dtype == "int8" else torch.uint8
    codes, zero = integers(dtype), integers(dtype, 1, N)[0]
    t = {"weight": codes.to(storage), "weight_scale": scales(N), "weight_zero_point": zero.to(storage)}
    ckpt = opened(write_checkpoint, named(Q, t), config(record(spec(dtype, symmetric=False))))
    assert torch.equal(ckpt.stored(Q), (codes - zero[:, None]) * t["weight_scale"].float()[:, None])
    scale, zero = scales(N, K // S), integers(dtype, N, K // S)
    t = {"weight": codes.t().to(storage), "weight_scale": scale.t(), "weight_zero_point": zero.t().to(storage)}
    grouped = spec(dtype, "per_group", group_size=S, symmetric=False)
    ckpt = opened(write_checkpoint, named(Q, t), config(record(grouped)), name="groups")
    wanted = (codes - zero.repeat_interleave(S, 1)) * scale.float().repeat_interleave(S, 1)
    assert torch.equal(ckpt.stored(Q), wanted)


@pytest.mark.parametrize(
    ("weight", "shape", "name"),
    [
        (spec("fp8_e4m3", "per_tensor"), (), "e4m3fn.tensor*bf16"),
        (spec("fp8_e4m3"), (N,), "e4m3fn.row*bf16"),
        (spec("fp8_e4m3"), (N, 1), "e4m3fn.row*bf16"),
        (spec("fp8_e5m2"), (N,), "e5m2.row*bf16"),
        (spec("fp8_e4m3", "per_group", group_size=S), (N, K // S), "e4m3fn.g32*bf16"),
        (spec("fp8_e4m3", "per_block", block_size=[S, S]), (1, 2), "e4m3fn.32x32*bf16"),
        (mx("fp8_e4m3"), (N, K // S), "e4m3fn.g32*e8m0"),
    ],
)
def test_eight_bit_floats(write_checkpoint: Write, weight: dict[str, Any], shape: tuple[int, ...], name: str) -> None:
    dtype = torch.float8_e5m2 if "e5m2" in weight["dtype"] else torch.float8_e4m3fn
    codes = torch.randn(N, K, generator=G).to(dtype)
    scale = scales(*shape)
    if "e8m0" in name:
        scale = torch.randint(100, 130, shape, generator=G).to(torch.uint8)
    ckpt = opened(write_checkpoint, named(Q, {"weight": codes, "weight_scale": scale}), config(record(weight)))
    assert str(ckpt.format(Q).weight) == name
    value = torch.exp2(scale.float() - 127) if "e8m0" in name else scale.float()
    value = value[:, None] if value.dim() == 1 else value
    if value.dim() == 2 and value.shape[1] > 1:
        value = value.repeat_interleave(S, 1).repeat_interleave(S if "x" in name else 1, 0)[:N]
    assert torch.equal(ckpt.stored(Q), codes.float() * value)


@pytest.mark.parametrize(("dtype", "bits"), [("fp4", 4), ("fp6_e3m2", 6), ("fp6_e2m3", 6)])
def test_microscaling(write_checkpoint: Write, dtype: str, bits: int) -> None:
    exponents = torch.randint(100, 130, (N, K // 32), generator=G).to(torch.uint8)
    raw = torch.randint(0, 256, (N, K * bits // 8), generator=G).to(torch.uint8)
    if bits == 4:
        codes = torch.stack([raw & 15, raw >> 4], -1).flatten(1)
        assert torch.equal(pack_nibbles(codes), raw)
    else:
        codes = unpack_six(raw)
    exponent_bits, mantissa_bits = {"fp4": (2, 1), "fp6_e3m2": (3, 2), "fp6_e2m3": (2, 3)}[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa, exponent = codes % 2**mantissa_bits, (codes >> mantissa_bits) % 2**exponent_bits
    normal = (1 + mantissa / 2**mantissa_bits) * torch.exp2(exponent.float() - bias)
    value = torch.where(exponent == 0, mantissa / 2**mantissa_bits * 2.0 ** (1 - bias), normal)
    value = value * torch.where(codes >> (bits - 1) == 1, -1.0, 1.0)
    wanted = value * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    t = {"weight": raw, "weight_scale": exponents}
    ckpt = opened(write_checkpoint, named(Q, t), config(record(mx(dtype), mx(dtype, is_dynamic=True))))
    assert torch.equal(ckpt.stored(Q), wanted)


@pytest.mark.parametrize("outer", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("inner", ["per_channel", "per_group"])
def test_two_stages(write_checkpoint: Write, outer: str, inner: str) -> None:
    codes = integers("int4")
    first = scales() if outer == "per_tensor" else scales(N)
    second = scales(N) if inner == "per_channel" else scales(N, K // S)
    grouped = inner == "per_group"
    t = {"weight": packed(codes.t() if grouped else codes, "reorder"), "weight_scale": first}
    t |= {"weight_scale_2": second.t() if grouped else second}
    stages = [spec("fp8_e4m3", outer), spec("int4", inner, group_size=S if grouped else None)]
    ckpt = opened(write_checkpoint, named(Q, t), config(record(stages)))
    fine = second.float().repeat_interleave(S, 1) if grouped else second.float()[:, None]
    coarse = first.float() if outer == "per_tensor" else first.float()[:, None]
    assert torch.equal(ckpt.stored(Q), codes * (fine * coarse))
    half = ckpt.linear_spec(Q, (0, 1, 2)).stored()
    assert torch.equal(half, ckpt.stored(Q)[N // 2 :])


def test_old_names(write_checkpoint: Write) -> None:
    t: Tensors = {"weight": integers("int8").to(torch.int8), "weight_quantizer.scale": scales(N)}
    t |= {"weight_quantizer.zero_point": torch.zeros(N).to(torch.int8), "input_quantizer.scale": torch.tensor(0.5)}
    section = config(record(spec("int8"), spec("int8", "per_tensor")))
    ckpt = opened(write_checkpoint, named(Q, t), section)
    assert torch.equal(ckpt.stored(Q), t["weight"] * t["weight_quantizer.scale"].float()[:, None])
    assert ckpt.spec(Q).input is not None
    both = write_checkpoint(named(Q, t | {"weight_scale": scales(N)}), section, name="both")
    refused(lambda: open_checkpoint(both), "the same thing under two names")


# ---------------------------------------------------------------- inputs, caches, experts


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        (spec("int8", "per_channel", ch_axis=1, is_dynamic=True), "int8.row*fp32@qmax=127.5"),
        (spec("fp8_e4m3", "per_channel", ch_axis=-1, is_dynamic=True), "e4m3fn.row*fp32"),
        (spec("fp8_e4m3", "per_tensor", is_dynamic=True), "e4m3fn.tensor*fp32"),
        (spec("fp8_e4m3", "per_group", group_size=S, is_dynamic=True), "e4m3fn.g32*fp32"),
        (spec("int8", "per_channel", ch_axis=1, is_dynamic=True, symmetric=False), "int8-int8.row*fp32@domain=minmax"),
        (mx("fp4", is_dynamic=True), "e2m1.g32*e8m0@e8m0=even"),
        (mx("fp4", is_dynamic=True, scale_calculation_mode="floor"), "e2m1.g32*e8m0"),
        (mx("fp6_e3m2", is_dynamic=True, scale_calculation_mode="ceil"), "e3m2.g32*e8m0@qmax=16,e8m0=ceil"),
        (mx("fp8_e4m3", is_dynamic=True, scale_calculation_mode="even"), "e4m3fn.g32*e8m0@e8m0=even"),
    ],
)
def test_dynamic_inputs(write_checkpoint: Write, inputs: dict[str, Any], name: str) -> None:
    t = {"weight": integers("int8").to(torch.int8), "weight_scale": scales(N)}
    ckpt = opened(write_checkpoint, named(Q, t), config(record(spec("int8"), inputs)))
    assert str(ckpt.format(Q).input) == name
    y = ckpt.load_linear(Q, qhal.select("cpu_reference"))(torch.randn(3, K, generator=G).bfloat16())
    assert y.shape == (3, N) and bool(torch.isfinite(y).all())


def test_static_inputs_with_a_zero_point(write_checkpoint: Write) -> None:
    t = {"weight": integers("int8").to(torch.int8), "weight_scale": scales(N), "input_scale": torch.tensor(0.25)}
    t["input_zero_point"] = torch.tensor(3, dtype=torch.int8)
    inputs = spec("int8", "per_tensor", symmetric=False)
    spec_ = opened(write_checkpoint, named(Q, t), config(record(spec("int8"), inputs))).spec(Q)
    assert spec_.input is not None and str(spec_.input.format) == "int8-int8.tensor*fp32"
    assert spec_.input.scale is not None and spec_.input.zero is not None
    assert (spec_.input.scale.item(), spec_.input.zero.item()) == (0.25, 3)
    lying = opened(write_checkpoint, named(Q, t), config(record(spec("int8"), spec("int8", "per_tensor"))), name="l")
    refused(lambda: lying.spec(Q), r"input_zero_point: expected 0, as symmetric is true, found \[3\]")


KV = spec("fp8_e4m3", "per_tensor")
CACHED = record(spec("int8"), None, KV)


def cached(change: dict[str, Any] | None = None) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    for p in "kv":
        tensors |= named(f"{A}.{p}_proj", {"weight": integers("int8").to(torch.int8), "weight_scale": scales(N)})
        tensors[f"{A}.{p}_proj.output_scale"] = torch.tensor(0.25 if p == "k" else 0.5).bfloat16()
    plain = record(spec("int8"))
    layers = {f"*{p}_proj": record(spec("int8"), None, KV | (change or {})) for p in "kv"}
    return tensors, config(plain, layer_quant_config=layers, kv_cache_quant_config=copy.deepcopy(layers))


def test_caches(write_checkpoint: Write) -> None:
    tensors, section = cached()
    model = {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 12, "num_hidden_layers": 1}
    ckpt = opened(write_checkpoint, tensors, section, model=model)
    spec_ = ckpt.kv_format(0)
    assert spec_ is not None and spec_.k.scale is not None and spec_.v.scale is not None
    assert (spec_.k.scale.item(), spec_.v.scale.item()) == (0.25, 0.5)
    assert str(spec_.format) == "mha(k=e4m3fn.tensor*bf16, v=e4m3fn.tensor*bf16)"
    assert (spec_.heads, spec_.k_dim) == (2, 12)


@pytest.mark.parametrize(
    ("change", "more", "match"),
    [
        ({}, {"kv_cache_post_rope": True}, "unsupported: .*kv_cache_post_rope"),
        ({"is_dynamic": True}, {}, "unsupported: .*a cache of dynamic fp8_e4m3 per_tensor"),
        ({"dtype": "fp8_e5m2"}, {}, "unsupported: .*a cache of fp8_e5m2"),
        (
            {},
            {"layer_quant_config": {"*k_proj": record(spec("int8"), None, KV)}},
            "both caches of .*, found 'no v_proj'",
        ),
        (
            {},
            {"global_quant_config": record(spec("int8"), None, KV), "layer_quant_config": {}, "q": 1},
            "outputs of .*q_proj",
        ),
    ],
)
def test_caches_that_are_not_read(write_checkpoint: Write, change: Any, more: dict[str, Any], match: str) -> None:
    tensors, section = cached(change)
    if "v_proj" in match:
        del tensors[f"{A}.v_proj.output_scale"]
    if more.pop("q", None):
        tensors |= named(Q, {"weight": integers("int8").to(torch.int8), "weight_scale": scales(N)})
    refused(lambda: opened(write_checkpoint, tensors, section | more), match)


def test_experts_of_gpt_oss(write_checkpoint: Write) -> None:
    """Modules of their own that hold gate and up in turns, with biases and static inputs that differ."""
    tensors: Tensors = {}
    for e in range(2):
        for name, (n, k) in {"gate_up_proj": (64, 64), "down_proj": (64, 32)}.items():
            raw = torch.randint(0, 256, (n, k // 2), generator=G).to(torch.uint8)
            exponents = torch.randint(120, 126, (n, k // 32), generator=G).to(torch.uint8)
            t = {"weight": raw, "weight_scale": exponents, "bias": scales(n), "input_scale": scales() * (e + 1)}
            tensors |= named(f"{P}.{e}.{name}", t)
    section = config(record(mx("fp4"), spec("fp8_e4m3", "per_tensor")))
    ckpt = opened(write_checkpoint, tensors, section, model={"model_type": "gpt_oss", "swiglu_limit": 7.0})
    spec_ = ckpt.experts_spec(P)
    assert spec_.activation.name == "swiglu" and spec_.gate_up.input is not None and spec_.gate_up.input.per_expert
    for e in range(2):
        w = ckpt.stored(f"{P}.{e}.gate_up_proj")
        assert torch.equal(spec_.gate_up.stored()[e], torch.cat([w[0::2], w[1::2]]))
        bias = ckpt.tensor(f"{P}.{e}.gate_up_proj.bias").float()
        assert spec_.gate_up.bias is not None
        assert torch.equal(spec_.gate_up.bias[e], torch.cat([bias[0::2], bias[1::2]]))
    layer = ckpt.load_experts(P, qhal.select("cpu_reference"))
    y = layer(torch.randn(4, 64, generator=G).bfloat16(), Offsets(torch.tensor([0, 2, 4], dtype=torch.int32)))
    assert y.shape == (4, 64) and bool(torch.isfinite(y).all())


# ---------------------------------------------------------------- matching


def int8_modules(*modules: str) -> Tensors:
    tensors: Tensors = {}
    for module in modules:
        tensors |= named(module, {"weight": integers("int8").to(torch.int8), "weight_scale": scales(N)})
    return tensors


def test_exact_names_win_then_the_first_pattern(write_checkpoint: Write) -> None:
    e4m3, q = torch.randn(N, K, generator=G).to(torch.float8_e4m3fn), int8_modules(Q)
    tensors = q | named(D, {"weight": e4m3, "weight_scale": scales()})
    fp8 = record(spec("fp8_e4m3", "per_tensor"))
    layers = {"*proj": fp8, "*q_proj": record(spec("int4")), Q: record(spec("int8"))}
    ckpt = opened(write_checkpoint, tensors, config(record(spec("int4")), layer_quant_config=layers))
    assert str(ckpt.format(Q).weight) == "int8.row*bf16" and str(ckpt.format(D).weight) == "e4m3fn.tensor*bf16"


def test_layer_types_come_before_the_rest(write_checkpoint: Write) -> None:
    section = config(record(spec("int4")), layer_type_quant_config={"Linear": record(spec("int8"))})
    assert str(opened(write_checkpoint, int8_modules(Q), section).format(Q).weight) == "int8.row*bf16"


def test_patterns_never_reach_children(write_checkpoint: Write) -> None:
    plain = {f"{D}.weight": torch.ones(N, K).bfloat16()}
    section = config(record(spec("int8")))
    part = write_checkpoint(int8_modules(Q) | plain, section | {"exclude": ["model.layers.0.mlp"]}, name="a")
    refused(lambda: open_checkpoint(part), f"{D}: global_quant_config quantizes it, but the file holds a plain weight")
    fine = write_checkpoint(int8_modules(Q) | plain, section | {"exclude": ["*.mlp.*"]}, name="b")
    assert open_checkpoint(fine).excluded == {D: "exclude '*.mlp.*'"}
    lying = write_checkpoint(int8_modules(Q, D), section | {"exclude": ["*.mlp.*"]}, name="c")
    refused(lambda: open_checkpoint(lying), f"{D}: excluded by exclude .*but the file holds quantized tensors")


def test_quantized_embeddings_are_refused(write_checkpoint: Write) -> None:
    section = config(record(spec("int8")))
    refused(lambda: opened(write_checkpoint, int8_modules("model.embed_tokens"), section), "unsupported: .*embedding")


def test_a_router_needs_no_exclude_entry(write_checkpoint: Write) -> None:
    router = {"model.layers.0.mlp.gate.weight": torch.ones(4, K).bfloat16()}
    ckpt = opened(write_checkpoint, int8_modules(Q) | router, config(record(spec("int8"))))
    assert ckpt.excluded == {"model.layers.0.mlp.gate": "a router with a class of its own is no Linear"}


def test_experts_that_were_left_plain(write_checkpoint: Write) -> None:
    fused = {f"{P}.gate_up_proj": torch.ones(2, 8, 8).bfloat16(), f"{P}.down_proj": torch.ones(2, 8, 4).bfloat16()}
    section = config(record(spec("int8")))
    folder = write_checkpoint(int8_modules(Q) | fused, section, name="a")
    refused(lambda: open_checkpoint(folder), rf"holds plain experts, but .*; add '{P}' to exclude to keep them plain")
    kept = write_checkpoint(int8_modules(Q) | fused, section | {"exclude": [P]}, name="b")
    assert open_checkpoint(kept).modules(quantized=True) == (Q,)


# ---------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (spec("mx"), "unsupported: .*weight.dtype: 'mx'; can be read: fp8_e4m3, "),
        (spec("int2"), "unsupported: .*dtype: 'int2'"),
        (spec("int8", "per_token"), "qscheme: expected one of per_tensor"),
        (spec("int8", ch_axis=1), "unsupported: .*ch_axis 1 with per_channel"),
        (spec("int8", ch_axis="x"), "ch_axis: expected an axis of a 2-D tensor"),
        (spec("int8", "per_group"), "group_size: expected a positive integer, found None"),
        (spec("int8", is_dynamic=True), "is_dynamic: expected false"),
        (spec("int8", symmetric="yes"), "symmetric: expected true or false"),
        (spec("fp8_e4m3", symmetric=False), "symmetric: expected true or null for fp8_e4m3"),
        (spec("int8", scale_format="e5m3"), "unsupported: .*scale_format: 'e5m3'"),
        (spec("int8", scale_format="e8m0"), "scale_format: expected no e8m0 for int8"),
        (mx("fp4", scale_format=None), "scale_format: expected e8m0 for fp4"),
        (mx("fp4", qscheme="per_channel"), "qscheme: expected per_group for fp4"),
        (spec("int8", zero_point_type="float32"), "unsupported: .*float zero points"),
        (spec("int8", is_scale_quant=True), "unsupported: .*quantized scales"),
        ([spec("int8"), spec("int4")], "unsupported: .*int8 per_channel then int4 per_channel; two stages can be"),
        (spec("int4"), "weight: expected I32"),
        ("int8", "weight: expected an object"),
    ],
)
def test_specs(write_checkpoint: Write, weight: Any, match: str) -> None:
    refused(lambda: opened(write_checkpoint, int8_modules(Q), config(record(weight))), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"export": {"weight_format": "fake_quantized"}}, "unsupported: .*weight_format: 'fake_quantized'"),
        ({"export": {"pack_method": "random"}}, "pack_method: expected reorder or order, found 'random'"),
        ({"export": []}, None),
        ({"export": [1]}, "export: expected an object"),
        ({"algo_config": [{"name": "svdquant"}]}, "unsupported: .*'svdquant'; can be read: smooth, .*rotation"),
        ({"algo_config": [{"name": "rotation", "r4": True}]}, r"unsupported: .*r4: rotations that are applied online"),
        ({"algo_config": [{"name": "rotation", "online_r1_rotation": True}]}, "unsupported: .*online_r1_rotation"),
        ({"algo_config": {"name": "awq"}}, None),
        ({"algo_config": [3]}, "algo_config.0.: expected an object with a name"),
        ({"softmax_quant_spec": spec("fp8_e4m3")}, "unsupported: .*softmax_quant_spec"),
        ({"global_quant_config": None}, "global_quant_config: expected an object"),
        ({"layer_quant_config": [1]}, "layer_quant_config: expected an object of records"),
        ({"exclude": "lm_head"}, "exclude: expected a list of names"),
        ({"global_quant_config": record(spec("int8"), [KV, KV])}, "unsupported: .*input_tensors: 2 stages"),
        ({"global_quant_config": record(spec("int8")) | {"bias": KV}}, "unsupported: .*quantized biases"),
        ({"global_quant_config": record(spec("int8"), spec("int8"))}, "unsupported: .*inputs int8 per_channel"),
        ({"global_quant_config": record(None)}, "global_quant_config quantizes no weight, but the file holds"),
    ],
)
def test_configurations(write_checkpoint: Write, change: dict[str, Any], match: str | None) -> None:
    folder = write_checkpoint(int8_modules(Q), config(record(spec("int8"))) | {"exclude": []} | change)
    if match is None:
        assert open_checkpoint(folder).stored(Q).shape == (N, K)
    else:
        refused(lambda: open_checkpoint(folder), match)


def test_patterns_that_name_nothing(write_checkpoint: Write) -> None:
    layers = {"*k_proj": record(spec("int8"))}
    with pytest.warns(CheckpointWarning, match=r"layer_quant_config: '\*k_proj' matches no module"):
        opened(write_checkpoint, int8_modules(Q), config(record(spec("int8")), layer_quant_config=layers))


def test_unknown_keys_are_named(write_checkpoint: Write) -> None:
    section = config(record(spec("int8", new_idea=1)))
    with pytest.warns(CheckpointWarning, match=r"weight\.new_idea: no key of Quark"):
        opened(write_checkpoint, int8_modules(Q), section)


@pytest.mark.parametrize(
    ("leaf", "value", "match"),
    [
        ("weight_scale", None, "weight_scale is missing"),
        ("weight_scale", torch.ones(N + 1), rf"weight_scale: expected .*\[{N}\], found F32 \[{N + 1}\]"),
        ("weight_scale", torch.ones(N).double(), "weight_scale: expected"),
        ("weight_scale", torch.full((N,), float("nan")), f"{N} NaN, 0 Inf, 0 zero of {N}"),
        ("weight_zero_point", torch.ones(N).to(torch.int8), f"expected zeros, as symmetric is true, found {N} other"),
        ("weight_zero_point", torch.ones(N), "weight_zero_point: expected"),
        ("input_scale", torch.ones(1), "input_scale is extra"),
        ("input_rotation", torch.ones(4, 4).to(torch.int8), "input_rotation is extra"),
        ("bias", torch.ones(3), "bias: expected"),
    ],
)
def test_tensors(write_checkpoint: Write, leaf: str, value: torch.Tensor | None, match: str) -> None:
    tensors = {n: t for n, t in int8_modules(Q).items() if value is not None or not n.endswith(leaf)}
    tensors |= {f"{Q}.{leaf}": value} if value is not None else {}
    refused(lambda: opened(write_checkpoint, tensors, config(record(spec("int8")))).spec(Q), match)


def test_padding_must_be_zero(write_checkpoint: Write) -> None:
    t = {"weight": packed(integers("int4", 21).t(), "order"), "weight_scale": scales(K // S, 21)}
    t["weight"][:, -1] |= 1 << 28
    w = spec("int4", "per_group", group_size=S)
    ckpt = opened(write_checkpoint, named(Q, t), config(record(w), "order"))
    refused(lambda: ckpt.spec(Q), "zeros behind the 21 codes of a row")
