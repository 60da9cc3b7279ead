"""convert: golden checkpoints in other formats, read back by qhal and by the targets' own packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qhal_schemes
from qhal.errors import CheckpointError, FormatError
from qhal_schemes.convert import TARGETS, convert_checkpoint


def case(golden: Path, name: str) -> Path:
    folder = golden / name / "checkpoint"
    if not folder.is_dir():
        pytest.skip(f"{name} is not among the golden checkpoints in {golden} (set QHAL_GOLDEN)")
    return folder


@pytest.mark.parametrize(
    ("name", "to", "text"),
    [
        ("compressed_tensors/w8a8_int8_dynamic_token", "gptq", "no longer quantized to int8.row"),
        ("compressed_tensors/fp8_tensor_kv_fp8", "bf16", "says nothing of caches"),
        ("compressed_tensors/w4a16_g128_sym", "fp8", "choose one of compressed-tensors, gptq"),
        ("compressed_tensors/mxfp4a16", "awq", "awq holds int and uint of 4 bits"),
        ("gptq/b4_g128_sym_desc_act_v1", "awq", "no activation order"),
        ("gptq/b4_dynamic_mixed", "awq", "uint of 4 bits"),
        ("mxfp4_gptoss/gptoss_h128_e4", "quark", "a module for every expert"),
        ("modelslim/w8a8_c8_kv", "modelopt", "modelopt holds caches of e4m3fn"),
        ("compressed_tensors/transform_spinquant_r4_w4a16", "gptq", "--to bf16 multiplies them into the weight"),
    ],
)
def test_losses_are_named_and_nothing_is_written(golden: Path, tmp_path: Path, name: str, to: str, text: str) -> None:
    source = case(golden, name)
    with pytest.raises((CheckpointError, FormatError)) as caught:
        convert_checkpoint(source, tmp_path / "out", to)
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_lossy_conversions_say_how_far_weights_moved(golden: Path, tmp_path: Path) -> None:
    source = case(golden, "compressed_tensors/w8a8_int8_dynamic_token")
    summary = convert_checkpoint(source, tmp_path / "out", "gptq", lossy=True)
    assert not summary["exact"] and "no longer quantized" in summary["losses"][0]
    assert all(c["exact"] for c in summary["changes"])  # the weights themselves are the same codes
    source = case(golden, "compressed_tensors/nvfp4a16")
    with pytest.raises(CheckpointError, match="gptq holds int and uint"):
        convert_checkpoint(source, tmp_path / "no", "gptq", lossy=True)


@pytest.mark.parametrize("to", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "name", ["compressed_tensors/w4a16_g128_sym", "compressed_tensors/transform_spinquant_r4_w4a16"]
)
def test_plain_floats_hold_the_effective_weight(golden: Path, tmp_path: Path, name: str, to: str) -> None:
    source = case(golden, name)
    summary = convert_checkpoint(source, tmp_path / "out", to)
    old, new = qhal_schemes.open_checkpoint(source), qhal_schemes.open_checkpoint(tmp_path / "out")
    assert not new.modules(quantized=True) and new.method == ""
    assert new.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[to]
    for module in old.modules(quantized=True):
        assert torch.equal(new.dequantize(module), old.dequantize(module).to(new.dtype).float()), module
    assert summary["exact"] == (to == "fp32")
    assert to == "fp32" or 0 < summary["changes"][0]["relative_rms"] < 2**-8


def test_the_shards_of_a_large_checkpoint(golden: Path, tmp_path: Path) -> None:
    source = case(golden, "compressed_tensors/w4a16_g128_sym")
    convert_checkpoint(source, tmp_path / "out", "gptq", shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert qhal_schemes.open_checkpoint(tmp_path / "out").modules(quantized=True)


def test_a_checkpoint_without_quantization_is_refused(golden: Path, tmp_path: Path) -> None:
    source = case(golden, "compressed_tensors/w4a16_g128_sym")
    convert_checkpoint(source, tmp_path / "plain", "bf16")
    with pytest.raises(CheckpointError, match="nothing is quantized"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "out", "gptq")


def test_compressed_tensors_itself_reads_what_is_written(golden: Path, tmp_path: Path) -> None:
    """The peer's own decompressor in transformers, which takes one group of formats only."""
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    for name in ("awq/autoawq_b4_g128_gemm", "gptq/b4_g128_sym_v1"):
        source = case(golden, name)
        out = tmp_path / name.replace("/", "_")
        convert_checkpoint(source, out, "compressed-tensors")
        config: Any = transformers.CompressedTensorsConfig(run_compressed=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(out, quantization_config=config, dtype=torch.float32)
        ckpt = qhal_schemes.open_checkpoint(source)
        weights = dict(model.named_parameters())
        for module in ckpt.modules(quantized=True):
            exact, found = ckpt.stored(module), weights[f"{module}.weight"]  # in fp16 as the scales, or in float32
            assert torch.equal(found, exact.half().float()) or torch.equal(found, exact), module


def test_transformers_reads_the_plain_experts_of_gpt_oss(golden: Path, tmp_path: Path) -> None:
    """Its parameters are [E, K, N], gate and up in turns; the golden weights are those that it unpacked itself."""
    transformers = pytest.importorskip("transformers")
    source = case(golden, "mxfp4_gptoss/gptoss_h128_e4")
    summary = convert_checkpoint(source, tmp_path / "out", "bf16")
    assert summary["exact"]
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    found, expected = model.state_dict(), load_file(source.parent / "expected.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        full = f"model.layers.0.mlp.experts.{name}"
        assert torch.equal(found[full], expected[full])
    ckpt = qhal_schemes.open_checkpoint(source)
    for name in ckpt.account.plain:
        assert torch.equal(found[name], ckpt.tensor(name).float()), name


def test_every_target_has_a_word() -> None:
    assert list(TARGETS)[:5] == ["compressed-tensors", "gptq", "awq", "modelopt", "quark"]
