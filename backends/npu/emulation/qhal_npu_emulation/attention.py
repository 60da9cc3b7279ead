"""Attention and cache writes by their documents: paged caches, decode steps, int8 caches with their scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qhal_npu_emulation.numbers import F32


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    actual_seq_lengths_kv: list[int] | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    inner_precise: int = 0,
    softmax_lse_flag: bool = False,
    **other: Any,
) -> tuple[Tensor, Tensor]:
    """BNSD queries over paged [blocks, block, KV_N * D] keys and values; per-channel antiquant, offset added first.

    Decoded keys and values, and P, are rounded to the type of the query before each product.
    """
    changed = {k: v for k, v in other.items() if v not in (None, 0, False, 2147483647)}
    if input_layout != "BNSD" or block_table is None or actual_seq_lengths_kv is None or changed:
        raise NotImplementedError(f"emulated: paged BNSD decode, not {input_layout} with {sorted(changed)}")
    heads, dim = query.shape[1], query.shape[3]
    groups = num_key_value_heads or heads

    def rows(t: Tensor, b: int, n: int, s: Tensor | None, o: Tensor | None) -> Tensor:
        found = t[block_table[b].long()].flatten(0, 1)[:n].reshape(n, groups, dim).transpose(0, 1).to(F32)
        if s is not None:
            off = 0.0 if o is None else o.to(F32).reshape(groups, 1, dim)
            found = (found + off) * s.to(F32).reshape(groups, 1, dim)
        return found.to(query.dtype).to(F32).repeat_interleave(heads // groups, 0)

    out = torch.empty_like(query)
    for b, n in enumerate(actual_seq_lengths_kv):
        k = rows(key, b, n, key_antiquant_scale, key_antiquant_offset)
        v = rows(value, b, n, value_antiquant_scale, value_antiquant_offset)
        s = query[b].to(F32) @ k.transpose(-1, -2) * scale
        e = torch.exp(s - s.amax(-1, keepdim=True))
        out[b] = (e.to(query.dtype).to(F32) @ v / e.sum(-1, keepdim=True)).to(query.dtype)
    return out, torch.empty(1 if softmax_lse_flag else 0, dtype=F32)


def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """input[indices[i]] = updates[i]."""
    input[tuple(indices.long().unbind(-1))] = updates.to(input.dtype)
    return input
