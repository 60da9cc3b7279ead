"""Checkpoints of other tools in the transformers adapter: their logits, their layers' outputs, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qhal
import qhal_schemes
from qhal.encoding import encode

transformers = pytest.importorskip("transformers")

import qhal_engines.transformers as adapter  # noqa: E402
from qhal_engines import EngineError  # noqa: E402
from qhal_engines.loading import arguments  # noqa: E402


@pytest.fixture
def installed() -> Iterator[None]:
    adapter.install("cpu_reference")
    yield
    adapter.uninstall()


def load(folder: Path, **arguments: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **arguments)


def golden_case(golden: Path, case: str) -> Path:
    if not (golden / case / "checkpoint").is_dir():
        pytest.skip(f"{case} is not among the golden checkpoints in {golden} (set QHAL_GOLDEN)")
    return golden / case


def near(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((ours.float() - expected).norm() <= 0.005 * expected.norm())


LOGITS = [
    "compressed_tensors/w4a16_g128_sym",
    "compressed_tensors/w4a16_g128_asym",
    "compressed_tensors/w4a16_channel_sym",
    "compressed_tensors/w4a16_g128_actorder_group_ct013",
    "compressed_tensors/w8a16_g32",
    "modelopt/fp8_2d_blockwise_weight_only",
    "modelopt/mxfp8",
]
"""Cases whose tool computed its logits from the very weights of the file."""
OUTPUTS = [
    "awq/autoawq_b4_g128_gemm",
    "gptq/b4_g128_sym_desc_act_v1",
    "gptq/b4_g128_sym_v1",
    "modelopt/fp8_2d_blockwise_weight_only",
    "modelopt/int4_awq_g128",
    "modelopt/int8_smoothquant",
    "bitsandbytes/nf4_double_quant",
    "torchao/int8_weight_only",
]


@torch.inference_mode()
@pytest.mark.parametrize("case", LOGITS)
def test_golden_models_give_their_tools_logits(installed: None, golden: Path, case: str) -> None:
    folder = golden_case(golden, case)
    expected = load_file(folder / "expected.safetensors")
    model, info = load(folder / "checkpoint", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = expected["logits.input_ids"].long()
    logits, want = (
        model(ids.reshape(-1, ids.shape[-1])).logits,
        expected.get("logits", expected.get("fakequant_logits")),
    )
    assert want is not None and near(logits.reshape(want.shape), want)


@torch.inference_mode()
@pytest.mark.parametrize("case", OUTPUTS)
def test_golden_modules_give_their_tools_outputs(installed: None, golden: Path, case: str) -> None:
    folder = golden_case(golden, case)
    expected = load_file(folder / "expected.safetensors")
    model = load(folder / "checkpoint")
    names = [key.removesuffix(".output") for key in expected if key.endswith(".output")]
    assert names
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, adapter.QhalLinear)
        assert near(module(expected[f"{name}.input"].to(model.dtype)), expected[f"{name}.output"])


@torch.inference_mode()
@pytest.mark.parametrize("case", ["w8a8_pdmix", "w8a16_group64_asym"])
def test_checkpoints_that_config_json_does_not_lead_to(installed: None, golden: Path, case: str) -> None:
    folder = golden_case(golden, f"modelslim/{case}") / "checkpoint"
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load(folder)
    model, info = load(folder, **arguments(folder), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = load_file(folder.parent / "expected.safetensors")
    module = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(module, adapter.QhalLinear)
    x = expected["model.layers.0.self_attn.q_proj.input"].to(model.dtype)
    spec = qhal_schemes.open_checkpoint(folder).spec("model.layers.0.self_attn.q_proj")
    for rows, operand in ((x[None], spec.input), (x[:, None], spec.decode_input or spec.input)):  # one token: decoding
        q = rows.float()
        if operand is not None:
            q = encode(x.float(), operand.format, scale=operand.scale, zero=operand.zero).dequantize()
        assert near(module(rows).reshape(x.shape[0], -1), q.reshape(x.shape) @ spec.stored().T)


def test_recognized_checkpoints_need_no_arguments(golden: Path) -> None:
    assert arguments(golden_case(golden, "awq/autoawq_b4_g128_gemm") / "checkpoint") == {}


def test_golden_experts_are_refused(installed: None, golden: Path) -> None:
    folder = golden_case(golden, "compressed_tensors/moe_qwen3_w4a16_g64_ct013")
    with pytest.raises(EngineError, match=r"quantized experts(.|\n)*Nothing was loaded"):
        load(folder / "checkpoint")


def test_a_quantized_cache_needs_the_word_allow(golden: Path) -> None:
    folder = golden_case(golden, "compressed_tensors/fp8_tensor_kv_fp8") / "checkpoint"
    try:
        adapter.install("cpu_reference")
        with pytest.raises(EngineError, match=r"key-value cache(.|\n)*policy='allow'"):
            load(folder)
        adapter.install("cpu_reference", policy="allow")
        assert isinstance(load(folder).qhal_plan, qhal.Plan)
    finally:
        adapter.uninstall()
