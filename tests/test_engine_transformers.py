"""The transformers adapter: what is loaded, what is refused before weights are read, what is never ignored."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qhal
import qhal_schemes
from qhal.errors import PlanError, QhalError
from qhal.formats import Format
from qhal.layer_formats import ExpertsFormat, LinearFormat

transformers = pytest.importorskip("transformers")

import qhal_engines.transformers as adapter  # noqa: E402
from qhal_engines import EngineError  # noqa: E402
from qhal_engines.module_match import _check_experts, ignore_patterns  # noqa: E402
from qhal_engines.modules import QhalExperts  # noqa: E402

GROUP = 32
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """int4, symmetric, groups of 32, packed as compressed-tensors does: 8 codes plus 8 in an int32, lowest first."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).to(torch.bfloat16)
    codes = (groups / scale.float()).round().clamp(-8, 7).view(rows, columns).to(torch.int64) + 8
    words = (codes.view(rows, -1, 8) << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    shape = torch.tensor([rows, columns], dtype=torch.int64)
    return {"weight_packed": packed, "weight_scale": scale.squeeze(-1), "weight_shape": shape}


def unpacked(planes: dict[str, torch.Tensor]) -> torch.Tensor:
    """The bf16 weight that `pack` stores: an integer of four bits times a bf16 scale, rounded once."""
    words = planes["weight_packed"].long() & 0xFFFFFFFF
    codes = ((words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15).flatten(1) - 8
    scale = planes["weight_scale"].float().repeat_interleave(GROUP, dim=1)
    return (codes * scale).to(torch.bfloat16)


SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def quant_config(ignore: tuple[str, ...]) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


def write_checkpoint(folder: Path, model: Any, quantized: tuple[str, ...] = LINEARS) -> Path:
    """Saves the model in bf16 and replaces the weights of the linears named by their last part."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [k for k in tensors if k.endswith(".weight") and k.split(".")[-2] in quantized]:
        planes = pack(tensors.pop(key))
        tensors.update({f"{key.removesuffix('weight')}{name}": plane for name, plane in planes.items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, quantization_config=quant_config(() if "lm_head" in quantized else ("lm_head",)))
    return folder


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(
        tmp_path_factory.mktemp("llama"), transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    )


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def installed() -> Iterator[None]:
    adapter.install("cpu_reference")
    yield
    adapter.uninstall()


def load(folder: Path, **arguments: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto", **arguments})


def dense(folder: Path, tmp: Path) -> Any:
    """The same model with every weight decoded to bf16 by this file, loaded by transformers alone."""
    tensors = load_file(folder / "model.safetensors")
    for key in [k for k in tensors if k.endswith(".weight_packed")]:
        stem = key.removesuffix("weight_packed")
        planes = {name: tensors.pop(stem + name) for name in ("weight_packed", "weight_scale", "weight_shape")}
        tensors[stem + "weight"] = unpacked(planes)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    tmp.mkdir()
    (tmp / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp / "model.safetensors", metadata={"format": "pt"})
    return load(tmp)


IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_the_model_is_whole_and_gives_the_decoded_models_numbers(installed: None, folder: Path, tmp_path: Path) -> None:
    model, info = load(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    quantized = {name for name, module in model.named_modules() if isinstance(module, adapter.QhalLinear)}
    assert len(quantized) == 14 and not any(name.startswith(tuple(quantized)) for name, _ in model.named_parameters())
    assert isinstance(model.qhal_plan, qhal.Plan) and "cpu_reference" in model.qhal_plan.explain()
    expected = dense(folder, tmp_path / "dense")(IDS).logits
    assert model(IDS).logits.dtype is torch.bfloat16
    assert torch.equal(model(IDS).logits, expected)  # the same decoded weights in the same torch call


@torch.inference_mode()
def test_it_agrees_with_the_compressed_tensors_package(folder: Path) -> None:
    pytest.importorskip("compressed_tensors")
    peer = load(folder)(IDS).logits
    adapter.install("cpu_reference")
    try:
        ours = load(folder)(IDS).logits
    finally:
        adapter.uninstall()
    assert torch.equal(ours, peer)


def test_uninstall_restores_the_tables(folder: Path) -> None:
    tables = (transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING, adapter.hf_auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(table) for table in tables]
    adapter.install("cpu_reference")
    adapter.install("cpu_reference", policy="allow")  # a second call keeps what the first one displaced
    assert all(set(qhal_schemes.known_methods()) <= set(table) for table in tables)
    assert tables[0]["compressed-tensors"].policy == "allow"
    adapter.uninstall()
    assert [dict(table) for table in tables] == before
    adapter.uninstall()
    assert [dict(table) for table in tables] == before


def test_a_policy_that_runs_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="exact, error, allow"):
        adapter.install(policy="report")


def test_a_refused_plan_stops_before_weights_are_read(
    installed: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(checkpoint: Any, ops: Any, policy: str, dtype: torch.dtype, **_: Any) -> None:
        assert policy == "error" and dtype is torch.bfloat16
        raise PlanError("gemm runs at a lower precision", None)  # type: ignore[arg-type]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(adapter.qhal, "resolve", refuse)
    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", never)
    with pytest.raises(PlanError, match="lower precision"):
        load(folder)


def test_a_module_that_the_model_lacks_is_an_error(installed: None, folder: Path) -> None:
    edit(folder, num_hidden_layers=1)
    with pytest.raises(EngineError, match=r"7 quantized modules .* not in LlamaForCausalLM(.|\n)*layers\.1\.") as error:
        load(folder)
    assert "and 2 more" in str(error.value)


def test_a_weight_of_another_shape_is_an_error(installed: None, folder: Path) -> None:
    edit(folder, intermediate_size=128)
    with pytest.raises(QhalError, match=r"(\[64, 128\]|\[128, 64\]), the checkpoint one of (\[64, 96\]|\[96, 64\])"):
        load(folder)


def test_a_quantized_module_that_is_no_linear_is_an_error(installed: None, folder: Path) -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    from qhal_engines.module_match import match_modules

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = torch.nn.Embedding(4, 4), Scaled(4, 4)

    for name, kind in (("embed", "Embedding"), ("up", "Scaled")):
        with pytest.raises(EngineError, match=rf"'{name}' is a {kind}"):
            match_modules(Net(), [LinearFormat(name, 4, 4, Format.parse("int4.g32*bf16"))])


def test_renamed_checkpoints_are_matched(installed: None, folder: Path) -> None:
    """A base model without its head reads a checkpoint whose names carry the head's prefix."""
    model, info = transformers.AutoModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert sum(isinstance(module, adapter.QhalLinear) for module in model.modules()) == 14
    assert not info["missing_keys"] and not info["unexpected_keys"]


@torch.inference_mode()
def test_quantizing_on_the_way_in_gives_the_written_checkpoints_numbers(installed: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).to(torch.bfloat16)
    plain.save_pretrained(tmp_path / "bf16")
    qhal_schemes.quantize_checkpoint(tmp_path / "bf16", tmp_path / "written", "int4_g32")
    config = adapter.QhalConfig(quantize="int4_g32")
    model, info = load(tmp_path / "bf16", quantization_config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(isinstance(module, adapter.QhalLinear) for module in model.modules()) == 14
    assert torch.equal(model(IDS).logits, load(tmp_path / "written")(IDS).logits)
    assert not torch.equal(model(IDS).logits, plain.eval()(IDS).logits)


@torch.inference_mode()
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head(installed: None, tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": False}))
    folder = write_checkpoint(tmp_path / "q", model, (*LINEARS, "lm_head"))
    edit(folder, tie_word_embeddings=tied)  # a file with its own head weight wins over the flag
    model, info = load(folder, output_loading_info=True)
    assert isinstance(model.lm_head, adapter.QhalLinear) and not info["missing_keys"]
    edit(folder, tie_word_embeddings=False)
    expected = dense(folder, tmp_path / "dense")(IDS).logits
    assert torch.equal(model(IDS).logits, expected)  # the same decoded weights in the same torch call


EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_quantized_experts_give_the_decoded_models_numbers(installed: None, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
        model, names = transformers.MixtralForCausalLM(config), ("w1", "w2", "w3")
    else:
        config = transformers.Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4, head_dim=16)
        model, names = transformers.Qwen3MoeForCausalLM(config), ()
    folder = write_checkpoint(tmp_path / "q", model, (*LINEARS, *names))
    model, info = load(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert sum(isinstance(module, QhalExperts) for module in model.modules()) == 2
    assert "grouped_gemm[indexed] experts=4 top_k=2 act=silu" in model.qhal_plan.explain()
    expected = dense(folder, tmp_path / "dense")(IDS).logits
    assert (model(IDS).logits - expected).norm() <= 0.01 * expected.norm()  # it rounds to bf16 after every expert


def test_experts_of_another_shape_or_kind_are_refused(installed: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    folder = write_checkpoint(tmp_path, transformers.MixtralForCausalLM(config), (*LINEARS, "w1", "w2", "w3"))
    edit(folder, num_hidden_layers=1)
    with pytest.raises(EngineError, match=r"quantized modules of the checkpoint are not in(.|\n)*layers\.1\."):
        load(folder)
    with pytest.MonkeyPatch.context() as patch:  # a model that says so does not read its last layer
        unused = {r"model\.layers\.1\..*"}
        patch.setattr(transformers.MixtralForCausalLM, "_keys_to_ignore_on_load_unexpected", unused)
        assert sum(isinstance(module, QhalExperts) for module in load(folder).modules()) == 1
    edit(folder, num_hidden_layers=2, num_local_experts=2)
    with pytest.raises(EngineError, match=r"gate_up_proj of shape \[2, 192, 64\], the checkpoint \[4, 192, 64\]"):
        load(folder)
    with torch.device("meta"):
        sizes = {k: v for k, v in SMALL.items() if k != "tie_word_embeddings"}
        other = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, num_local_experts=4, head_dim=16))
    weight = Format.parse("int4.g32*bf16")
    gate_up, down = LinearFormat("gate_up", 192, 64, weight), LinearFormat("down", 64, 96, weight)
    with pytest.raises(EngineError, match=r"has_bias=True.*a gate of its own"):
        _check_experts(ExpertsFormat("experts", 4, gate_up, down), "experts", other.model.layers[0].mlp.experts)


@torch.inference_mode()
def test_a_kv_format_for_a_checkpoint_without_quantization(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).to(torch.bfloat16).eval()
    plain.save_pretrained(tmp_path)
    adapter.install("cpu_reference", kv_format="bf16")
    try:
        model = load(tmp_path, quantization_config=adapter.QhalConfig())
        expected = plain(IDS).logits
        assert (model(IDS).logits - expected).norm() <= 0.01 * expected.norm()
        asked = [str(entry.request) for entry in model.qhal_plan.entries]
        assert asked[0] == "kv[mha] k=bf16 v=bf16 heads=2 dims=16,16 page=16"
        assert [text.partition("]")[0] for text in asked[1:]] == ["attention[prefill", "attention[decode"]
        adapter.install("cpu_reference", kv_format="mxfp6_e3m2")
        with pytest.raises(PlanError, match=r"kv\[mha\] k=e3m2(.|\n)*caches hold 4-, 8- or 16-bit elements"):
            load(tmp_path, quantization_config=adapter.QhalConfig())
        with pytest.raises(QhalError, match=r"'int9'(.|\n)*words for caches: fp8"):
            adapter.install("cpu_reference", kv_format="int9")
    finally:
        adapter.uninstall()


def test_moving_a_loaded_model_is_refused_not_ignored(installed: None, folder: Path) -> None:
    model = load(folder)
    model.to("cpu").eval()  # no move at all
    layer = model.model.layers[0].mlp.up_proj
    for move in (lambda: layer.to(torch.float16), lambda: layer.to("meta")):
        with pytest.raises(EngineError, match=r"prepared weights stay(.|\n)*load the model again"):
            move()


def test_another_device_is_refused_before_loading(installed: None, folder: Path) -> None:
    pytest.importorskip("accelerate")
    assert load(folder, device_map="cpu").device.type == "cpu"
    with pytest.raises(EngineError, match="device_map"):
        load(folder, device_map={"": "meta"})


def test_saving_is_refused(installed: None, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not serializable"):
        load(folder).save_pretrained(tmp_path / "again")


def test_a_layer_with_a_decode_input_is_told_when_it_decodes() -> None:
    class Layer:
        decode_index, nbytes = 1, 7

        def __call__(self, x: torch.Tensor, *, decode: bool = False) -> torch.Tensor:
            return torch.tensor(decode)

    module = adapter.QhalLinear("up", 4, 4)
    with pytest.raises(EngineError, match="before its weight was loaded"):
        module(torch.zeros(1, 4))
    module.place(Layer(), torch.device("cpu"), torch.bfloat16)  # type: ignore[arg-type]
    assert module.nbytes == 7
    decided = {shape: bool(module(torch.zeros(shape))) for shape in ((2, 1, 4), (2, 5, 4), (1, 4), (3, 4))}
    assert decided == {(2, 1, 4): True, (2, 5, 4): False, (1, 4): False, (3, 4): False}


def test_ignored_keys_are_exactly_those_of_replaced_modules() -> None:
    modules = dict.fromkeys([f"layers.{i}.{name}" for i in range(12) for name in ("up", "down")])
    replaced = [f"layers.{i}.up" for i in range(12)] + ["layers.3.down"]
    patterns = ignore_patterns(modules, {name: name for name in replaced})
    assert len(patterns) == 2
    assert len(ignore_patterns(modules, {f"model.{name}": name for name in replaced})) == 4
    keys = [f"{name}.weight_packed" for name in modules]
    hit = [key for key in keys if any(re.search(pattern, key) for pattern in patterns)]
    assert hit == [key for key in keys if key.removesuffix(".weight_packed") in replaced]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_package_imports_no_engine() -> None:
    done = run("import sys, qhal_engines; print('transformers' in sys.modules, 'vllm' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_missing_transformers_is_one_clear_error() -> None:
    code = "import sys; sys.modules['transformers'] = None\nimport qhal_engines.transformers"
    done = run(code)
    assert done.returncode == 1
    assert "EngineMissingError" in done.stderr and "pip install 'transformers" in done.stderr
