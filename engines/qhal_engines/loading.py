"""What transformers must be told about a checkpoint that its config.json does not lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

import qhal_schemes
from qhal_engines.transformers import QhalConfig

_FOUND_BY_NAME = ("model.safetensors", "model.safetensors.index.json")


def arguments(folder: str | Path, kv_format: str | None = None) -> dict[str, Any]:
    """Arguments for from_pretrained(folder, ...); none for a checkpoint that transformers recognizes by itself.

    Some formats say in a file of their own how weights are quantized (quant_model_description.json), so that
    config.json has no section, and give their weight files other names; a checkpoint without quantization needs a
    section to get a quantized cache. `install` must have been called, with the same kv_format.
    """
    checkpoint = qhal_schemes.open_checkpoint(folder)
    found: dict[str, Any] = {}
    wanted = checkpoint.method or kv_format is not None
    if wanted and not any(key in checkpoint.config for key in ("quantization_config", "compression_config")):
        found["quantization_config"] = QhalConfig()
    if checkpoint.weights_file not in _FOUND_BY_NAME:
        found["config"] = AutoConfig.from_pretrained(folder)
        found["config"].transformers_weights = checkpoint.weights_file
    return found
