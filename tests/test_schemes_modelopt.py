"""ModelOpt: every algorithm against its arithmetic written out; layers that are fused, cut or stacked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qhal
from qhal.encoding import encode
from qhal.errors import ShardError
from qhal.layer_formats import ExpertsFormat
from qhal_schemes import open_checkpoint
from qhal_schemes.modelopt_algorithms import ALGORITHMS
from qhal_schemes.packing import pack_int4, pack_nibbles, unpack_int4

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
N, K = 64, 128
L = "model.layers.0."
Q, D = L + "self_attn.q_proj", L + "mlp.down_proj"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def side(algo: str | None, cache: str | None = None, **more: Any) -> dict[str, Any]:
    """hf_quant_config.json as the exporter writes it."""
    inner = {"quant_algo": algo, "kv_cache_quant_algo": cache, "exclude_modules": ["lm_head"], **more}
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": inner}


def store(write: Write, tensors: Tensors, algo: dict[str, Any], **arguments: Any) -> Path:
    """A folder whose only description is hf_quant_config.json."""
    folder = write({"lm_head.weight": torch.ones(8, K).bfloat16()} | tensors, **arguments)
    (folder / "hf_quant_config.json").write_text(json.dumps(algo))
    return folder


def parts(algo: str, n: int = N, k: int = K, seed: int = 0) -> tuple[Tensors, torch.Tensor]:
    """The tensors of one module, and its stored weight by the arithmetic of the algorithm."""
    g = torch.Generator().manual_seed(seed)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g) * 0.9 + 0.1

    def whole(*shape: int, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g)

    def spread(s: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return s.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]

    t: Tensors = {}
    if algo.startswith("FP8"):
        codes = torch.randn(n, k, generator=g).mul(20).to(torch.float8_e4m3fn)
        t["weight"] = codes
        if algo == "FP8":
            t["weight_scale"] = scales()
            w = codes.float() * t["weight_scale"]
        elif algo == "FP8_PB_WO":
            t["weight_scale"] = scales(-(-n // 128), 1, -(-k // 128), 1)
            w = codes.float() * spread(t["weight_scale"][:, 0, :, 0], 128, 128)
        else:
            t["weight_scale"] = scales(n)
            w = codes.float() * t["weight_scale"][:, None]
    elif algo.startswith("W8A"):
        t["weight"] = whole(n, k, low=-127, high=128).to(torch.int8)
        t["weight_scale"] = scales(n)
        w = t["weight"].float() * t["weight_scale"][:, None]
    elif "AWQ" in algo and "NVFP4" not in algo:
        codes = whole(n, k, low=-8, high=8)
        t["weight"] = pack_int4(codes, 0).view(torch.uint8)
        t["weight_scale"] = scales(n, k // 64)
        w = codes.float() * spread(t["weight_scale"], 1, 64)
    elif algo == "MXFP8":
        t["weight"] = torch.randn(n, k, generator=g).to(torch.float8_e4m3fn)
        t["weight_scale"] = whole(n, k // 32, low=120, high=130).to(torch.uint8)
        w = t["weight"].float() * spread(torch.exp2(t["weight_scale"].float() - 127), 1, 32)
    else:
        codes = whole(n, k, low=0, high=16)
        t["weight"] = pack_nibbles(codes.to(torch.uint8))
        group = 16 if algo in ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4") else 32
        if "MXFP4" in algo:
            t["weight_scale"] = whole(n, k // group, low=120, high=130).to(torch.uint8)
            w = E2M1[codes] * spread(torch.exp2(t["weight_scale"].float() - 127), 1, group)
        else:
            t["weight_scale"] = (scales(n, k // group) * 448).to(torch.float8_e4m3fn)
            t["weight_scale_2"] = scales() / 100
            w = E2M1[codes] * spread(t["weight_scale"].float() * t["weight_scale_2"], 1, group)
    if algo == "W4A8_AWQ":
        t["weight_scale_2"] = w.abs().max() / 448
    if ALGORITHMS[algo].static:
        t["input_scale"] = torch.tensor(0.01)
    if algo in ("W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ", "NVFP4_SVD", "W8A8_SQ_PER_CHANNEL"):
        t["pre_quant_scale"] = (torch.rand(k, generator=torch.Generator().manual_seed(9)) + 0.5).bfloat16()
    if algo == "NVFP4_SVD":
        t["svdquant_lora_a"] = torch.randn(4, k, generator=g).bfloat16()
        t["svdquant_lora_b"] = torch.randn(n, 4, generator=g).bfloat16()
    return t, w


def module(name: str, tensors: Tensors) -> Tensors:
    return {f"{name}.{leaf}": t for leaf, t in tensors.items()}


# ---------------------------------------------------------------- algorithms


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_by_its_arithmetic(write_checkpoint: Write, algo: str) -> None:
    """Decoding to the bit; the layer as x * pre_quant_scale, quantized, times the weight, plus the low-rank branch."""
    t, w = parts(algo)
    t["bias"] = torch.linspace(-1, 1, N)
    written = algo.lower() if algo in ("FP8_PB_WO", "MXFP4") else algo
    ckpt = open_checkpoint(
        store(write_checkpoint, module(Q, t), side(written, group_size=64 if "A8_AWQ" in algo else 0))
    )
    assert torch.equal(ckpt.stored(Q), w)
    assert not ckpt.account.extra and set(ckpt.account.consumed) == set(module(Q, t))
    ops, spec = qhal.select("cpu_reference"), ckpt.spec(Q)
    plan = qhal.resolve(ckpt, ops, policy="exact")
    assert len(plan.entries) == 1 + ("pre_quant_scale" in t)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    turned = x * t["pre_quant_scale"].float() if "pre_quant_scale" in t else x
    q = turned
    if spec.input is not None:
        assert (spec.input.scale is None) == (not ALGORITHMS[algo].static)
        q = encode(turned, spec.input.format, scale=t.get("input_scale")).dequantize()
    used = w
    if algo == "W4A8_AWQ":
        used = (w / t["weight_scale_2"]).to(torch.float8_e4m3fn).float() * t["weight_scale_2"]
    y = q.double() @ used.double().T + t["bias"]
    if algo == "NVFP4_SVD":
        branch = turned.double() @ t["svdquant_lora_a"].double().T @ t["svdquant_lora_b"].double().T
        y = y + branch
    got = ckpt.load_linear(Q, ops, dtype=torch.float32)(x)
    size = q.abs().double() @ used.abs().double().T + 1 + (y.abs() + branch.abs() if algo == "NVFP4_SVD" else 0)
    assert bool(((got - y).abs() <= size * (K + 4) * 2.0**-24).all())


@pytest.mark.parametrize("names", ["weight_quantizer.svdquant_lora_{}", "weight_quantizer._svdquant_lora_{}"])
def test_low_rank_factors_under_older_names(write_checkpoint: Write, names: str) -> None:
    t, w = parts("NVFP4_SVD")
    a, b = t.pop("svdquant_lora_a"), t.pop("svdquant_lora_b")
    t |= {names.format("a"): a, names.format("b"): b}
    ckpt = open_checkpoint(store(write_checkpoint, module(Q, t), side("NVFP4_SVD", group_size=16)))
    want = (w.double() + b.double() @ a.double()) * t["pre_quant_scale"].double()
    assert ckpt.format(Q).low_rank == 4 and torch.equal(ckpt.dequantize(Q), want.float())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_rows_packed_in_pairs(pairs: int, k: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (2 * pairs, k), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_int4(codes, 0).view(torch.uint8)
    assert packed.dtype == torch.uint8 and torch.equal(unpack_int4(packed, 0), codes)
    byte = int(packed[0, 0])
    assert (byte & 15, byte >> 4) == (int(codes[0, 0]) % 16, int(codes[1, 0]) % 16)


# ---------------------------------------------------------------- fused and cut


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_shards_are_shards_of_the_decoded_weight(write_checkpoint: Write, algo: str) -> None:
    n, k = (256, 256) if algo == "FP8_PB_WO" else (N, K)
    t, w = parts(algo, n, k)
    ckpt = open_checkpoint(store(write_checkpoint, module(D, t), side(algo)))
    whole = ckpt.dequantize(D)
    for dim in (0, 1):
        for rank in range(2):
            spec = ckpt.linear_spec(D, shard=(dim, rank, 2))
            assert torch.equal(spec.stored(), w.chunk(2, dim)[rank])
            assert torch.equal(spec.effective(), whole.chunk(2, dim)[rank])


@pytest.mark.parametrize("algo", [a for a in ALGORITHMS if a != "NVFP4_SVD"])
def test_fused_projections(write_checkpoint: Write, algo: str) -> None:
    tensors, weights = {}, []
    for i, name in enumerate("qkv"):
        t, w = parts(algo, 128 if algo == "FP8_PB_WO" else N, seed=i)
        if algo == "W4A8_AWQ":
            t["weight_scale_2"] = torch.tensor(0.02)  # the exporter gives fused layers one
        tensors |= module(f"{L}self_attn.{name}_proj", t)
        weights.append(w)
    ckpt = open_checkpoint(store(write_checkpoint, tensors, side(algo)))
    fused = ckpt.linear_spec(L + "self_attn.qkv_proj")
    assert torch.equal(fused.stored(), torch.cat(weights))
    layer = ckpt.load_linear(L + "self_attn.qkv_proj", qhal.select("cpu_reference"))
    assert layer(torch.ones(2, K).bfloat16()).shape == (2, 3 * weights[0].shape[0])


def test_what_cannot_be_fused_says_why(write_checkpoint: Write) -> None:
    tensors = {}
    for i, name in enumerate(("gate", "up")):
        tensors |= module(f"{L}mlp.{name}_proj", parts("NVFP4_SVD", seed=i)[0])
    ckpt = open_checkpoint(store(write_checkpoint, tensors, side("NVFP4_SVD")))
    with pytest.raises(ShardError, match="low-rank branch belongs to one projection"):
        ckpt.linear_spec(L + "mlp.gate_up_proj")
    name = f"{L}mlp.up_proj.input_scale"
    tensors = {k: v for k, v in tensors.items() if "lora" not in k} | {name: torch.tensor(0.5)}
    ckpt = open_checkpoint(store(write_checkpoint, tensors, side("NVFP4_AWQ"), name="b"))
    with pytest.raises(ShardError, match="their input quantization differs"):
        ckpt.linear_spec(L + "mlp.gate_up_proj")


@pytest.mark.parametrize("algo", ["FP8", "NVFP4", "MXFP4", "W8A16", "W4A16_NVFP4"])
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_experts(write_checkpoint: Write, algo: str, names: tuple[str, str, str]) -> None:
    prefix, tensors = L + "mlp.experts", {L + "mlp.gate.weight": torch.randn(2, K).bfloat16()}
    for e in range(2):
        for i, name in enumerate(names):
            n, k = (K, N) if i == 2 else (N, K)
            tensors |= module(f"{prefix}.{e}.{name}", parts(algo, n, k, seed=3 * e + i)[0])
        if algo == "NVFP4":  # the exporter gives gate and up one outer scale
            tensors[f"{prefix}.{e}.{names[1]}.weight_scale_2"] = tensors[
                f"{prefix}.{e}.{names[0]}.weight_scale_2"
            ].clone()
    ckpt = open_checkpoint(store(write_checkpoint, tensors, side(algo, exclude_modules=["lm_head", L + "mlp.gate"])))
    assert isinstance(ckpt.experts_format(prefix), ExpertsFormat)
    ops = qhal.select("cpu_reference")
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(5))
    layer, offsets = ckpt.load_experts(prefix, ops, dtype=torch.float32), torch.tensor([0, 2, 6]).int()
    y = layer(x, qhal.Offsets(offsets))
    for e, rows in ((0, slice(0, 2)), (1, slice(2, 6))):
        gate, up, down = (ckpt.load_linear(f"{prefix}.{e}.{name}", ops, dtype=torch.float32) for name in names)
        want = down(torch.nn.functional.silu(gate(x[rows])) * up(x[rows]))
        # the hidden row of the two roads may differ in its last bit, and then fall into another code of the input
        assert (y[rows] - want).norm() <= 2e-2 * want.norm()
    second = ckpt.load_experts(prefix, ops, experts=(1, 1), dtype=torch.float32)
    assert torch.equal(second(x[2:], qhal.Offsets(torch.tensor([0, 4]).int())), y[2:])


@pytest.mark.parametrize(
    ("case", "prefix", "names"),
    [
        ("moe_mixtral_nvfp4_experts_only", L + "block_sparse_moe.experts", ("w1", "w3", "w2")),
        ("moe_qwen3_fp8", L + "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_of_the_golden_checkpoints(golden: Path, case: str, prefix: str, names: tuple[str, str, str]) -> None:
    folder = golden / "modelopt" / case
    if not folder.is_dir():
        pytest.skip(f"not among the golden checkpoints in {golden} (set QHAL_GOLDEN)")
    ckpt = open_checkpoint(folder / "checkpoint")
    spec = ckpt.experts_spec(prefix)
    for e in range(4):
        gate, up, down = (ckpt.stored(f"{prefix}.{e}.{name}") for name in names)
        assert torch.equal(spec.gate_up.stored()[e], torch.cat([gate, up]))
        assert torch.equal(spec.down.stored()[e], down)
    layer = ckpt.load_experts(prefix, qhal.select("cpu_reference"))
    assert layer(torch.ones(8, 128).bfloat16(), qhal.Offsets(torch.tensor([0, 2, 4, 6, 8]).int())).isfinite().all()
