"""What a written folder takes over from its source, what it leaves behind by name, and what config.json says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qhal import CheckpointError
from qhal_schemes import open_checkpoint, quantize_checkpoint
from qhal_schemes.convert import convert_checkpoint

DOWN = "model.layers.0.mlp.down_proj"


def source(folder: Path, *, rows: int = 16, model: dict[str, Any] | None = None, **more: torch.Tensor) -> Path:
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{DOWN}.weight": torch.randn(rows, 256, generator=g).bfloat16(),
        "lm_head.weight": torch.randn(32, 128, generator=g).bfloat16(),
    }
    save_file(tensors | more, folder / "model.safetensors")
    said = {"model_type": "llama", "tie_word_embeddings": False} | ({"dtype": "bfloat16"} if model is None else model)
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_templates_go_along_and_what_stays_behind_is_named(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (folder / "onnx").mkdir()
    (folder / "vocab.bin").write_bytes(b"words")
    (folder / "tokenizer.json").write_text("{}")
    quantized = quantize_checkpoint(folder, tmp_path / "int4", "int4_g128", ignore=())
    assert quantized["left"] == ["onnx/", "vocab.bin"]
    converted = convert_checkpoint(tmp_path / "int4", tmp_path / "gptq", "gptq")
    assert converted["left"] == []
    assert (tmp_path / "gptq" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "gptq" / "tokenizer.json").exists()


def test_buffers_go_along_and_unclaimed_cache_scales_are_named(tmp_path: Path) -> None:
    scale = "model.layers.0.self_attn.k_scale"
    buffers = {"vision.bn.num_batches_tracked": torch.tensor(5), "model.rotary_emb.inv_freq": torch.ones(32)}
    folder = source(tmp_path / "source", **buffers, **{scale: torch.ones(1)})
    quantize_checkpoint(folder, tmp_path / "int4", "int4_g128")
    result = convert_checkpoint(tmp_path / "int4", tmp_path / "gptq", "gptq")
    written = open_checkpoint(tmp_path / "gptq")
    assert result["left"] == [scale] and scale not in written.tensor_names
    for name, value in buffers.items():
        assert torch.equal(written.tensor(name), value)


@pytest.mark.parametrize(("ignore", "said"), [((), True), (("lm_head",), False)])
def test_gptq_says_whether_the_head_is_quantized(tmp_path: Path, ignore: tuple[str, ...], said: bool) -> None:
    quantize_checkpoint(source(tmp_path / "source"), tmp_path / "int4", "int4_g128", ignore=ignore)
    convert_checkpoint(tmp_path / "int4", tmp_path / "gptq", "gptq")
    section = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert section["lm_head"] is said
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())["lm_head"] is said


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"dtype": "float16", "torch_dtype": "float16"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, {"torch_dtype": "bfloat16"}),
        ({"text_config": {"dtype": "float16"}}, {"text_config": {"dtype": "bfloat16"}}),
    ],
)
def test_every_key_of_the_dtype_says_the_new_one(
    tmp_path: Path, model: dict[str, Any], expected: dict[str, Any]
) -> None:
    quantize_checkpoint(source(tmp_path / "source", model=model), tmp_path / "int4", "int4_g128")
    convert_checkpoint(tmp_path / "int4", tmp_path / "bf16", "bf16")
    written = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert {key: written[key] for key in ("dtype", "torch_dtype", "text_config") if key in written} == expected
    assert open_checkpoint(tmp_path / "bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["uint4_g32", "uint3_g32", "int4_g32"])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_few_rows_come_back(tmp_path: Path, name: str, rows: int) -> None:
    """Their zero points fill a single packed word."""
    folder = source(tmp_path / "source", rows=rows)
    quantize_checkpoint(folder, tmp_path / "out", name)
    written, online = open_checkpoint(tmp_path / "out"), open_checkpoint(folder, quantize=name)
    assert torch.equal(written.dequantize(DOWN), online.dequantize(DOWN))


def test_of_a_single_file_no_neighbour_belongs_to_it(golden: Path, tmp_path: Path) -> None:
    case = golden / "gguf" / "legacy_quants" / "checkpoint" / "model.gguf"
    if not case.exists():
        pytest.skip("gguf/legacy_quants is not among the golden checkpoints (set QHAL_GOLDEN)")
    file = tmp_path / "models" / "model.gguf"
    file.parent.mkdir()
    shutil.copyfile(case, file)
    (file.parent / "notes.txt").write_text("of another model")
    (file.parent / "config.json").write_text('{"model_type": "other", "dtype": "float16"}')
    convert_checkpoint(file, tmp_path / "models" / "bf16", "bf16")
    written = tmp_path / "models" / "bf16"
    assert sorted(p.name for p in written.iterdir()) == ["config.json", "model.safetensors"]
    assert "other" not in (written / "config.json").read_text()
    assert open_checkpoint(written).dtype == torch.bfloat16


def test_nothing_is_written_into_the_source(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    for inside in (folder / "int4", folder / "a" / "b"):
        with pytest.raises(CheckpointError, match="a checkpoint is never written to"):
            quantize_checkpoint(folder, inside, "int4_g128")
    quantize_checkpoint(folder, tmp_path / "int4", "int4_g128")
    with pytest.raises(CheckpointError, match="a checkpoint is never written to"):
        convert_checkpoint(tmp_path / "int4", tmp_path / "int4" / "gptq", "gptq")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
