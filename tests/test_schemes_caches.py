"""Caches of a checkpoint by layer: each layer has its own scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from qhal_schemes import open_checkpoint


def test_each_layer_has_its_own_scales(write_checkpoint: Callable[..., Path]) -> None:
    tensors, scales = {"lm_head.weight": torch.zeros(8, 64)}, {}
    for i in (0, 3):
        for n, part in enumerate("kv"):
            at = f"model.layers.{i}.self_attn."
            tensors[f"{at}{part}_proj.weight"] = torch.ones(64, 64).to(torch.float8_e4m3fn)
            tensors[f"{at}{part}_proj.weight_scale"] = torch.ones(1)
            scales[i, part] = tensors[f"{at}{part}_proj.{part}_scale"] = torch.tensor([0.25 + i + n])
    cache = {"dynamic": False, "num_bits": 8, "type": "float"}
    section = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": cache, "ignore": ["lm_head"]}
    for name in list(tensors):
        if name.endswith("_proj.weight"):
            tensors[name.replace(".weight", ".input_scale")] = torch.ones(1)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64}
    ckpt = open_checkpoint(write_checkpoint(tensors, section, model=heads))
    assert sorted(ckpt.kv_layers) == [0, 3]
    for layer in (0, 3):
        spec = ckpt.kv_format(layer)
        assert spec is not None and spec.k.scale is not None and spec.v.scale is not None
        assert spec.k.scale.item() == scales[layer, "k"].item() and spec.v.scale.item() == scales[layer, "v"].item()
    assert ckpt.kv_format(1) is None
