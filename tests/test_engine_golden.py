"""Checkpoints of other tools in the transformers adapter: their logits, their layers' outputs, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qhal_schemes
from qhal.encoding import encode
from qhal.errors import QhalError
from qhal.formats import Format
from qhal.specs import Operand

transformers = pytest.importorskip("transformers")

import qhal_engines.transformers as adapter  # noqa: E402
from qhal_engines.kv_attach import cache_name  # noqa: E402
from qhal_engines.kv_cache import QhalLayer  # noqa: E402
from qhal_engines.loading import arguments  # noqa: E402
from qhal_engines.modules import QhalExperts  # noqa: E402
from qhal_portable.kv import read  # noqa: E402


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
    "rotations/ct_hadamard_online_r4",
    "rotations/ct_hadamard_block32_randomized_r1",
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
    "aqlm/aqlm_1x16_g8",
    "vptq/vptq_v6_k512_outlier",
    "vptq/vptq_v8_k1024_res256_norm_perm",
    "vptq/vptq_v8_k256",
    "vptq/vptq_v8_k256_unpacked_groups",
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
def test_spinquant_models_give_the_logits_of_the_model(installed: None, golden: Path) -> None:
    """Each linear turns its own side, so the model stays what it was; SpinQuant's own also subtracts a mean."""
    folder = golden_case(golden, "rotations/spinquant_r1_r2_r4")
    expected = load_file(folder / "expected.safetensors")
    model = load(folder / "checkpoint", **arguments(folder / "checkpoint"))
    assert isinstance(model.lm_head, adapter.QhalLinear)
    assert near(model(expected["logits.input_ids"].long()).logits, expected["logits_unrotated"])


