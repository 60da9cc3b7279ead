"""humming as a peer: its own configuration and choice of tiles, over words that nothing was quantized to.

Timings do not depend on the numbers, so the tensors are made in the shapes that its launcher checks: no quantization or
repacking kernel has to be compiled, only the products that are measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cuda_rows.bench import Call

Made = tuple[Any, dict[str, Tensor], str, str]


def made(
    weight: dict[str, Any], act: dict[str, Any] | None, n: int, k: int, ms: Sequence[int], experts: int = 0
) -> Made:
    """(LayerConfig, tensors, compute configuration, tiles for these row counts), the kernels compiled."""
    from humming import dtypes
    from humming.kernel.humming import HummingKernel
    from humming.schema.base import BaseInputSchema, BaseWeightSchema
    from humming.transform import prepare_layer_config
    from humming.tune import get_heuristics_config

    kind = "grouped_contiguous" if experts else "dense"
    x = dict(act or {"dtype": dtypes.DataType.from_torch_dtype(torch.bfloat16)}, quant_method="humming")
    config = prepare_layer_config(
        n,
        k,
        BaseWeightSchema.from_config(dict(weight, quant_method="humming")),
        BaseInputSchema.from_config(x),
        num_experts=experts or None,
        torch_dtype=torch.bfloat16,
        device=0,
    )
    tiles, low = [], 0
    for i, m in enumerate(sorted(ms)):
        tile = get_heuristics_config(config, shape_m=m, gemm_type=kind, device=0)
        high = 1 << 30 if i == len(ms) - 1 else m
        tiles.append([low, high, tile])
        low = high
    compute, tuning = json.dumps({"gemm_type": kind}), json.dumps(tiles)
    HummingKernel.prepare_kernels(config.to_str(), compute, tuning, 0)
    return config, tensors(config, experts), compute, tuning


def tensors(config: Any, experts: int = 0) -> dict[str, Tensor]:
    """Weight, scales and zero points of one layer on the current GPU."""
    n, k, bits, lead = config.shape_n, config.shape_k, config.b_dtype.num_bits, (experts,) if experts else ()
    columns = 64 if config.use_packed_k_layout else 256 // config.a_dtype.num_bits
    shape = (n, k * bits // 32) if config.use_flat_weight else (k // columns, n * columns * bits // 32)
    groups = k // config.weight_scale_group_size if config.weight_scale_group_size else 1
    found = {"weight": torch.randint(-(1 << 31), (1 << 31) - 1, (*lead, *shape), dtype=torch.int32, device="cuda")}
    across = n // config.weight_scale_group_size_n if config.is_block_weight_scale else n
    kinds = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float8e8m0": torch.float8_e8m0fnu,
        "float8e4m3": torch.float8_e4m3fn,
    }
    found["weight_scale"] = torch.ones(*lead, groups, across, device="cuda").to(kinds[str(config.bs_dtype)])
    if config.has_zero_point:
        width = n * (4 if bits <= 4 else 8) // 32
        found["zero_point"] = torch.zeros(*lead, groups, width, dtype=torch.int32, device="cuda")
    if config.is_tensor_weight_scale_2:
        found["weight_scale_2"] = torch.ones(experts or 1, device="cuda")
    return found


def calls(made: Made, xs: Sequence[Tensor], count: int, **more: Sequence[Any]) -> list[Call]:
    """`count` calls over copies of the weight; xs and what `more` holds are taken in turn."""
    from humming.forward import humming_forward

    config, first, compute, tuning = made
    found: list[Call] = []
    for i in range(count):
        own = first if i == 0 else {name: t.clone() for name, t in first.items()}
        locks = torch.zeros(2048, dtype=torch.int32, device="cuda")
        given = {name: values[i % len(values)] for name, values in more.items()}
        how = {"compute_config": compute, "tuning_config": tuning, "locks": locks}
        found.append(partial(humming_forward, config, xs[i % len(xs)], **own, **how, **given))
    return found
