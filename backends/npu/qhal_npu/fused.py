"""attention: the calls of the fused operators, with rows as a line of the table wants them, masks, and results.

Masks hide where they are true. The band of sparse_mode 4 is aligned bottom right, like the contract's masks: key j of L
is seen by query i of t if i + (L - t) - pre_tokens <= j <= i + (L - t) + next_tokens. It serves causal masks too:
sparse_mode 3 is documented for TND only where a sequence has more keys than queries.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from qhal.caches import KVCache
from qhal.elements import WIDE, decode
from qhal.formats import Format
from qhal.requests import AttentionRequest
from qhal_npu import attention_table as table
from qhal_npu import calls
from qhal_npu.attention import Broken, choose, width
from qhal_npu.attention_table import FusedAttention
from qhal_portable import attention as portable
from qhal_portable import kv
from qhal_portable.attention import PagedBatch

Rows = list[tuple[int, int, Tensor]]
"""(queries, keys, pages) of every sequence"""
Found = tuple[Tensor, Tensor | None]
"""o [T, H, Dv] and, where the request has it, the lse [T, H]"""

_UNBOUNDED = 2**31 - 1


def attention(
    q: Tensor,
    cache: KVCache,
    batch: PagedBatch,
    sinks: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    arch: str,
) -> Tensor:
    """See QuantOps.attention: by the first fused operator that takes request and batch, else by torch operators.

    These gather and decode the pages; products, softmax and sums are fp32. Right, and far from fast.
    """
    r = batch.request
    found = serving(cache, batch, sinks, lse, arch)
    if found is None:
        return portable.attend(q, cache, batch, sinks, out, lse, torch.float32)
    line, rows, seeing = found
    rope = r.kv.v_dim if r.kv.kind == "mla" else 0
    portable.check_queries(q, r, sinks, len(seeing), r.kv.k_dim + rope)
    shape = (q.shape[0], r.heads, r.kv.k_dim if rope else r.kv.v_dim)
    result = portable.buffer(out, shape, r.out, "out", q.device)
    logs = None if lse is None else portable.buffer(lse, shape[:2], torch.float32, "lse", q.device)
    held = q.detach().to(WIDE[r.q.element])
    some = None
    if not all(seeing):  # the others' results are 0, and -inf
        some = torch.tensor([i for i, sees in enumerate(seeing) if sees], device=q.device)
        held = held.index_select(0, some)
    o, log = _call(line, held.contiguous(), cache, rows, r, sinks)
    if logs is not None and log is not None:
        logs.copy_(log if some is None else torch.full_like(logs, -torch.inf).index_copy_(0, some, log))
    return result.copy_(o if some is None else torch.zeros_like(result).index_copy_(0, some, o))


def serving(
    cache: KVCache, batch: PagedBatch, sinks: Tensor | None, lse: Tensor | None, arch: str
) -> tuple[FusedAttention, Rows, list[bool]] | None:
    """The line that takes a batch, its sequences, and for every query whether it sees a key; None: no line does."""
    r = batch.request
    path = choose(r, arch)
    if isinstance(path, Broken) or not portable.same_cache(cache.request, r.kv) or cache.layout != "canonical":
        return None
    rows, seeing = _seeing([row[:3] for row in batch.rows(cache.pages)], r)
    for line in path.lines:
        if not broken_at_the_call(line, cache, rows, r, sinks, lse):
            return line, rows, seeing
    return None


def _seeing(rows: Rows, r: AttentionRequest) -> tuple[Rows, list[bool]]:
    """The sequences without queries that see no key, and for every query whether it sees one."""
    found: Rows = []
    seeing: list[bool] = []
    for queries, keys, pages in rows:
        blind = max(queries - keys, 0) if r.causal or not keys else 0
        seeing += [False] * blind + [True] * (queries - blind)
        if queries > blind:
            found.append((queries - blind, keys, pages))
    return found, seeing


def broken_at_the_call(
    line: FusedAttention, cache: KVCache, rows: Rows, r: AttentionRequest, sinks: Tensor | None, lse: Tensor | None
) -> str:
    """The name in `AT_THE_CALL` of what a line does not take; "" if it can be asked."""
    if not rows or any(queries > keys for queries, keys, _ in rows):
        return "lengths"
    tokens, longest = sum(queries for queries, _, _ in rows), max(keys for _, keys, _ in rows)
    if line.layout == "TND" and (len(rows) > table.SEQUENCES or tokens > table.TOKENS):
        return "sizes"
    if line.layout != "TND" and tokens == len(rows) and longest > table.KEYS:
        return "sizes"
    codes = [plane for name, plane in cache.planes.items() if name.endswith(".codes")]
    if line.rows != "gathered" and any(not p.is_contiguous() or p.numel() >= table.PAGES_LIMIT for p in codes):
        return "planes"
    if line.rows == "int8 pages" and line.mode != 3 and not _fit(cache, r):
        return "scale-type"
    if lse is not None and not r.lse:
        return "lse"
    if sinks is not None and not torch.equal(sinks.to(torch.bfloat16).float(), sinks):
        return "sink-type"
    return ""


def _fit(cache: KVCache, r: AttentionRequest) -> bool:
    """Whether static scales are numbers of the type of q, and zero points of int8: their differences are, of both."""
    for name, f in (("k", r.kv.k), ("v", r.kv.v)):
        for part, inner in (("scale", f.scale), ("zero", f.zero)):
            if inner is not None:
                numbers = decode(inner.element, cache.planes[f"{name}.{part}"]).float()
                held = numbers.to(WIDE[r.q.element]) if part == "scale" else numbers.round().clamp(-128, 127)
                if not torch.equal(held.float(), numbers):
                    return False
    return True


def _call(
    line: FusedAttention, q: Tensor, cache: KVCache, rows: Rows, r: AttentionRequest, sinks: Tensor | None
) -> Found:
    """q [T, H, D] as the request holds it. Everything was checked."""
    if line.kv == "mla":
        return _latent(line, q, cache, rows, r)
    if line.layout == "TND":
        return _one_after_the_other(q, cache, rows, r, sinks)
    if line.layout == "BSND":
        return _side_by_side(line, q, cache, rows, r)
    return _decode(line, q, cache, rows, r)


def _decode(line: FusedAttention, q: Tensor, cache: KVCache, rows: Rows, r: AttentionRequest) -> Found:
    """One query each over pages as they are."""
    k, v = (cache.planes[f"{name}.codes"].flatten(2) for name in ("k", "v"))
    table_ = _table(rows)
    more = _antiquant(line.mode, cache, table_, r) if line.rows == "int8 pages" else {}
    o, lse = calls.fused_attention(
        q.reshape(len(rows), r.heads, 1, r.kv.k_dim), k, v, block_table=table_, block_size=r.kv.page,
        actual_seq_lengths_kv=[keys for _, keys, _ in rows], num_heads=r.heads, num_key_value_heads=r.kv.heads,
        input_layout="BNSD", scale=r.scale, softmax_lse_flag=r.lse, **more, **_seen(r, rows, table_.shape[1]),
    )  # fmt: skip
    return o.reshape(len(rows), r.heads, -1), lse.reshape(len(rows), r.heads) if r.lse else None


def _antiquant(mode: int, cache: KVCache, table_: Tensor, r: AttentionRequest) -> dict[str, Any]:
    """Scales, and zero points as offsets: the operator adds what the contract subtracts."""
    found: dict[str, Any] = {"key_antiquant_mode": mode, "value_antiquant_mode": mode}
    for word, name, f in (("key", "k", r.kv.k), ("value", "v", r.kv.v)):
        found[f"{word}_antiquant_scale"] = _plane(mode, cache, f"{name}.scale", f, f.scale, table_, r)
        if f.zero is not None:
            found[f"{word}_antiquant_offset"] = -_plane(mode, cache, f"{name}.zero", f, f.zero, table_, r)
    return found


def _plane(
    mode: int, cache: KVCache, name: str, f: Format, inner: Format | None, table_: Tensor, r: AttentionRequest
) -> Tensor:
    """Numbers of a plane as an antiquant mode has them."""
    assert inner is not None and f.block is not None
    if f.block.kind == "row":  # [pages, block, KV_N], of the pages of these sequences
        own = decode(inner.element, cache.planes[name][table_.long()])
        return own.flatten(1, 2).transpose(1, 2).contiguous()
    number = decode(inner.element, cache.planes[name])
    if mode == 3:
        batch, keys = table_.shape[0], table_.shape[1] * r.kv.page
        return number.reshape(1, -1, 1).expand(batch, r.kv.heads, keys).contiguous()
    number = number.to(WIDE[r.q.element])
    number = number.expand(r.kv.heads) if mode == 2 else number.reshape(1, r.kv.heads, 1, r.kv.k_dim)
    return number.contiguous()


def _one_after_the_other(q: Tensor, cache: KVCache, rows: Rows, r: AttentionRequest, sinks: Tensor | None) -> Found:
    """TND: no padding between sequences; features that a width has more are zeros."""
    wide = width(r.kv.k_dim, r.kv.v_dim)
    assert wide is not None
    keys, values = (_gathered(cache, which, rows, r) for which in (0, 1))
    q, k, v = (_widened(t, n) for t, n in ((q, wide[0]), (torch.cat(keys), wide[0]), (torch.cat(values), wide[1])))
    o, lse = calls.fused_attention_v2(
        q, k, v, actual_seq_qlen=_ends([n for n, _, _ in rows]), actual_seq_kvlen=_ends([len(part) for part in keys]),
        num_query_heads=r.heads, num_key_value_heads=r.kv.heads, input_layout="TND", softmax_scale=r.scale,
        learnable_sink=None if sinks is None else sinks.to(torch.bfloat16), return_softmax_lse=r.lse,
        **_seen(r, rows, 0),
    )  # fmt: skip
    return o[..., : r.kv.v_dim], lse[..., 0] if r.lse else None


def _side_by_side(line: FusedAttention, q: Tensor, cache: KVCache, rows: Rows, r: AttentionRequest) -> Found:
    """BSND: queries padded to the longest sequence, and keys too if they are gathered."""
    queries = [n for n, _, _ in rows]
    padded = _padded(list(q.split(queries)))
    if line.rows == "pages":
        k, v = (cache.planes[f"{name}.codes"].flatten(2) for name in ("k", "v"))
        table_ = _table(rows)
        o, lse = calls.fused_attention_v2(
            padded, k, v, block_table=table_, block_size=r.kv.page, actual_seq_qlen=queries,
            actual_seq_kvlen=[n for _, n, _ in rows], num_query_heads=r.heads, num_key_value_heads=r.kv.heads,
            input_layout="BSND", softmax_scale=r.scale, return_softmax_lse=r.lse, **_seen(r, rows, table_.shape[1]),
        )  # fmt: skip
    else:
        keys, values = (_gathered(cache, which, rows, r) for which in (0, 1))
        o, lse = calls.fused_attention(
            padded, _padded(keys), _padded(values), actual_seq_lengths=queries,
            actual_seq_lengths_kv=[len(part) for part in keys], num_heads=r.heads, num_key_value_heads=r.kv.heads,
            input_layout="BSND", scale=r.scale, softmax_lse_flag=r.lse, **_seen(r, rows, 0),
        )  # fmt: skip
    o = torch.cat([part[:n] for part, n in zip(o, queries, strict=True)])
    return o, torch.cat([part[:, :n, 0].T for part, n in zip(lse, queries, strict=True)]) if r.lse else None


def _latent(line: FusedAttention, q: Tensor, cache: KVCache, rows: Rows, r: AttentionRequest) -> Found:
    """One query each over latent rows, which are keys and values, and their rope parts."""
    if line.rows == "pages":
        size, table_ = r.kv.page, _table(rows)
        latent, rope = cache.planes["latent.codes"], cache.planes["rope.codes"]
    else:
        size = table.LATENT_PAGES[-1]
        latent, rope = (_paged(_gathered(cache, which, rows, r), size) for which in (0, 1))
        table_ = torch.arange(latent.shape[0], dtype=torch.int32, device=q.device).reshape(len(rows), -1)
    parts = q.split([r.kv.k_dim, r.kv.v_dim], -1)
    first, second = (part.reshape(len(rows), r.heads, 1, -1).contiguous() for part in parts)
    o, _ = calls.fused_attention_v2(
        first, latent, latent, query_rope=second, key_rope=rope, block_table=table_, block_size=size,
        actual_seq_kvlen=[keys for _, keys, _ in rows], num_query_heads=r.heads, num_key_value_heads=1,
        input_layout="BNSD", softmax_scale=r.scale,
    )  # fmt: skip
    return o.reshape(len(rows), r.heads, r.kv.k_dim), None


def _table(rows: Rows) -> Tensor:
    """int32 [B, pages]; what a sequence does not have is page 0, which is not read."""
    return pad_sequence([pages for _, _, pages in rows], batch_first=True).to(torch.int32)


def _gathered(cache: KVCache, which: int, rows: Rows, r: AttentionRequest) -> list[Tensor]:
    """[keys, KV_N, D] of every sequence, decoded and rounded to the type of q; only keys that a query may see."""
    found = []
    for queries, keys, pages in rows:
        hidden = 0 if r.window is None else max(keys - queries - r.window + 1, 0)
        first = hidden // r.kv.page * r.kv.page
        read = kv.read(cache, which, pages[first // r.kv.page :], keys - first)
        found.append(read[hidden - first :].to(WIDE[r.q.element]))
    return found


def _padded(parts: list[Tensor]) -> Tensor:
    """[B, longest, N, D]; what is not there is 0."""
    return pad_sequence(parts, batch_first=True)


def _paged(parts: list[Tensor], size: int) -> Tensor:
    """[B * pages, size, N * D]: every sequence in as many pages as the longest needs."""
    whole = _padded(parts)
    whole = pad(whole, (0, 0, 0, 0, 0, -whole.shape[1] % size))
    return whole.reshape(-1, size, whole.shape[2] * whole.shape[3])


def _widened(t: Tensor, n: int) -> Tensor:
    return (pad(t, (0, n - t.shape[-1])) if t.shape[-1] < n else t).contiguous()


def _ends(counts: list[int]) -> list[int]:
    return [sum(counts[: i + 1]) for i in range(len(counts))]


def _seen(r: AttentionRequest, rows: Rows, pages: int) -> dict[str, Any]:
    """What hides keys, if anything. pages: of the longest sequence; 0 where hidden keys before a window are left out.

    The operator reads no band where every sequence has one query: its window is a mask over the pages.
    """
    device = rows[0][2].device
    if all(queries == 1 for queries, _, _ in rows):
        if r.window is None or not pages:
            return {}
        keys = torch.tensor([n for _, n, _ in rows], device=device)[:, None]
        place = torch.arange(pages * r.kv.page, device=device)[None]
        hidden = (place >= keys) | (place < keys - r.window)
        return {"atten_mask": hidden.reshape(len(rows), 1, 1, -1)}
    if not r.causal and r.window is None:
        return {}
    before = _UNBOUNDED if r.window is None else r.window - 1
    after = 0 if r.causal else _UNBOUNDED
    return {"sparse_mode": 4, "atten_mask": _triangle(device), "pre_tokens": before, "next_tokens": after}


@lru_cache(maxsize=16)
def _triangle(device: torch.device) -> Tensor:
    """bool [2048, 2048], true above the diagonal: what every compressed mask is given as."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)
