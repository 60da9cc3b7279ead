"""What callers pass to a checkpoint: layers, experts, shards and names that make no sense are one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qhal
from qhal_schemes import open_checkpoint, quantize_checkpoint

CASE = "compressed_tensors/w4a16_g128_sym"
MOE = "compressed_tensors/moe_qwen3_w4a16_g64_ct013"


@pytest.mark.parametrize("layer", [1, 99, -1, "0", None, 0.0, True])
def test_a_layer_that_does_not_exist_is_not_an_unquantized_one(golden: Path, layer: Any) -> None:
    ckpt = open_checkpoint(golden / CASE / "checkpoint")
    assert ckpt.kv_format(0) is None
    with pytest.raises(qhal.CheckpointError, match=r"no layer .*layers are 0\.\.0"):
        ckpt.kv_format(layer)


@pytest.mark.parametrize("experts", [5, (1,), slice(0, 2), "ab", (0, 1.5), [1, 2], range(0, 4, 2), (0, 99), (-1, 2)])
def test_experts_are_a_range_or_first_and_count(golden: Path, experts: Any) -> None:
    ckpt = open_checkpoint(golden / MOE / "checkpoint")
    prefix = next(f.name for f in ckpt.layer_formats() if isinstance(f, qhal.ExpertsFormat))
    assert ckpt.experts_spec(prefix, range(1, 3)).format.experts == 2
    with pytest.raises(qhal.CheckpointError):
        ckpt.experts_spec(prefix, experts)


@pytest.mark.parametrize(
    "shard", [(2, 0, 2), (-1, 0, 2), (0, 0), 2, "012", (0, 0.0, 2), (0, 2, 2), (0, 0, 0), [0, 0, 2]]
)
def test_a_shard_is_dim_rank_and_world(golden: Path, shard: Any) -> None:
    ckpt = open_checkpoint(golden / CASE / "checkpoint")
    with pytest.raises(qhal.ShardError):
        ckpt.linear_spec(ckpt.modules(quantized=True)[0], shard)


@pytest.mark.parametrize("names", [3, None, [3], []])
def test_names_are_text(golden: Path, names: Any) -> None:
    with pytest.raises(qhal.CheckpointError):
        open_checkpoint(golden / CASE / "checkpoint").linear_spec(names)


@pytest.mark.parametrize("path", [None, 3, b"x"])
def test_a_path_is_a_path(path: Any) -> None:
    with pytest.raises(qhal.CheckpointError, match="give the path"):
        open_checkpoint(path)


def test_a_file_format_that_does_not_exist_is_refused(golden: Path, tmp_path: Path) -> None:
    source = golden / CASE / "checkpoint"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["format"] = "banana"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(qhal.CheckpointError, match="banana"):
        open_checkpoint(tmp_path)


def test_fused_experts_never_stay_plain_without_a_word(write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    prefix = "model.layers.0.mlp"
    tensors = {
        f"{prefix}.experts.gate_up_proj": torch.zeros(4, 128, 64).bfloat16(),
        "model.layers.0.self_attn.q_proj.weight": torch.ones(64, 64).bfloat16(),
    }
    source = write_checkpoint(tensors, model={"num_hidden_layers": 1})
    with pytest.raises(qhal.CheckpointError, match=r"unsupported.*all experts in one"):
        quantize_checkpoint(source, tmp_path / "out", "int4_g32")
    assert not (tmp_path / "out").exists()
    ignore = ("lm_head", f"{prefix}.experts.gate_up_proj")
    assert quantize_checkpoint(source, tmp_path / "out", "int4_g32", ignore=ignore)["modules"] == 1
    written = open_checkpoint(tmp_path / "out")
    assert f"{prefix}.experts.gate_up_proj" in written.account.plain