@torch.inference_mode()
@pytest.mark.parametrize("case", ["aqlm/aqlm_1x8_g8", "aqlm/aqlm_2x8_g8"])
def test_aqlm_models_run_on_the_decoded_weights(installed: None, golden: Path, case: str) -> None:
    """The tool's own outputs are wrong here (a race in its kernel), so a model of plain weights is the peer."""
    folder = golden_case(golden, case) / "checkpoint"
    model, ckpt = load(folder), qhal_schemes.open_checkpoint(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {n: ckpt.tensor(n).float() for n in ckpt.account.plain}
    plain.load_state_dict(weights | {f"{m}.weight": ckpt.stored(m) for m in ckpt.modules(quantized=True)})
    ids = torch.arange(12)[None] * 5
    assert near(model(ids).logits, plain(ids).logits)


@torch.inference_mode()
def test_quark_models_give_quarks_logits(installed: None, golden: Path) -> None:
    """MXFP4 weights and inputs are exact in bf16, so is the model; a weight-only one differs by roundings of bf16."""
    for case, exact in (("mxfp4_w_a", True), ("uint4_group32_wo_asym", False)):
        folder = golden_case(golden, f"quark/{case}")
        expected = load_file(folder / "expected.safetensors")
        ids = expected["logits.input_ids"].long()
        logits = load(folder / "checkpoint")(ids.reshape(-1, ids.shape[-1])).logits.reshape(expected["logits"].shape)
        assert torch.equal(logits.float(), expected["logits"]) if exact else near(logits, expected["logits"])


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


@torch.inference_mode()
def test_golden_experts_give_their_tools_logits(installed: None, golden: Path) -> None:
    folder = golden_case(golden, "compressed_tensors/moe_qwen3_w4a16_g64_ct013")
    expected = load_file(folder / "expected.safetensors")
    model, info = load(folder / "checkpoint", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert isinstance(model.model.layers[0].mlp.experts, QhalExperts)
    ids = expected["logits.input_ids"].long()
    assert near(model(ids.reshape(-1, ids.shape[-1])).logits.reshape(expected["logits"].shape), expected["logits"])


@torch.inference_mode()
@pytest.mark.parametrize("case", ["moe_qwen3_fp8_dynamic", "moe_qwen3_w4a16_g64_ct013"])
def test_golden_experts_give_the_products_of_their_decoded_weights(installed: None, golden: Path, case: str) -> None:
    """Every product in float64, rounded where the contract rounds: the same bits."""
    folder = golden_case(golden, f"compressed_tensors/{case}")
    expected = load_file(folder / "expected.safetensors")
    prefix = "model.layers.0.mlp.experts"
    experts = load(folder / "checkpoint").get_submodule(prefix)
    checkpoint = qhal_schemes.open_checkpoint(folder / "checkpoint")
    spec = checkpoint.experts_spec(prefix)
    for name in ("gate_proj", "up_proj", "down_proj"):  # what the tool says of one expert's weights
        key = f"{prefix}.0.{name}"
        assert torch.equal(checkpoint.dequantize(key).bfloat16().float(), expected[f"{key}.weight"])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, spec.gate_up.weight.shape[-1], generator=g).bfloat16()
    share, ids = torch.rand(9, 4, generator=g).topk(2)
    ids[3, 1] = 4  # elsewhere, as expert parallelism writes it

    def product(rows: torch.Tensor, name: str, operand: Operand | None) -> torch.Tensor:
        rows = rows if operand is None else encode(rows, operand.format).dequantize()
        return rows.double() @ checkpoint.dequantize(f"{prefix}.{name}").double().T

    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(9):
        for k, e in enumerate(ids[t].tolist()):
            if e < 4:
                gate, up = (product(x[t : t + 1], f"{e}.{n}_proj", spec.gate_up.input) for n in ("gate", "up"))
                hidden = (torch.nn.functional.silu(gate) * up).bfloat16()
                y[t] += share[t, k].double() * product(hidden, f"{e}.down_proj", spec.down.input)[0]
    assert torch.equal(experts(x, ids, share), y.bfloat16())


@torch.inference_mode()
def test_a_golden_cache_runs_with_its_stored_scales(installed: None, golden: Path) -> None:
    folder = golden_case(golden, "compressed_tensors/fp8_tensor_kv_fp8")
    expected = load_file(folder / "expected.safetensors")
    model, info = load(folder / "checkpoint", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert cache_name(model) == "k=e4m3fn.tensor*bf16 v=e4m3fn.tensor*bf16"
    assert "attention[decode]" in model.qhal_plan.explain()

    # what the tool's cache makes of keys and values; it computes quotients in bf16, where the serving rule says fp32
    name = "model.layers.0.self_attn"
    k, v = (expected[f"{name}.{part}_scale.input"].bfloat16() for part in "kv")
    kv, rule = model.get_submodule(name).qhal_kv, Format.parse("e4m3fn.tensor*bf16@arith=bf16")
    layer = QhalLayer(replace(kv, request=replace(kv.request, k=rule, v=rule)))
    layer.write(layer.update(k, v)[0], None)
    for which, part in enumerate("kv"):
        held = read(layer.cache, which, torch.tensor(layer.sequences.pages[0]), 6)  # [tokens, heads, features]
        assert torch.equal(held.transpose(0, 1)[None].bfloat16().float(), expected[f"{name}.{part}_scale.output"])

    # the whole model: the same attention over keys and values that this file has rounded
    ids = torch.arange(3, 27)[None]
    ours = model(ids).logits
    stored = load_file(folder / "checkpoint" / "model.safetensors")
    scales = [stored[f"{name}.{part}_scale"].float() for part in "kv"]
    stage = QhalLayer.update

    def rounded(self: QhalLayer, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
        return stage(self, *(fake_fp8(x, s) for x, s in zip((keys, values), scales, strict=True)))

    adapter.install("cpu_reference", kv_format="fp32")
    plain = load(folder / "checkpoint")
    assert not torch.equal(plain(ids).logits, ours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QhalLayer, "update", rounded)
        assert torch.equal(plain(ids).logits, ours)


def fake_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def test_a_kv_format_replaces_the_golden_one(golden: Path) -> None:
    folder = golden_case(golden, "compressed_tensors/fp8_tensor_kv_fp8") / "checkpoint"
    names = {"auto": "k=e4m3fn.tensor*bf16 v=e4m3fn.tensor*bf16", "fp8,int4": "k=e4m3fn.tensor*bf16 v=int4.row*fp32"}
    try:
        for kv_format, name in names.items():
            adapter.install("cpu_reference", kv_format=kv_format)
            assert cache_name(load(folder)) == name  # fp8 per tensor: the stored scale is used
        adapter.install("cpu_reference", kv_format="int8.tensor*fp32")
        with pytest.raises(QhalError, match=r"int8\.tensor\*fp32 of k needs scales"):
            load(folder)
    finally:
        adapter.uninstall()
