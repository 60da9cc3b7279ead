"""convert, every golden checkpoint to every target: the same numbers read back, or a refusal that names the loss.

The tools themselves read what is written here in test_convert.py (compressed-tensors, transformers) and by
tests/generators/converted_by_peers.py: of the exact pairs of the table, all 48 folders for Quark through amd-quark 0.13
and all 40 for ModelOpt through nvidia-modelopt 0.47, every weight the same (torch 2.13, CPU).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import golden_cases
import pytest
import torch

import qhal_schemes
from qhal.errors import CheckpointError
from qhal.specs import KVSpec, LinearSpec, Operand
from qhal.tensors import QTensor
from qhal_schemes.checkpoint import Checkpoint
from qhal_schemes.convert import TARGETS, convert_checkpoint

SameSpec = Callable[[LinearSpec, LinearSpec], None]
SameOperand = Callable[[Operand, Operand], None]

WRITTEN = {
    "aqlm/aqlm_1x16_g8": "bf16",
    "aqlm/aqlm_1x8_g8": "bf16",
    "aqlm/aqlm_2x8_g8": "bf16",
    "auto_round/awq_b4_g32": "compressed-tensors gptq awq quark bf16",
    "auto_round/gptq_b2_row_sym": "compressed-tensors gptq awq quark bf16",
    "auto_round/gptq_b4_g32_mixed": "compressed-tensors gptq quark bf16",
    "auto_round/gptqmodel_b4_g32_pattern": "compressed-tensors gptq awq quark bf16",
    "auto_round/raw_b3_g32": "compressed-tensors gptq awq quark bf16",
    "auto_round/raw_b5_g32": "compressed-tensors gptq quark bf16",
    "awq/autoawq_b4_g128_gemm": "compressed-tensors gptq awq quark bf16",
    "awq/b4_g128_gemm": "compressed-tensors gptq awq quark bf16",
    "awq/b4_g64_gemm_sym": "compressed-tensors gptq awq modelopt quark bf16",
    "bitsandbytes/int8_llm_int8": "compressed-tensors modelopt quark bf16",
    "bitsandbytes/nf4_double_quant": "bf16",
    "compressed_tensors/fp8_block_128x128": "compressed-tensors",
    "compressed_tensors/fp8_channel_dynamic_token": "compressed-tensors",
    "compressed_tensors/fp8_tensor_kv_fp8": "compressed-tensors modelopt quark",
    "compressed_tensors/fp8_tensor_static": "compressed-tensors modelopt quark",
    "compressed_tensors/mixed_fp8_w4a16": "compressed-tensors",
    "compressed_tensors/moe_qwen3_fp8_dynamic": "compressed-tensors",
    "compressed_tensors/moe_qwen3_w4a16_g64_ct013": "compressed-tensors gptq awq modelopt quark bf16",
    "compressed_tensors/mxfp4a16": "compressed-tensors quark bf16",
    "compressed_tensors/mxfp8_w8a8": "compressed-tensors",
    "compressed_tensors/nvfp4_w4a4": "compressed-tensors",
    "compressed_tensors/nvfp4a16": "compressed-tensors bf16",
    "compressed_tensors/sparse24_bitmask_fp8_ct013": "",
    "compressed_tensors/sparse24_fp8_dense_storage": "compressed-tensors",
    "compressed_tensors/transform_spinquant_r1r2_w4a16": "compressed-tensors gptq awq modelopt quark bf16",
    "compressed_tensors/transform_spinquant_r4_w4a16": "bf16",
    "compressed_tensors/w3a16_g32": "compressed-tensors gptq awq modelopt quark bf16",
    "compressed_tensors/w3a16_g32_ct013": "compressed-tensors gptq awq modelopt quark bf16",
    "compressed_tensors/w4a16_awq_asym_g128_ct013": "compressed-tensors gptq awq quark bf16",
    "compressed_tensors/w4a16_channel_sym": "compressed-tensors gptq awq quark bf16",
    "compressed_tensors/w4a16_g128_actorder_group_ct013": "gptq bf16",
    "compressed_tensors/w4a16_g128_actorder_weight": "compressed-tensors gptq awq modelopt quark bf16",
    "compressed_tensors/w4a16_g128_asym": "compressed-tensors gptq awq quark bf16",
    "compressed_tensors/w4a16_g128_sym": "compressed-tensors gptq awq modelopt quark bf16",
    "compressed_tensors/w4a8_int_g128": "compressed-tensors",
    "compressed_tensors/w4afp8_g128": "compressed-tensors",
    "compressed_tensors/w8a16_g32": "compressed-tensors gptq quark bf16",
    "compressed_tensors/w8a8_int8_dynamic_token": "compressed-tensors",
    "compressed_tensors/w8a8_int8_static_tensor": "compressed-tensors modelopt quark",
    "fp8_block/deepseek_style_128": "quark",
    "fp8_block/hf_finegrained_fp8_128": "quark",
    "fp8_block/hf_fp8_per_tensor": "modelopt quark",
    "gguf/k_quants_bytes": "bf16",
    "gguf/legacy_quants": "compressed-tensors quark bf16",
    "gguf/q4_1_real_rows": "bf16",
    "gptq/b2_g32_sym_v2": "compressed-tensors gptq awq modelopt quark bf16",
    "gptq/b3_g32_sym_v1": "compressed-tensors gptq awq modelopt quark bf16",
    "gptq/b4_dynamic_mixed": "compressed-tensors gptq quark bf16",
    "gptq/b4_g128_asym_v2": "compressed-tensors gptq awq quark bf16",
    "gptq/b4_g128_bias_bf16": "compressed-tensors gptq awq modelopt quark bf16",
    "gptq/b4_g128_sym_desc_act_v1": "gptq bf16",
    "gptq/b4_g128_sym_v1": "compressed-tensors gptq awq modelopt quark bf16",
    "gptq/b8_gm1_sym_v1": "compressed-tensors gptq modelopt quark bf16",
    "modelopt/fp8": "compressed-tensors modelopt quark",
    "modelopt/fp8_2d_blockwise_weight_only": "compressed-tensors modelopt quark bf16",
    "modelopt/fp8_kv_fp8": "compressed-tensors modelopt quark",
    "modelopt/int4_awq_g128": "modelopt bf16",
    "modelopt/int8_smoothquant": "modelopt",
    "modelopt/mixed_auto_nvfp4_fp8": "modelopt",
    "modelopt/moe_mixtral_nvfp4_experts_only": "modelopt",
    "modelopt/moe_qwen3_fp8": "compressed-tensors modelopt quark",
    "modelopt/mxfp4": "modelopt",
    "modelopt/mxfp8": "modelopt",
    "modelopt/nvfp4": "modelopt",
    "modelopt/nvfp4_awq_lite": "modelopt",
    "modelopt/nvfp4_kv_nvfp4": "modelopt",
    "modelopt/w4a8_awq_beta": "modelopt",
    "modelslim/command_mixed": "",
    "modelslim/older_writer": "",
    "modelslim/older_writer_packed": "",
    "modelslim/w4a4_dynamic": "",
    "modelslim/w4a4_flatquant_dynamic": "",
    "modelslim/w4a4_mxfp4": "",
    "modelslim/w4a4_mxfp4_dualscale": "",
    "modelslim/w4a8_dynamic": "",
    "modelslim/w4a8_moe_experts": "",
    "modelslim/w4a8_mxfp": "",
    "modelslim/w8a16": "compressed-tensors modelopt quark bf16",
    "modelslim/w8a16_group64_asym": "quark bf16",
    "modelslim/w8a8_c8_kv": "",
    "modelslim/w8a8_dynamic": "",
    "modelslim/w8a8_fa_quant": "",
    "modelslim/w8a8_mixed_float_down": "",
    "modelslim/w8a8_mxfp8": "",
    "modelslim/w8a8_pdmix": "",
    "modelslim/w8a8_quarot_online": "",
    "modelslim/w8a8_static_bf16_bias": "",
    "modelslim/w8a8_static_fp16": "",
    "modelslim/wfp8afp8_dynamic": "modelopt quark",
    "modelslim/wrapped_mixed_attention": "",
    "mxfp4_gptoss/gptoss_h128_e4": "bf16",
    "quark/fp8_channel_dyn_token": "modelopt quark",
    "quark/fp8_tensor_static": "compressed-tensors modelopt quark",
    "quark/fp8_tensor_static_kv": "compressed-tensors modelopt quark",
    "quark/int4_group128_wo": "compressed-tensors gptq awq modelopt quark bf16",
    "quark/int4_group32_order": "compressed-tensors gptq awq modelopt quark bf16",
    "quark/int8_channel_w_tensor_a": "compressed-tensors modelopt quark",
    "quark/int8_group32": "compressed-tensors gptq quark bf16",
    "quark/mixed_layers": "quark",
    "quark/moe_int4_fp8": "compressed-tensors quark",
    "quark/moe_mxfp4": "quark",
    "quark/mxfp4_w_a": "quark",
    "quark/mxfp4_w_fp8_a": "compressed-tensors modelopt quark",
    "quark/mxfp6_e2m3": "quark bf16",
    "quark/mxfp6_e3m2_w_a": "quark",
    "quark/uint4_group32_wo_asym": "compressed-tensors gptq awq quark bf16",
    "quip/quip_e8p12_had12_20": "bf16",
    "quip/quip_e8p12_pow2": "bf16",
    "quip/quip_e8p12rvq4b": "bf16",
    "rotations/ct_hadamard_block32_randomized_r1": "bf16",
    "rotations/ct_hadamard_online_r4": "bf16",
    "rotations/flatquant_w4a4_mlp": "",
    "rotations/quarot_w4a4_down_proj": "",
    "rotations/spinquant_r1_r2_r4": "bf16",
    "torchao/int8_weight_only": "compressed-tensors gptq modelopt quark bf16",
    "vptq/vptq_v6_k512_outlier": "bf16",
    "vptq/vptq_v8_k1024_res256_norm_perm": "bf16",
    "vptq/vptq_v8_k256": "bf16",
    "vptq/vptq_v8_k256_unpacked_groups": "bf16",
}
"""source -> the targets that hold it without a loss (bf16: but for the rounding of the weights); no other does."""

LOSSY = {
    ("compressed_tensors/nvfp4_w4a4", "modelopt"): "5.7e-08",
    ("modelopt/nvfp4", "compressed-tensors"): "4.0e-08",
    ("bitsandbytes/int8_llm_int8", "gptq"): "2.1e-04",
    ("modelslim/w8a8_dynamic", "gptq"): "1.5e-03",
    ("modelslim/w4a8_dynamic", "awq"): "1.7e-03",
    ("quark/moe_int4_fp8", "gptq"): "1.8e-02",
    ("awq/autoawq_b4_g128_gemm", "modelopt"): "1.2e-01",
    ("quark/uint4_group32_wo_asym", "modelopt"): "1.8e-01",
}
"""Pairs whose weights move under `lossy`, with the largest relative rms error of a pair of formats."""

NAMED = re.compile(
    r"no longer quantized|a reader of the file takes|while decoding its input|says? nothing of caches|holds? caches of|"
    r"has no word for|holds int and uint|quark holds|has no quant_algo|no compressed-tensors checkpoint holds|"
    r"cannot say|hold no codebooks|no activation order|cannot be written as .* exactly|the caches of layers|"
    r"module for every expert|some numbers would change|packs|one file has zero points or has none|no longer rounded"
)
"""What refusals say: the thing that would be lost."""

SIDE = {"hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.yaml"}
"""Descriptions of a quantization beside config.json; ModelSlim's are matched by their names."""


