"""Attention modules of a checkpoint: which layers have one, and whether its keys are what the cache should hold."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qhal.errors import CheckpointError
from qhal_schemes.config import CheckpointConfig

_ATTENTION = re.compile(
    r"(.*\.layers\.(\d+)\.(?:self_attn|attention|attn))\.(?:[kv]_scale|[qkvo]_proj\..*|qkv_proj\..*)$"
)


def attention_layers(names: Iterable[str]) -> dict[int, str]:
    """Layer number -> attention module, for every layer that has one. names: of all tensors."""
    layers: dict[int, str] = {}
    for name in names:
        found = _ATTENTION.match(name)
        if found:
            layers.setdefault(int(found[2]), found[1])
    return dict(sorted(layers.items()))


def check_cache_rows(config: CheckpointConfig, module: str, rows: int | None) -> None:
    """Heads times features must be the rows of k_proj, whose output is what the cache holds; None: rows unknown."""
    heads, dim = config.kv_heads, config.head_dim
    if heads and dim and rows is not None and rows != heads * dim:
        raise CheckpointError(
            f"{config.folder / 'config.json'}: num_key_value_heads {heads} and head_dim {dim} need a k_proj "
            f"of {heads * dim} rows, {module} has {rows}"
        )
