"""What transformers must be told about a checkpoint that its config.json does not lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

import qhal_schemes
from qhal_engines.transformers import QhalConfig

_FOUND_BY_NAME = ("model.safetensors", "model.safetensors.index.json")


def arguments(folder: str | Path) -> dict[str, Any]:
    """Arguments for from_pretrained(folder, ...); none for a checkpoint that transformers recognizes by itself.

    Some formats say in a file of their own how weights are quantized (quant_model_description.json), so that
    config.json has no section, and give their weight files other names. `install` must have been called.
    """
    checkpoint = qhal_schemes.open_checkpoint(folder)
    found: dict[str, Any] = {}
    if checkpoint.method and not any(key in checkpoint.config for key in ("quantization_config", "compression_config")):
        found["quantization_config"] = QhalConfig()
    if checkpoint.weights_file not in _FOUND_BY_NAME:
        found["config"] = AutoConfig.from_pretrained(folder)
        found["config"].transformers_weights = checkpoint.weights_file
    return found