@pytest.mark.parametrize("name", WRITTEN)
def test_every_pair_is_exact_or_refused(
    tmp_path: Path, name: str, same_spec: SameSpec, same_operand: SameOperand
) -> None:
    source = source_of(name)
    old = qhal_schemes.open_checkpoint(source)
    done = []
    for to in (t for t in TARGETS if t not in ("fp16", "fp32")):
        out = tmp_path / to
        try:
            summary = convert_checkpoint(source, out, to)
        except CheckpointError as refused:
            assert NAMED.search(str(refused)), f"{to}: {refused}"
            assert not out.exists()
            lossy_or_never(source, tmp_path / "lossy", to)
            continue
        assert not summary["losses"]
        assert summary["exact"] or to == "bf16"
        done.append(to)
        new = qhal_schemes.open_checkpoint(out)
        compare_folders(old, new, to, same_spec, same_operand)
        others = {path.name for path in out.iterdir() if path.name in SIDE or "quant_model" in path.name}
        assert others == {"gptq": {"quantize_config.json"}, "modelopt": {"hf_quant_config.json"}}.get(to, set())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(done)  # nothing half-written either
    assert " ".join(done) == WRITTEN[name]


def source_of(name: str) -> Path:
    """The checkpoint of a golden case; a GGUF file by itself."""
    folder = golden_cases.path(name) / "checkpoint"
    if not folder.is_dir():
        pytest.skip(f"{name} is not among the golden checkpoints in {golden_cases.FULL} (set QHAL_GOLDEN)")
    return next(folder.glob("*.gguf"), folder)


