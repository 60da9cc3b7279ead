"""Fixtures shared by all tests: where golden checkpoints lie, and a writer of tiny checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def golden() -> Path:
    """Checkpoints with their tools' own answers: QHAL_GOLDEN, or the small set that comes with the tests."""
    return Path(os.environ.get("QHAL_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write config.json and model.safetensors (or shards) to a new folder; returns the folder."""

    def write(
        tensors: dict[str, torch.Tensor],
        quantization: Any = None,
        *,
        shards: int = 1,
        model: dict[str, Any] | None = None,
        name: str = "checkpoint",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False}
        config |= {"hidden_act": "silu", **(model or {})}
        if quantization is not None:
            config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {k: t.contiguous().clone() for k, t in tensors.items()}  # no two share memory
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        names = list(tensors)
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = names[i::shards]
            save_file({k: tensors[k] for k in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write
