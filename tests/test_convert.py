"""convert: golden checkpoints in other formats, read back by qhal and by the targets' own packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qhal_schemes
from qhal.errors import CheckpointError, FormatError
from qhal_schemes.convert import TARGETS, convert_checkpoint

EXACT = [
    ("compressed_tensors/w4a16_g128_sym", "gptq"),
    ("compressed_tensors/w4a16_g128_sym", "awq"),
    ("compressed_tensors/w4a16_g128_sym", "compressed-tensors"),
    ("compressed_tensors/w4a16_g128_asym", "gptq"),
    ("compressed_tensors/w4a16_g128_asym", "awq"),
    ("compressed_tensors/w4a16_channel_sym", "awq"),
    ("compressed_tensors/w3a16_g32", "gptq"),
    ("compressed_tensors/w8a16_g32", "gptq"),
    ("compressed_tensors/moe_qwen3_w4a16_g64_ct013", "gptq"),
    ("awq/autoawq_b4_g128_gemm", "gptq"),
    ("awq/autoawq_b4_g128_gemm", "compressed-tensors"),
    ("awq/b4_g64_gemm_sym", "compressed-tensors"),
    ("gptq/b4_g128_sym_v1", "awq"),
    ("gptq/b4_g128_sym_v1", "compressed-tensors"),
    ("gptq/b4_g128_asym_v2", "awq"),
    ("gptq/b4_dynamic_mixed", "compressed-tensors"),
    ("gptq/b4_dynamic_mixed", "gptq"),
    ("gptq/b4_g128_sym_desc_act_v1", "gptq"),
    ("compressed_tensors/fp8_tensor_static", "compressed-tensors"),
    ("compressed_tensors/fp8_tensor_kv_fp8", "compressed-tensors"),
    ("compressed_tensors/nvfp4_w4a4", "compressed-tensors"),
    ("compressed_tensors/mxfp8_w8a8", "compressed-tensors"),
    ("compressed_tensors/w4a8_int_g128", "compressed-tensors"),
    ("compressed_tensors/w8a8_int8_static_tensor", "compressed-tensors"),
]


def case(golden: Path, name: str) -> Path:
    folder = golden / name / "checkpoint"
    if not folder.is_dir():
        pytest.skip(f"{name} is not among the golden checkpoints in {golden} (set QHAL_GOLDEN)")
    return folder


@pytest.mark.parametrize(("name", "to"), EXACT)
def test_exact_conversions_keep_every_number(golden: Path, tmp_path: Path, name: str, to: str) -> None:
    source = case(golden, name)
    summary = convert_checkpoint(source, tmp_path / "out", to)
    assert summary["exact"] and not summary["losses"]
    old, new = qhal_schemes.open_checkpoint(source), qhal_schemes.open_checkpoint(tmp_path / "out")
    assert new.method == to
    assert set(new.modules(quantized=True)) == set(old.modules(quantized=True))
    assert not new.account.extra
    for module in old.modules(quantized=True):
        a, b = old.spec(module), new.spec(module)
        assert torch.equal(b.stored() + 0.0, a.stored() + 0.0), module
        assert (a.input is None) == (b.input is None)
        if a.input is not None and b.input is not None:
            assert b.input.equal(a.input), module
        assert (a.bias is None) == (b.bias is None) and (a.bias is None or torch.equal(a.bias, b.bias))
    for name_, entry in ((n, old.entry(n)) for n in old.account.plain):
        assert new.entry(name_).shape == entry.shape
        assert torch.equal(new.tensor(name_), old.tensor(name_))
    for layer in old.kv_layers:
        a_kv, b_kv = old.kv_format(layer), new.kv_format(layer)
        assert a_kv is not None and b_kv is not None and b_kv.k.equal(a_kv.k) and b_kv.v.equal(a_kv.v)


@pytest.mark.parametrize(
    ("name", "to", "text"),
    [
        ("compressed_tensors/w8a8_int8_dynamic_token", "gptq", "no longer quantized to int8.row"),
        ("compressed_tensors/fp8_tensor_kv_fp8", "bf16", "says nothing of caches"),
        ("compressed_tensors/w4a16_g128_sym", "fp8", "choose one of compressed-tensors, gptq"),
        ("compressed_tensors/mxfp4a16", "awq", "awq holds int and uint of 4 bits"),
        ("gptq/b4_g128_sym_desc_act_v1", "awq", "no activation order"),
        ("gptq/b4_dynamic_mixed", "awq", "uint of 4 bits"),
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


def test_every_target_has_a_word() -> None:
    assert list(TARGETS)[:3] == ["compressed-tensors", "gptq", "awq"]