def lossy_or_never(source: Path, out: Path, to: str) -> None:
    """What is refused is written on request, with its losses, and can be read; or it can't be written at all."""
    try:
        summary = convert_checkpoint(source, out, to, lossy=True)
    except CheckpointError as refused:
        assert "choose another target" in str(refused) or "nothing was written: " in str(refused), f"{to}: {refused}"
        assert not out.exists()
        return
    assert not summary["exact"] and (summary["losses"] or any(c["why"] for c in summary["changes"]))
    new = qhal_schemes.open_checkpoint(out)
    for module in new.modules(quantized=True):
        new.spec(module)
    assert all(new.kv_format(layer) is not None for layer in new.kv_layers)
    shutil.rmtree(out)


def compare_folders(old: Checkpoint, new: Checkpoint, to: str, same_spec: SameSpec, same_operand: SameOperand) -> None:
    """Every module, plain tensor and cache of two checkpoints."""
    assert not new.account.extra
    if to == "bf16":
        assert not new.modules(quantized=True)
        compare_floats(old, new)
    else:
        assert new.method == to
        assert set(new.modules(quantized=True)) == set(old.modules(quantized=True))
        for module in old.modules(quantized=True):
            same_spec(old.spec(module), new.spec(module))
    for name in old.account.plain:
        assert torch.equal(new.tensor(name), old.tensor(name)), name
    assert new.kv_layers == old.kv_layers
    for layer in old.kv_layers:
        a, b = old.kv_format(layer), new.kv_format(layer)
        assert a is not None and b is not None
        compare_caches(a, b, same_operand)


