"""quant_kv and attention: rows scattered by the NPU's operator, attention by its own torch operators in fp32.

npu_fused_infer_attention_score is used where it computes what the contract asks: decode steps over plain 16-bit caches,
with Q, P and the result in the type of the cache. Over int8 caches it first rounds the decoded keys and values to that
type (class dequant-16), where the contract asks for products of the decoded values themselves; over those attention
runs here: pages are gathered and decoded, products, softmax and sums are fp32. Right, and far from fast. Offsets of C8
are applied on both sides, which the engines' own path does not do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhal.caches import KVCache
from qhal.elements import WIDE
from qhal.requests import AttentionRequest
from qhal_npu import calls
from qhal_portable import attention
from qhal_portable.attention import PagedBatch

_BLOCK = 16
"""Rows of a page: block_size is a multiple of this for 16-bit caches, at most 512."""
_WIDEST = 512


def write(plane: Tensor, where: Tensor, values: Tensor) -> None:
    """`portable.kv`'s writer: npu_scatter_nd_update_ on the slots of a plane, bytes as int8."""
    rows = plane.flatten(0, 1)
    if rows.data_ptr() != plane.data_ptr():  # strides of its own: flattening copied
        page = plane.shape[1]
        plane[where // page, where % page] = values
    elif plane.dtype == torch.uint8:
        calls.scatter_rows(rows.view(torch.int8), where, values.view(torch.int8))
    else:
        calls.scatter_rows(rows, where, values)


def fused(r: AttentionRequest, arch: str) -> str:
    """Why the fused operator does not compute this; "" if it does."""
    kv = r.kv
    names = {kv.k.element, kv.v.element, r.q.element, r.p.element}
    if kv.kind != "mha" or not all(f.plain for f in (kv.k, kv.v, r.q, r.p)) or len(names) != 1:
        return "cache, Q and P are not of one plain type"
    if not names <= {"bf16", "fp16"} or r.out != WIDE[r.q.element] or (arch == "310P"):
        return "not of a 16-bit type"
    if r.phase != "decode" or r.window is not None or r.softcap is not None or r.sinks or r.tree or r.lse:
        return "window, softcap, sinks, lse, trees and prefill are not connected"
    if kv.k_dim != kv.v_dim or kv.k_dim % _BLOCK or kv.k_dim > _WIDEST or kv.page % _BLOCK or kv.page > _WIDEST:
        return f"dims {kv.k_dim},{kv.v_dim} or page {kv.page} off the operator's blocks of {_BLOCK}"
    return ""


def attend(
    q: Tensor,
    cache: KVCache,
    batch: PagedBatch,
    sinks: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    arch: str,
) -> Tensor:
    """See QuantOps.attention."""
    r = batch.request
    planes = [cache.planes.get(f"{n}.codes") for n in ("k", "v")]
    paged = all(p is not None and p.is_contiguous() for p in planes)
    if fused(r, arch) or lse is not None or not paged or not batch.sequences:
        return attention.attend(q, cache, batch, sinks, out, lse, torch.float32)
    rows = batch.rows(cache.pages)
    live = [i for i, (queries, length, _, _) in enumerate(rows) if queries and length]
    if (
        len(live) != len(rows)
        or q.dtype != r.out
        or not q.is_contiguous()
        or not attention.same_cache(cache.request, r.kv)
    ):
        return attention.attend(q, cache, batch, sinks, out, lse, torch.float32)
    attention.check_queries(q, r, sinks, len(rows), r.kv.k_dim)
    k, v = (p.reshape(cache.pages, r.kv.page, -1) for p in planes if p is not None)
    longest = max(table.numel() for _, _, table, _ in rows)
    o = calls.fused_attention(
        q.reshape(len(rows), r.heads, 1, r.kv.k_dim), k, v,
        block_table=batch.page_table[: len(rows), :longest].to(torch.int32),
        actual_seq_lengths_kv=[length for _, length, _, _ in rows],
        num_heads=r.heads, num_key_value_heads=r.kv.heads, input_layout="BNSD", scale=r.scale, block_size=r.kv.page,
    )  # fmt: skip
    result = o.reshape(len(rows), r.heads, r.kv.v_dim)
    return result if out is None else out.copy_(result)
