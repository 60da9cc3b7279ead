"""Attention and cache writes by their documents: layouts, pages, antiquant modes, masks, sinks; what they forbid.

Keys and values that are decoded, and P, are rounded to the type of the query before each product. What a document
leaves undefined (rows of queries that are not there) is NaN, so that it would show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qhal_npu_emulation.numbers import F32

_UNBOUNDED = 2147483647
Rows = Callable[[int, int], Tensor]
"""(sequence, keys) -> float32 [keys, KV_N, D]"""
_AXIS = {"BNSD": 2, "BSND": 1}
"""Where the queries of a sequence are."""


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = _UNBOUNDED,
    next_tokens: int = _UNBOUNDED,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
    **other: Any,
) -> tuple[Tensor, Tensor]:
    """BNSD or BSND queries over padded keys and values, or over pages [blocks, block, KV_N * D]."""
    _known(other)
    _refuse(input_layout in ("BNSD", "BSND") and actual_seq_lengths_kv is not None, input_layout)
    groups = num_key_value_heads or num_heads
    scales = (key_antiquant_scale, key_antiquant_offset), (value_antiquant_scale, value_antiquant_offset)
    modes = key_antiquant_mode, value_antiquant_mode
    single = query.shape[_AXIS[input_layout]] == 1
    rows = [
        _antiquantized(t, block_table, block_size, groups, plane, mode, query.dtype, single)
        for t, plane, mode in zip((key, value), scales, modes, strict=True)
    ]
    return _batched(
        query, rows, actual_seq_lengths, actual_seq_lengths_kv or (), input_layout, scale, softmax_lse_flag,
        _Mask(atten_mask, sparse_mode, pre_tokens, next_tokens, _width(block_table, block_size)),
    )  # fmt: skip


def npu_fused_infer_attention_score_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = _UNBOUNDED,
    next_tokens: int = _UNBOUNDED,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    return_softmax_lse: bool = False,
    **other: Any,
) -> tuple[Tensor, Tensor]:
    """TND; BSND over pages; BNSD over latent pages, whose rope parts are a second product."""
    _known(other)
    _refuse(input_layout in ("TND", "BNSD", "BSND") and actual_seq_kvlen is not None, input_layout)
    groups, lens = num_key_value_heads or num_query_heads, list(actual_seq_kvlen or ())
    mask = _Mask(atten_mask, sparse_mode, pre_tokens, next_tokens, _width(block_table, block_size))
    if input_layout == "TND":
        return _ragged(query, key, value, list(actual_seq_qlen or ()), lens, softmax_scale, mask, learnable_sink,
                       return_softmax_lse)  # fmt: skip
    _refuse(learnable_sink is None and block_table is not None, "sinks or no pages")
    single, none = query.shape[_AXIS[input_layout]] == 1, (None, None)
    rows = [_antiquantized(t, block_table, block_size, groups, none, 0, query.dtype, single) for t in (key, value)]
    if query_rope is None or key_rope is None:
        return _batched(query, rows, actual_seq_qlen, lens, input_layout, softmax_scale, return_softmax_lse, mask)
    _refuse((query.shape[2:], query_rope.shape[3], groups) == ((1, 512), 64, 1), "latent sizes")
    _refuse(block_size in (16, 128) and sparse_mode == 0 and atten_mask is None, "latent pages or masks")
    rope = _antiquantized(key_rope, block_table, block_size, groups, none, 0, query.dtype, single)
    latent = rows[0]
    both: list[Rows] = [lambda b, n: torch.cat([latent(b, n), rope(b, n)], -1), rows[1]]
    whole = torch.cat([query, query_rope], -1)
    return _batched(whole, both, None, lens, input_layout, softmax_scale, return_softmax_lse, mask)


class _Mask:
    """What of L keys t queries see: bool [t, L]."""

    def __init__(self, mask: Tensor | None, mode: int, before: int, after: int, width: int) -> None:
        if mode == 4:
            triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
            _refuse(mask is not None and torch.equal(mask, triangle), "band without its triangle")
        _refuse(mode in (0, 4), f"sparse_mode {mode}")
        self.mask, self.mode, self.before, self.after, self.width = mask, mode, before, after, width

    def seen(self, b: int, t: int, length: int, single: bool) -> Tensor:
        """single: every sequence has one query, and then no band is read."""
        if self.mode == 4 and not single:
            i, j = torch.arange(t)[:, None] + (length - t), torch.arange(length)[None]
            return (j >= i - self.before) & (j <= i + self.after)
        if self.mode == 0 and self.mask is not None:
            _refuse(self.mask.dim() == 4 and self.mask.shape[3] >= self.width, f"mask {tuple(self.mask.shape)}")
            return ~self.mask[b, 0, :t, :length]
        return torch.ones(t, length, dtype=torch.bool)


def _width(table: Tensor | None, block: int) -> int:
    return 0 if table is None else table.shape[1] * block


def _antiquantized(
    t: Tensor, table: Tensor | None, block: int, groups: int, planes: tuple[Tensor | None, Tensor | None], mode: int,
    kind: torch.dtype, single: bool,
) -> Rows:  # fmt: skip
    """Rows of padded [B, S, KV_N, D] or of pages; int8 ones are (code + offset) * scale in the type of the query.

    single: one query in every sequence
    """
    scale, offset = planes
    unit = 32 if t.dtype == torch.int8 else 16
    if table is not None:
        _refuse(t.dim() == 3 and t.shape[2] <= 65535 and t.is_contiguous(), f"pages {tuple(t.shape)}")
        ok = block % unit == 0 and 0 < block <= 512 and t.shape[1] == block
        _refuse(ok and (single or block % 128 == 0), f"block_size {block}")
    _refuse((t.dtype == torch.int8) == (scale is not None), f"{t.dtype} with scale {scale is not None}")
    _refuse(
        t.dtype == kind or (t.dtype == torch.int8 and single and table is not None),
        f"{t.dtype} beside {kind}, {'one query' if single else 'more than one query'}",
    )
    for plane in (p for p in planes if p is not None):
        _refuse(plane.dtype == (F32 if mode == 3 else kind), f"mode {mode} in {plane.dtype}")

    def rows(b: int, n: int) -> Tensor:
        found = t[b, :n] if table is None else t[table[b].long()].flatten(0, 1)[:n]
        found = found.reshape(n, groups, -1).to(F32)
        if scale is None:
            return found
        off = torch.zeros((), dtype=F32) if offset is None else _plane(offset, mode, b, n, groups)
        return ((found + off) * _plane(scale, mode, b, n, groups)).to(kind).to(F32)

    return rows


def _plane(p: Tensor, mode: int, b: int, n: int, groups: int) -> Tensor:
    """float32, to be broadcast over [n, KV_N, D]: mode 0 by channel, 2 by head, 3 by token and head."""
    shapes = {0: p.dim() == 4 and p.shape[:3] == (1, groups, 1), 2: p.shape == (groups,), 3: p.shape[1:2] == (groups,)}
    _refuse(shapes.get(mode, False), f"mode {mode} with {tuple(p.shape)}")
    if mode == 3:
        return p[b, :, :n].T.reshape(n, groups, 1)
    return p.to(F32).reshape(1, groups, -1)


def _batched(
    query: Tensor, rows: list[Rows], queries: Sequence[int] | None, keys: Sequence[int], layout: str, scale: float,
    lse: bool, mask: _Mask,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q = query if layout == "BSND" else query.transpose(1, 2)
    longest = q.shape[1]
    counts = [longest] * q.shape[0] if queries is None or longest == 1 else list(queries)
    dim = rows[1](0, 1).shape[-1]
    o = torch.full((*q.shape[:3], dim), torch.nan, dtype=query.dtype)
    logs = torch.full((*q.shape[:3], 1), torch.nan, dtype=F32)
    for b, (t, n) in enumerate(zip(counts, keys, strict=True)):
        k, v = rows[0](b, n), rows[1](b, n)
        o[b, :t], logs[b, :t] = _one(q[b, :t], k, v, scale, mask.seen(b, t, n, longest == 1), None)
    o = o if layout == "BSND" else o.transpose(1, 2).contiguous()
    return o, logs.transpose(1, 2).contiguous() if lse else torch.empty(0, dtype=F32)


def _ragged(
    query: Tensor, key: Tensor, value: Tensor, queries: list[int], keys: list[int], scale: float, mask: _Mask,
    sink: Tensor | None, lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """TND: ends of the sequences, no pages; bf16 of 128 features, or of 192."""
    widths = (query.shape[2], key.shape[2], value.shape[2])
    _refuse(widths in ((128,) * 3, (192, 192, 128), (192,) * 3), f"D {widths}")
    _refuse(all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in (query, key, value)), "TND takes bf16")
    _refuse(mask.width == 0 and (mask.mode == 4 or mask.mask is None), "pages or a whole mask in TND")
    sinks = sink is None or (sink.dtype == torch.bfloat16 and sink.shape == query.shape[1:2] and widths[2] <= 128)
    _refuse(sinks and not (sink is not None and lse), "learnable_sink")
    _refuse(len(queries) == len(keys) and queries[-1] == len(query) and keys[-1] == len(key), "ends")
    o = torch.empty(*query.shape[:2], value.shape[2], dtype=query.dtype)
    logs = torch.empty(*query.shape[:2], 1, dtype=F32)
    single = all(b - a == 1 for a, b in zip([0, *queries], queries, strict=False))
    for b, (t1, n1) in enumerate(zip(queries, keys, strict=True)):
        t0, n0 = (0, 0) if b == 0 else (queries[b - 1], keys[b - 1])
        seen = mask.seen(b, t1 - t0, n1 - n0, single)
        o[t0:t1], logs[t0:t1] = _one(query[t0:t1], key[n0:n1].to(F32), value[n0:n1].to(F32), scale, seen, sink)
    return o, logs if lse else torch.empty(0, dtype=F32)


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """o [t, N, Dv] in the type of q [t, N, D] and lse [t, N, 1] over k [L, KV_N, D] and v, sums in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = torch.einsum("tnd,lnd->ntl", q.to(F32), k) * scale
    s = torch.where(seen, s, -torch.inf)
    top = s.amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink.to(F32)[:, None, None])
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink.to(F32)[:, None, None] - top)
    held = torch.where(seen[None], e.to(q.dtype).to(F32), 0.0)
    o = torch.einsum("ntl,lnd->tnd", held, v) / total.permute(1, 0, 2)
    return o.to(q.dtype), (top + torch.log(total)).permute(1, 0, 2)


def _refuse(ok: bool, what: str) -> None:
    """NotImplementedError for what the documents forbid, and for what is not emulated."""
    if not ok:
        raise NotImplementedError(f"not by the documents, or not emulated: {what}")


def _known(other: dict[str, Any]) -> None:
    given = sorted(k for k, v in other.items() if v not in (None, 0, False))
    _refuse(not given, ", ".join(given))


def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """input[indices[i]] = updates[i]."""
    input[tuple(indices.long().unbind(-1))] = updates.to(input.dtype)
    return input
