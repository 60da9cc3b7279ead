"""What each checkpoint becomes: format names, inputs, caches, rotations, experts; planned and read alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.layer_formats import KVFormat
from qhal_schemes import open_checkpoint
from qhal_schemes.packing import pack, unsigned

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


# ---------------------------------------------------------------- golden formats by name

GOLDEN_FORMATS = {
    "compressed_tensors/w4a16_g128_sym": ("int4.g128*bf16", None),
    "compressed_tensors/w4a16_g128_asym": ("int4-int4.g128*bf16", None),
    "compressed_tensors/w4a16_channel_sym": ("int4.row*bf16", None),
    "compressed_tensors/w3a16_g32": ("int3.g32*bf16", None),
    "compressed_tensors/w8a16_g32": ("int8.g32*bf16", None),
    "compressed_tensors/w8a8_int8_dynamic_token": ("int8.row*bf16", "int8.row*bf16@qmax=127.5"),
    "compressed_tensors/w8a8_int8_static_tensor": ("int8.row*bf16", "int8.tensor*bf16"),
    "compressed_tensors/w4a8_int_g128": ("int4.g128*bf16", "int8.row*bf16@qmax=127.5"),
    "compressed_tensors/w4afp8_g128": ("int4.g128*bf16", "e4m3fn.row*bf16"),
    "compressed_tensors/fp8_channel_dynamic_token": ("e4m3fn.row*bf16", "e4m3fn.row*bf16"),
    "compressed_tensors/fp8_tensor_static": ("e4m3fn.tensor*bf16", "e4m3fn.tensor*bf16"),
    "compressed_tensors/fp8_block_128x128": ("e4m3fn.128x128*bf16", "e4m3fn.g128*bf16"),
    "compressed_tensors/nvfp4_w4a4": ("e2m1.g16*(e4m3fn.tensor/fp32)", "e2m1.g16*(e4m3fn.tensor/fp32)"),
    "compressed_tensors/nvfp4a16": ("e2m1.g16*(e4m3fn.tensor/fp32)", None),
    "compressed_tensors/mxfp4a16": ("e2m1.g32*e8m0", None),
    "compressed_tensors/mxfp8_w8a8": ("e4m3fn.g32*e8m0", "e4m3fn.g32*e8m0@e8m0=up1.75"),
    "compressed_tensors/sparse24_bitmask_fp8_ct013": ("e4m3fn.row*bf16%2:4", "e4m3fn.row*bf16"),
    "awq/autoawq_b4_g128_gemm": ("uint4-uint4.g128*fp16", None),
    "awq/b4_g64_gemm_sym": ("uint4-uint4.g64*bf16", None),
    "gptq/b4_g128_sym_v1": ("uint4-uint4.g128*fp16", None),
    "gptq/b4_g128_sym_desc_act_v1": ("uint4-uint4.g128*fp16", None),
    "gptq/b8_gm1_sym_v1": ("uint8-uint8.row*fp16", None),
    "gptq/b2_g32_sym_v2": ("uint2-uint2.g32*fp16", None),
}


def test_golden_cases_have_their_canonical_formats(golden: Path) -> None:
    present = {case: pair for case, pair in GOLDEN_FORMATS.items() if (golden / case).is_dir()}
    assert len(present) >= 4
    for case, (weight, given) in present.items():
        f = open_checkpoint(golden / case / "checkpoint").format(Q)
        assert str(f.weight) == weight, case
        assert (None if f.input is None else str(f.input)) == given, case
        static = "static" in case or case.endswith("nvfp4_w4a4")
        assert f.static_input == static, case
        assert f.group_index == ("desc_act" in case), case
        assert f == open_checkpoint(golden / case / "checkpoint").spec(Q).format


def test_one_group_needs_no_group_index(golden: Path) -> None:
    ckpt = open_checkpoint(golden / "gptq" / "b4_g128_sym_desc_act_v1" / "checkpoint")
    down = ckpt.format("model.layers.0.mlp.down_proj")
    assert down.k == 128 and not down.group_index
    assert ckpt.spec(down.name).format == down


def test_dynamic_overrides_of_gptq(golden: Path) -> None:
    case = golden / "gptq" / "b4_dynamic_mixed"
    if not case.is_dir():
        pytest.skip("needs the full golden set")
    ckpt = open_checkpoint(case / "checkpoint")
    assert str(ckpt.format("model.layers.0.mlp.down_proj").weight) == "uint8-uint8.g32*fp16"
    assert ckpt.excluded["model.layers.0.self_attn.o_proj"].startswith("dynamic '-:")


# ---------------------------------------------------------------- compressed-tensors


@pytest.mark.parametrize("version", ["0.13.0", "0.19.0", ""])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("asym", [False, True])
def test_packed_integers(write_checkpoint: Write, bits: int, version: str, strategy: str, asym: bool) -> None:
    n, k, size = 24, 96, 32
    aligned = version == "0.13.0"
    q = codes(bits, n, k)
    s = scale(n, k // size if strategy == "group" else 1)
    z = codes(bits, n, s.shape[1], 1)
    tensors = {
        f"{Q}.weight_packed": pack(unsigned(q, bits), bits, aligned=aligned),
        f"{Q}.weight_scale": s,
        f"{Q}.weight_shape": torch.tensor([n, k]),
    }
    if asym:
        tensors[f"{Q}.weight_zero_point"] = pack(unsigned(z, bits).t(), bits, aligned=aligned).t()
    weights = {"num_bits": bits, "strategy": strategy, "symmetric": not asym}
    weights |= {"group_size": size} if strategy == "group" else {}
    ckpt = open_checkpoint(write_checkpoint(tensors, ct(weights, "pack-quantized", version=version)))
    spread = s.float().repeat_interleave(k // s.shape[1], 1)
    zero = z.float().repeat_interleave(k // s.shape[1], 1) if asym else torch.zeros(n, k)
    assert torch.equal(ckpt.dequantize(Q), (q.float() - zero) * spread)
    block = f"g{size}" if strategy == "group" else "row"
    zero_name = f"-int{bits}" if asym else ""
    assert str(ckpt.format(Q).weight) == f"int{bits}{zero_name}.{block}*bf16"


@pytest.mark.parametrize(
    ("version", "aligned"), [("0.13.0", True), ("0.17.1", True), ("0.18.0", False), ("1.0", False)]
)
def test_the_version_decides_where_both_packings_have_one_width(
    write_checkpoint: Write, version: str, aligned: bool
) -> None:
    q = codes(3, 8, 20)  # two words either way, with code 10 in another place
    tensors = {
        f"{Q}.weight_packed": pack(unsigned(q, 3), 3, aligned=aligned),
        f"{Q}.weight_scale": torch.ones(8, 1),
        f"{Q}.weight_shape": torch.tensor([8, 20]),
    }
    config = ct({"num_bits": 3, "strategy": "channel"}, "pack-quantized", version=version)
    assert torch.equal(open_checkpoint(write_checkpoint(tensors, config)).dequantize(Q), q.float())


def test_the_width_decides_against_the_version(write_checkpoint: Write) -> None:
    q = codes(3, 8, 96)
    tensors = {
        f"{Q}.weight_packed": pack(unsigned(q, 3), 3),
        f"{Q}.weight_scale": torch.ones(8, 1),
        f"{Q}.weight_shape": torch.tensor([8, 96]),
    }
    config = ct({"num_bits": 3, "strategy": "channel"}, "pack-quantized", version="0.17.2.dev3")
    assert torch.equal(open_checkpoint(write_checkpoint(tensors, config)).dequantize(Q), q.float())


def test_channel_shape_comes_from_the_stored_shape(write_checkpoint: Write) -> None:
    q = codes(4, 8, 13)  # 13 columns do not fill two words
    tensors = {
        f"{Q}.weight_packed": pack(unsigned(q, 4), 4),
        f"{Q}.weight_scale": torch.ones(8, 1).half(),
        f"{Q}.weight_shape": torch.tensor([8, 13]),
    }
    ckpt = open_checkpoint(write_checkpoint(tensors, ct({"num_bits": 4, "strategy": "channel"}, "pack-quantized")))
    assert torch.equal(ckpt.dequantize(Q), q.float())
    tensors[f"{Q}.weight_shape"] = torch.tensor([8, 99])
    with pytest.raises(CheckpointError, match=r"expected 13 words for K=99"):
        open_checkpoint(
            write_checkpoint(tensors, ct({"num_bits": 4, "strategy": "channel"}, "pack-quantized"), name="bad")
        )


@pytest.mark.parametrize("fmt", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_integers_with_zero_points_and_static_inputs(write_checkpoint: Write, bits: int, fmt: str) -> None:
    q, s, z = codes(bits, 8, 32), scale(8, 1, torch.float32), codes(bits, 8, 1, 1)
    tensors = {
        f"{Q}.weight": q,
        f"{Q}.weight_scale": s,
        f"{Q}.weight_zero_point": z,
        f"{Q}.input_scale": torch.tensor([0.25]),
        f"{Q}.input_zero_point": torch.tensor([-3], dtype=torch.int8),
        f"{Q}.bias": torch.arange(8.0).bfloat16(),
    }
    inputs = {"num_bits": 8, "strategy": "tensor", "symmetric": False, "dynamic": False}
    weights = {"num_bits": bits, "strategy": "channel", "symmetric": False}
    spec = open_checkpoint(write_checkpoint(tensors, ct(weights, fmt, inputs))).spec(Q)
    assert torch.equal(spec.effective(), (q.float() - z.float()) * s)
    assert spec.input is not None and str(spec.input.format) == "int8-int8.tensor*fp32"
    assert spec.input.scale is not None and spec.input.scale.tolist() == [0.25]
    assert spec.input.zero is not None and spec.input.zero.tolist() == [-3]
    assert spec.bias is not None and spec.bias.dtype == torch.float32 and spec.bias.tolist() == list(range(8))


def test_codes_wider_than_their_bits_are_refused(write_checkpoint: Write) -> None:
    tensors = {f"{Q}.weight": torch.full((8, 32), 9, dtype=torch.int8), f"{Q}.weight_scale": scale(8, 1)}
    ckpt = open_checkpoint(write_checkpoint(tensors, ct({"num_bits": 4, "strategy": "channel"}, "int-quantized")))
    with pytest.raises(CheckpointError, match=r"expected int4 values -8\.\.7, found values 9\.\.9"):
        ckpt.spec(Q)


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ({"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False}, "int8-int8.row*bf16@domain=minmax"),
        ({"num_bits": 8, "strategy": "tensor", "dynamic": True}, "int8.tensor*bf16@qmax=127.5"),
        ({"num_bits": 4, "strategy": "token", "dynamic": True}, "int4.row*bf16@qmax=7.5"),
        ({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}, "e4m3fn.tensor*bf16"),
        (
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 16, "dynamic": True},
            "e4m3fn.g16*bf16",
        ),
    ],
)
def test_dynamic_inputs(write_checkpoint: Write, inputs: dict[str, Any], name: str) -> None:
    tensors = {f"{Q}.weight": codes(8, 8, 32), f"{Q}.weight_scale": scale(8, 1)}
    weights = {"num_bits": 8, "strategy": "channel"}
    spec = open_checkpoint(write_checkpoint(tensors, ct(weights, "int-quantized", inputs))).spec(Q)
    assert spec.input is not None and spec.input.format == Format.parse(name) and not spec.input.static


@pytest.mark.parametrize("shape", [(1,), ()])
def test_fp8_per_tensor_and_nan_codes(write_checkpoint: Write, shape: tuple[int, ...]) -> None:
    weight = torch.randn(8, 32).to(torch.float8_e4m3fn)
    tensors = {f"{Q}.weight": weight, f"{Q}.weight_scale": torch.full(shape, 0.5)}
    config = ct({"num_bits": 8, "type": "float", "strategy": "tensor"}, "float-quantized")
    assert torch.equal(open_checkpoint(write_checkpoint(tensors, config, name="a")).dequantize(Q), weight.float() * 0.5)
    weight.view(torch.uint8)[3, 3] = 0xFF
    with pytest.raises(CheckpointError, match="FP8 codes that are numbers, found 1 NaN of 256"):
        open_checkpoint(write_checkpoint(tensors, config, name="b")).spec(Q)


def test_fp8_blocks_with_a_partial_last_tile(write_checkpoint: Write) -> None:
    weight, s = torch.randn(20, 40).to(torch.float8_e4m3fn), scale(2, 3, torch.float32)
    config = ct({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]}, "float-quantized")
    folder = write_checkpoint({f"{Q}.weight": weight, f"{Q}.weight_scale": s}, config)
    spread = s.repeat_interleave(16, 0)[:20].repeat_interleave(16, 1)[:, :40]
    assert torch.equal(open_checkpoint(folder).dequantize(Q), weight.float() * spread)


def test_mxfp6(write_checkpoint: Write) -> None:
    fields = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    stream = pack(fields, 6).view(torch.uint8)  # 64 6-bit codes fill 12 words
    exponents = torch.tensor([[127, 128]] * 4, dtype=torch.uint8)
    weights = {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    tensors = {f"{Q}.weight_packed": stream, f"{Q}.weight_scale": exponents}
    ckpt = open_checkpoint(write_checkpoint(tensors, ct(weights, "mxfp6-pack-quantized")))
    sign, magnitude = 1.0 - 2.0 * (fields >> 5).float(), (fields & 31).float()
    exponent, mantissa = (magnitude // 8), magnitude % 8
    value = torch.where(exponent == 0, mantissa / 8, (1 + mantissa / 8) * 2 ** (exponent - 1))
    factor = torch.tensor([1.0, 2.0]).repeat_interleave(32)
    assert torch.equal(ckpt.dequantize(Q), sign * value * factor)
    exponents[0, 0] = 255
    with pytest.raises(CheckpointError, match=r"below 255 \(NaN\)"):
        ckpt = open_checkpoint(write_checkpoint(tensors, ct(weights, "mxfp6-pack-quantized"), name="nan"))
        ckpt.spec(Q)


def test_sparse_mask_that_is_not_two_of_four(write_checkpoint: Write) -> None:
    mask = torch.full((8, 4), 0b00110011, dtype=torch.uint8)
    tensors = {
        f"{Q}.compressed": torch.ones(8, 16).to(torch.float8_e4m3fn),
        f"{Q}.bitmask": mask,
        f"{Q}.shape": torch.tensor([[8], [32]]),
        f"{Q}.weight_scale": scale(8, 1),
    }
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config = ct(weights, "float-quantized", sparsity_config={"format": "sparse-24-bitmask"})
    assert (open_checkpoint(write_checkpoint(tensors, config, name="a")).dequantize(Q) != 0).float().mean() == 0.5
    with pytest.raises(CheckpointError, match="sparsity_config names no sparse-24-bitmask"):
        open_checkpoint(write_checkpoint(tensors, ct(weights, "float-quantized"), name="b"))
    mask[0, 0] = 0b00110111
    with pytest.raises(CheckpointError, match="two kept columns of every four, found 1 other runs"):
        open_checkpoint(write_checkpoint(tensors, config, name="c")).spec(Q)


def test_mixed_formats_and_exclusion_rules(write_checkpoint: Write) -> None:
    d, o = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
    tensors = {
        f"{Q}.weight": codes(8, 8, 32),
        f"{Q}.weight_scale": scale(8, 1),
        f"{d}.weight": torch.ones(8, 32).to(torch.float8_e4m3fn),
        f"{d}.weight_scale": scale(8, 1),
        f"{o}.weight": torch.ones(8, 32).bfloat16(),
    }
    groups = {
        "a": {
            "targets": [Q],
            "weights": {"num_bits": 8, "strategy": "channel"},
            "format": "int-quantized",
        },
        "b": {
            "targets": ["re:.*mlp.*"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "format": "float-quantized",
        },
    }
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    ckpt = open_checkpoint(write_checkpoint(tensors, config))
    assert [str(ckpt.format(m).weight) for m in (Q, d, o)] == ["int8.row*bf16", "e4m3fn.row*bf16", "bf16"]
    assert ckpt.excluded == {o: "no target of any config group matches it"}
    assert torch.equal(ckpt.dequantize(o), torch.ones(8, 32))


@pytest.mark.parametrize("entry", ["model.layers.0.self_attn.qkv_proj", "re:.*qkv_proj$"])
def test_fused_names_expand(write_checkpoint: Write, entry: str) -> None:
    parts = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    tensors = {f"{p}.weight": torch.full((4, 32), float(i)).bfloat16() for i, p in enumerate(parts)}
    d = "model.layers.0.mlp.down_proj"
    tensors |= {f"{d}.weight": codes(8, 8, 32), f"{d}.weight_scale": scale(8, 1)}
    config = ct({"num_bits": 8, "strategy": "channel"}, "int-quantized", ignore=[entry])
    ckpt = open_checkpoint(write_checkpoint(tensors, config))
    assert set(ckpt.excluded) == set(parts)
    fused = ckpt.linear_spec("model.layers.0.self_attn.qkv_proj")
    assert fused.stored()[:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    cut = ckpt.linear_spec(parts, shard=(0, 1, 2))
    assert cut.stored()[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0], "every rank holds a slice of each part"


def test_the_name_of_a_part_is_no_fused_name(write_checkpoint: Write) -> None:
    """`.*v_proj$` also matches the letters of `qkv_proj`, and `.*up_proj$` those of `gate_up_proj`."""
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"] + [
        f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up")
    ]
    plain = [names[2], names[4]]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        weight = torch.ones(8, 32).bfloat16() if name in plain else codes(8, 8, 32)
        tensors |= {f"{name}.weight": weight} | ({} if name in plain else {f"{name}.weight_scale": scale(8, 1)})
    config = ct({"num_bits": 8, "strategy": "channel"}, "int-quantized", ignore=["re:.*v_proj$", "re:.*up_proj$"])
    assert set(open_checkpoint(write_checkpoint(tensors, config)).excluded) == set(plain)


def test_fused_module_whose_parts_disagree(write_checkpoint: Write) -> None:
    m = "model.layers.0.self_attn.qkv_proj"
    tensors = {f"{m}.weight": codes(8, 8, 32), f"{m}.weight_scale": scale(8, 1)}
    config = ct({"num_bits": 8, "strategy": "channel"}, "int-quantized", ignore=["model.layers.0.self_attn.q_proj"])
    with pytest.raises(CheckpointError, match=r"is fused, but .*k_proj, .*v_proj is not matched like its other parts"):
        open_checkpoint(write_checkpoint(tensors, config))


# ---------------------------------------------------------------- caches


@pytest.mark.parametrize(
    ("scheme", "shape", "name"),
    [
        ({"num_bits": 8, "type": "float", "strategy": "tensor"}, (1,), "e4m3fn.tensor*bf16"),
        ({"num_bits": 8, "strategy": "tensor"}, (1,), "int8.tensor*bf16"),
        ({"num_bits": 8, "strategy": "tensor", "symmetric": False}, (1,), "int8-int8.tensor*bf16"),
        ({"num_bits": 8, "type": "float", "strategy": "attn_head"}, (2, 1, 1), "e4m3fn.head*bf16"),
    ],
)
def test_cache_only_checkpoint(
    write_checkpoint: Write, scheme: dict[str, Any], shape: tuple[int, ...], name: str
) -> None:
    attention = "model.layers.0.self_attn"
    tensors = {f"{attention}.{p}_proj.weight": torch.ones(32, 32).bfloat16() for p in "qkvo"}
    tensors |= {f"{attention}.{p}_scale": torch.full(shape, 0.5).bfloat16() for p in "kv"}
    if scheme.get("symmetric") is False:
        tensors |= {f"{attention}.{p}_zero_point": torch.full(shape, 2, dtype=torch.int8) for p in "kv"}
    config = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": scheme}
    model = {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 16}
    ckpt = open_checkpoint(write_checkpoint(tensors, config, model=model))
    spec = ckpt.kv_format(0)
    assert spec is not None and ckpt.kv_format(1) is None
    assert str(spec.k.format) == str(spec.v.format) == name
    assert spec.k.scale is not None and spec.k.scale.tolist() == [0.5] * max(shape)
    assert (spec.heads, spec.k_dim) == (2, 16)
    formats = ckpt.layer_formats()
    assert isinstance(formats[-1], KVFormat) and formats[-1] == spec.format
    assert len(ckpt.account.consumed) == len(tensors) - 4
    del tensors[f"{attention}.v_scale"]
    with pytest.raises(CheckpointError, match=r"v_scale is missing"):
        open_checkpoint(write_checkpoint(tensors, config, model=model, name="missing"))
    del config["kv_cache_scheme"]
    extra = open_checkpoint(write_checkpoint(tensors, config, model=model, name="extra")).summary()["extra"]
    assert any(e["tensor"] == f"{attention}.k_scale" for e in extra), "a scale nothing uses is listed"