def compare_caches(a: KVSpec, b: KVSpec, same_operand: SameOperand) -> None:
    """Keys and values."""
    assert (a.kind, a.heads, a.k_dim, a.v_dim) == (b.kind, b.heads, b.k_dim, b.v_dim)
    assert a.q is None and a.p is None and b.q is None and b.p is None
    same_operand(a.k, b.k)
    same_operand(a.v, b.v)


def compare_floats(old: Checkpoint, new: Checkpoint) -> None:
    """The effective weights, rounded once; stacked experts as the parameters of the model."""
    stacked = {module for group in old.stacked.values() for module in group.modules()}
    for module in old.modules(quantized=True):
        spec = old.spec(module)
        weight, bias = (module, f"{module}_bias") if module in stacked else (f"{module}.weight", f"{module}.bias")
        wanted = spec.effective().bfloat16()
        assert torch.equal(new.tensor(weight), wanted.mT if module in stacked else wanted), module
        assert spec.bias is None or torch.equal(new.tensor(bias), spec.bias.bfloat16()), module


@pytest.mark.parametrize(("name", "to"), LOSSY)
def test_how_far_weights_move(tmp_path: Path, name: str, to: str) -> None:
    source = source_of(name)
    summary = convert_checkpoint(source, tmp_path / "out", to, lossy=True)
    assert f"{max(c['relative_rms'] for c in summary['changes']):.1e}" == LOSSY[name, to]


def test_the_page_has_these_tables() -> None:
    """docs/convert.md says what the tests above check."""
    page = (Path(__file__).parent.parent / "docs/convert.md").read_text()
    words = list(TARGETS)[:5]
    head = "\n".join((f"| source | {' | '.join((*words, 'bf16'))} |", "|---|" + ":-:|" * 6))
    rows = [
        f"| `{name}` | {' | '.join('yes' if to in held.split() else '' for to in (*words, 'bf16'))} |"
        for name, held in WRITTEN.items()
    ]
    assert "\n".join((head, *rows)) in page, "\n".join((head, *rows))
    rows = [f"| `{name}` | {to} | {error} |" for (name, to), error in LOSSY.items()]
    assert "\n".join(rows) in page, "\n".join(rows)


def test_lossy_conversions_of_nvfp4_keep_every_code(tmp_path: Path) -> None:
    """The global scale divides in one file and multiplies in the other: its reciprocal is rounded, codes stay."""
    name = "compressed_tensors/nvfp4_w4a4"
    source = source_of(name)
    summary = convert_checkpoint(source, tmp_path / "out", "modelopt", lossy=True)
    assert not summary["exact"] and 0 < summary["changes"][0]["relative_rms"] < 2**-23
    old, new = qhal_schemes.open_checkpoint(source), qhal_schemes.open_checkpoint(tmp_path / "out")
    for module in old.modules(quantized=True):
        a, b = old.spec(module), new.spec(module)
        assert isinstance(a.weight, QTensor) and isinstance(b.weight, QTensor)
        assert torch.equal(a.weight.codes, b.weight.codes)
        assert a.input is not None and b.input is not None and a.input.scale is not None and b.input.scale is not None
        assert torch.equal(1 / a.input.scale, b.input.scale)
