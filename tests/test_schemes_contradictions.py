"""Configurations that contradict their tensors, and models that cannot be written: refused, never other numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qhal.errors import CheckpointError, FormatError
from qhal_schemes import CheckpointWarning, open_checkpoint, quantize_checkpoint
from qhal_schemes.matching import compile_pattern
from qhal_schemes.packing import pack, pack_awq, unsigned

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
N, K, G = 64, 128, 32
Q = "model.layers.0.self_attn.q_proj"


def refused(action: Callable[[], object], match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as info:
        action()
    assert len(str(info.value)) < 6000


# ---------------------------------------------------------------- configurations that contradict the tensors


def gptq(zero: int | torch.Tensor = 7) -> Tensors:
    g = torch.Generator().manual_seed(0)
    zeros = torch.full((K // G, N), zero) if isinstance(zero, int) else zero
    return {
        f"{Q}.qweight": pack(torch.randint(0, 16, (N, K), generator=g), 4).t(),
        f"{Q}.qzeros": pack(zeros, 4),
        f"{Q}.scales": (torch.rand(K // G, N, generator=g) + 0.1).half(),
        f"{Q}.g_idx": (torch.arange(K) // G).int(),
    }


def awq(zeros: torch.Tensor) -> Tensors:
    found = {f"{Q}.qweight": pack_awq(torch.randint(0, 16, (N, K))), f"{Q}.qzeros": pack_awq(zeros.t())}
    return found | {f"{Q}.scales": torch.ones(K // G, N).half()}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": G, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": G, "zero_point": True, "version": "gemm"}


def test_symmetric_with_other_zero_points(write_checkpoint: Write) -> None:
    zeros = torch.randint(3, 12, (K // G, N), generator=torch.Generator().manual_seed(1))
    honest = open_checkpoint(write_checkpoint(gptq(zeros), GPTQ | {"sym": False}, name="a"))
    assert honest.stored(Q).shape == (N, K)
    lying = open_checkpoint(write_checkpoint(gptq(zeros), GPTQ, name="b"))
    refused(lambda: lying.stored(Q), r"qzeros: expected 8 everywhere, as sym is true .*, found 4\.\.12")
    flipped = open_checkpoint(write_checkpoint(awq(zeros), AWQ | {"zero_point": False}, name="c"))
    refused(lambda: flipped.stored(Q), r"qzeros: expected 8 everywhere, as zero_point is false")
    fine = write_checkpoint(awq(torch.full((K // G, N), 8)), AWQ | {"zero_point": False}, name="d")
    assert open_checkpoint(fine).stored(Q).shape == (N, K)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "gptq_v2"}, r"format: expected gptq, as checkpoint_format says .*, found 'gptq_v2'"),
        ({"format": "marlin"}, "unsupported: .*GPTQ format 'marlin'"),
        ({"checkpoint_format": []}, r"unsupported: .*GPTQ format '\[\]'"),
        ({"checkpoint_format": ""}, "unsupported: .*GPTQ format ''"),
        ({"is_marlin_format": True}, "unsupported: .*GPTQ format 'marlin'"),
        ({"is_marlin_format": 1}, "is_marlin_format: expected true or false"),
        ({"pack_dtype": "int8"}, "pack_dtype: expected int32"),
        ({"dynamic": {"+:(a|aa)+$": {}}}, "expected a regular expression"),
        ({"dynamic": {"+:a{99999999999999}": {}}}, "expected a regular expression"),
    ],
)
def test_gptq_layouts_that_disagree(write_checkpoint: Write, change: dict[str, Any], match: str) -> None:
    refused(lambda: open_checkpoint(write_checkpoint(gptq(), GPTQ | change)), match)


def test_awq_layouts_that_disagree(write_checkpoint: Write) -> None:
    folder = write_checkpoint(awq(torch.full((K // G, N), 8)), AWQ | {"format": "gemv"})
    refused(lambda: open_checkpoint(folder), "AWQ layout 'gemv'")


def test_groups_of_unequal_size(write_checkpoint: Write) -> None:
    tensors = gptq()
    index = tensors[f"{Q}.g_idx"].roll(5)
    tensors[f"{Q}.g_idx"] = index
    assert open_checkpoint(write_checkpoint(tensors, GPTQ | {"desc_act": True}, name="a")).stored(Q).shape == (N, K)
    for i, wrong in enumerate((torch.zeros_like(index), index.index_fill(0, torch.tensor([40]), 3))):
        tensors[f"{Q}.g_idx"] = wrong
        ckpt = open_checkpoint(write_checkpoint(tensors, GPTQ | {"desc_act": True}, name=f"b{i}"))
        refused(lambda ckpt=ckpt: ckpt.stored(Q), "g_idx: expected 32 columns in group")  # type: ignore[misc]


def ct(weights: dict[str, Any], fmt: str = "pack-quantized", inputs: Any = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": {"g": group}, "ignore": []} | more


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


def test_stored_shape_that_hides_columns(write_checkpoint: Write) -> None:
    """Per channel only weight_shape says K; a smaller K with the same number of words would lose columns."""
    codes = torch.randint(-8, 8, (N, K), generator=torch.Generator().manual_seed(0))
    tensors = {f"{Q}.weight_packed": pack(unsigned(codes, 4), 4), f"{Q}.weight_scale": torch.ones(N, 1)}
    tensors[f"{Q}.weight_shape"] = torch.tensor([N, K - 1])
    refused(lambda: open_checkpoint(write_checkpoint(tensors, ct(INT4), name="a")).stored(Q), "zeros behind the 127")
    tensors[f"{Q}.weight_packed"] = pack(unsigned(codes[:, :-1], 4), 4)
    found = open_checkpoint(write_checkpoint(tensors, ct(INT4), name="b")).stored(Q)
    assert torch.equal(found, codes[:, :-1].float())


def fp8(**more: torch.Tensor) -> Tensors:
    tensors = {f"{Q}.weight": torch.ones(N, K).to(torch.float8_e4m3fn), f"{Q}.weight_scale": torch.ones(N, 1)}
    return tensors | {f"{Q}.{name}": t for name, t in more.items()}


def rotated(apply: dict[str, Any], group: dict[str, Any] | None = None) -> dict[str, Any]:
    where = {"location": "input", "targets": ["Linear"]} | apply
    return {"transform_config": {"config_groups": {"R": {"type": "hadamard", "apply": [where]} | (group or {})}}}


DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "group", "dynamic": True}


@pytest.mark.parametrize(
    ("inputs", "more", "match"),
    [
        (DYNAMIC | {"group_size": 48}, {}, r"group_size: expected a divisor of the 128 columns \(K\) .*, found 48"),
        (DYNAMIC | {"group_size": 10**9}, {}, "expected a divisor of the 128 columns"),
        ({"num_bits": 8, "strategy": "token", "dynamic": True}, {}, "unsupported: .*integer inputs of float-quantized"),
        ({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": 1}, {}, "dynamic: expected true, false"),
        ({**FP8, "strategy": "tensor", "actorder": 1}, {}, "actorder: expected group, weight or null"),
        ({**FP8, "strategy": "token", "dynamic": True, "scale_dtype": "int3"}, {}, "scale_dtype: expected null or"),
        (None, {"version": 3}, "version: expected the version of compressed-tensors"),
        (None, {"format": ["float-quantized"]}, "unsupported: .*format"),
        (None, {"ignore": ["re:(a|aa)+$"]}, "is no regular expression"),
        (None, rotated({"inverse": "no"}), r"apply\[0\]\.inverse: expected true or false, found 'no'"),
        (None, rotated({}, {"randomize": 1}), r"R\.randomize: expected true or false, found 1"),
    ],
)
def test_arguments(write_checkpoint: Write, inputs: Any, more: dict[str, Any], match: str) -> None:
    config = ct(FP8, "float-quantized", inputs) | more
    refused(lambda: open_checkpoint(write_checkpoint(fp8(), config)), match)


def test_unknown_arguments_are_named(write_checkpoint: Write) -> None:
    folder = write_checkpoint(fp8(), ct(FP8 | {"new_idea": 1}, "float-quantized"))
    with pytest.warns(CheckpointWarning, match=r"weights\.new_idea: no argument"):
        open_checkpoint(folder)


def test_static_scales_of_inputs_are_positive(write_checkpoint: Write) -> None:
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    folder = write_checkpoint(fp8(input_scale=torch.tensor([-0.5])), ct(FP8, "float-quantized", inputs))
    refused(lambda: open_checkpoint(folder).spec(Q), "input_scale: expected positive scales, found 1 negative of 1")


def test_sparse_codes_are_checked(write_checkpoint: Write) -> None:
    codes = torch.ones(N, K // 2).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[3, 3] = 0x7F
    tensors = {
        f"{Q}.compressed": codes,
        f"{Q}.bitmask": torch.full((N, K // 8), 0x33, dtype=torch.uint8),
        f"{Q}.shape": torch.tensor([N, K]),
        f"{Q}.weight_scale": torch.ones(N, 1),
    }
    config = ct(FP8, "float-quantized", sparsity_config={"format": "sparse-24-bitmask"})
    ckpt = open_checkpoint(write_checkpoint(tensors, config))
    refused(lambda: ckpt.stored(Q), "compressed: expected FP8 codes that are numbers, found 1 NaN")


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"head_dim": -1}, "head_dim: expected a positive integer, found -1"),
        ({"head_dim": "64"}, "head_dim: expected a positive integer"),
        ({"num_key_value_heads": []}, "num_key_value_heads: expected a positive integer"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 and head_dim 32 need a k_proj of 128 rows, .* has 64"),
    ],
)
def test_heads_of_a_cache(write_checkpoint: Write, model: dict[str, Any], match: str) -> None:
    attention = "model.layers.0.self_attn"
    tensors: Tensors = {f"{attention}.k_proj.weight": torch.ones(64, 32).bfloat16()}
    tensors |= {f"{attention}.{p}_scale": torch.ones(1) for p in "kv"}
    config = ct(FP8, config_groups={}, kv_cache_scheme=FP8 | {"strategy": "tensor"})
    good = {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 32}
    assert open_checkpoint(write_checkpoint(tensors, config, model=good, name="good")).kv_format(0) is not None
    refused(lambda: open_checkpoint(write_checkpoint(tensors, config, model=good | model)), match)


@pytest.mark.parametrize("act", [[], {}, ["silu"], "x" * 10_000])
def test_activation_of_experts(write_checkpoint: Write, act: Any) -> None:
    tensors = {f"model.layers.0.mlp.experts.0.{p}_proj.weight": torch.ones(8, 8).bfloat16() for p in ("gate", "up")}
    tensors["model.layers.0.mlp.experts.0.down_proj.weight"] = torch.ones(8, 8).bfloat16()
    ckpt = open_checkpoint(write_checkpoint(tensors, model={"hidden_act": act}))
    refused(lambda: ckpt.experts_format("model.layers.0.mlp.experts"), "unsupported: .*hidden_act")


@pytest.mark.parametrize(("n", "k"), [(0, 128), (64, 0), (0, 0)])
@pytest.mark.parametrize("size", [G, -1])
def test_empty_quantized_weights(write_checkpoint: Write, n: int, k: int, size: int) -> None:
    groups = k // G if size == G else 1
    shapes = {"qweight": (k // 8, n), "qzeros": (groups, n // 8), "g_idx": (k,)}
    tensors = {f"{Q}.{name}": torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    tensors[f"{Q}.scales"] = torch.ones(groups, n).half()
    refused(
        lambda: open_checkpoint(write_checkpoint(tensors, GPTQ | {"group_size": size})), "is empty|scales: expected"
    )


@pytest.mark.parametrize("text", ["(a+)+", "(a|aa)+$", r"(\w+\.?)*!", "(?:(?:a*)b)*", "((a|b)c){2,}"])
def test_patterns_that_could_take_for_ever(text: str) -> None:
    with pytest.raises(re.error, match="repeats"):
        compile_pattern(text)


@pytest.mark.parametrize(
    "text",
    [
        r".*\.(q|k|v)_proj$",
        r"model\.layers\.(\d+)\..*",
        r"^(?!.*(vision|lm_head)).*$",
        r"[(*+)]+",
        r"(abc)+",
        r"\(a*\)+",
    ],
)
def test_patterns_of_real_configurations(text: str) -> None:
    assert compile_pattern(text).pattern == text


# ---------------------------------------------------------------- writing


def floats(**more: torch.Tensor) -> Tensors:
    g = torch.Generator().manual_seed(0)
    found = {"model.embed_tokens.weight": torch.randn(8, K, generator=g).bfloat16()}
    found[f"{Q}.weight"] = torch.randn(N, K, generator=g).bfloat16()
    return found | {name.replace("__", "."): t for name, t in more.items()}


@pytest.mark.parametrize(
    ("more", "format", "match"),
    [
        ({"a__weight": torch.ones(8, G).double()}, "int4_g32", "a.weight: expected .*, found F64"),
        ({"a__weight": torch.ones(8, G).to(torch.float8_e4m3fn)}, "int4_g32", "a.weight: expected .*, found F8_E4M3"),
        ({"a__weight": torch.ones(8, G, dtype=torch.int8)}, "int4_g32", "a.weight: expected .*, found I8"),
        ({"norm__weight": torch.ones(8, dtype=torch.int8)}, "int4_g32", "norm.weight .* looks quantized"),
        ({"a__weight": torch.ones(8, G), "a__bias": torch.ones(7)}, "int4_g32", r"a.bias: expected .*\[8\], found F32"),
        (
            {"a__weight": torch.ones(8, G), "a__bias": torch.ones(8).double()},
            "int4_g32",
            "a.bias: expected .*found F64",
        ),
        ({"a__weight": torch.ones(8, G), "a__bias": torch.ones(8) / 0}, "int4_g32", "a.bias: expected finite"),
        ({"a__weight": torch.ones(8, G), "a__extra": torch.ones(8)}, "int4_g32", "a.extra is extra"),
        ({"a__weight": torch.ones(8, G), "a__input_scale": torch.ones(1)}, "int4_g32", "a.input_scale is extra"),
        ({"a__weight": torch.ones(200, 96)}, "fp8_block", r"groups of 128 in a \(K=96\)"),
        ({"l__experts__0__gate_proj__weight": torch.ones(8, G)}, "int4_g32", "up_proj is missing"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    write_checkpoint: Write, tmp_path: Path, more: Tensors, format: str, match: str
) -> None:
    source, out = write_checkpoint(floats(**more)), tmp_path / "out"
    refused(lambda: quantize_checkpoint(source, out, format), match)
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_odd_names_are_written_and_read(write_checkpoint: Write, tmp_path: Path) -> None:
    names = ["模型.层", "a/b", "re:x", "a b", "m" * 1000, "Linear", "a.weight"]
    tensors = floats() | {f"{n}.weight": torch.randn(8, G).bfloat16() for n in names} | {"weight": torch.ones(4, G)}
    source = write_checkpoint(tensors)
    quantize_checkpoint(source, tmp_path / "out", "int4_g32")
    online, written = open_checkpoint(source, quantize="int4_g32"), open_checkpoint(tmp_path / "out")
    assert set(online.modules(quantized=True)) == set(written.modules(quantized=True)) == {*names, Q}
    assert all(torch.equal(online.stored(m), written.stored(m)) for m in [*names, Q])


def test_one_name_to_ignore_is_no_list_of_letters(write_checkpoint: Write, tmp_path: Path) -> None:
    source = write_checkpoint(floats(lm_head__weight=torch.ones(8, K).bfloat16()))
    assert list(quantize_checkpoint(source, tmp_path / "out", "int4_g32", ignore="lm_head")["plain"]) == ["lm_head"]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "link", "dangling"])
def test_targets_that_cannot_be(write_checkpoint: Write, tmp_path: Path, name: str) -> None:
    source = write_checkpoint(floats())
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    before = sorted(p.name for p in tmp_path.iterdir())
    refused(lambda: quantize_checkpoint(source, tmp_path / name, "int4_g32"), "cannot be written|is a link")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("format", [None, 4, [], "\0", "x" * 5000])
def test_formats_that_are_none(write_checkpoint: Write, tmp_path: Path, format: Any) -> None:
    with pytest.raises(FormatError):
        quantize_checkpoint(write_checkpoint(floats()), tmp_path / "out", format)


def test_dequantize_never_replaces_what_it_reads(write_checkpoint: Write) -> None:
    from qhal_cli.checkpoints import dequantize

    source = write_checkpoint(floats())
    before = (source / "model.safetensors").read_bytes()
    refused(lambda: dequantize(source, source / "model.safetensors"), "is a file of the checkpoint that is read")
    refused(lambda: dequantize(source, source / ("x" * 300)), "cannot be")
    assert (source / "model.safetensors").read_bytes() == before
