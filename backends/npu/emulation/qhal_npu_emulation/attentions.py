"""Questions for every line of the table of fused attention: asked at the host level, and judged by the suite's bounds.

The suite's level 0 has neither latent rows of 512, nor pages of 128, nor static scales by head or channel, nor sinks
that bf16 holds: these questions do. Pages and slots that are not a sequence's hold NaN or extreme codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qhal.caches import KVCache, Limits
from qhal.elements import WIDE
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import AttentionRequest, KVRequest
from qhal_conformance import paged
from qhal_conformance.attention_reference import Keys, attend
from qhal_conformance.tolerance import compare
from qhal_npu.attention import Broken, choose
from qhal_npu.attention_table import operator
from qhal_npu.fused import serving
from qhal_npu_emulation import library
from qhal_portable import kv
from qhal_portable.attention import PagedBatch

_ALL, _OLD, _NEW = ("A2", "A3", "A5"), ("A2", "A3"), ("A5",)
_DECODE, _FULL = ((1, 40), (1, 0), (1, 7), (1, 64)), ((5, 5), (1, 40), (21, 70))
_MIXED = (*_FULL, (3, 0), (0, 9), (4, 2))


@dataclass(frozen=True)
class Ask:
    """A request and a batch. line: which line of the table must take it; lens: (queries, keys) of every sequence.

    fits    static scales are numbers of the type of q, zero points of int8
    dims    D of keys and values; latent rows: R and P
    window, full, sinks, lse  as in AttentionRequest; full: not causal
    """

    line: str
    on: tuple[str, ...]
    cache: str
    lens: tuple[tuple[int, int], ...] = _DECODE
    q: str = "bf16"
    dims: tuple[int, int] = (64, 64)
    heads: tuple[int, int] = (4, 2)
    page: int = 32
    window: int | None = None
    full: bool = False
    sinks: bool = False
    lse: bool = False
    fits: bool = True

    @property
    def name(self) -> str:
        """For reports."""
        more: list[str] = [self.request.phase] if self.line.startswith("rows") else []
        more += [f"window {self.window}"] if self.window else []
        more += [word for word in ("full", "sinks", "lse") if getattr(self, word)]
        more += [] if self.fits else ["scales of fp32"]
        return ", ".join([self.line, f"{self.q} over {self.cache}", *more])

    @property
    def request(self) -> AttentionRequest:
        """What is asked."""
        f, latent = Format.parse(self.cache), "latent" in self.line
        pages = KVRequest(
            kind="mla" if latent else "mha", k=f, v=f, heads=1 if latent else self.heads[1], k_dim=self.dims[0],
            v_dim=self.dims[1], page=self.page,
        )  # fmt: skip
        phase: Literal["prefill", "decode", "mixed"] = "prefill" if self.line.startswith("prefill") else "mixed"
        if all(queries == 1 for queries, _ in self.lens):
            phase = "decode"
        return AttentionRequest(
            kv=pages, heads=self.heads[0], scale=0.11, phase=phase, q=Format(self.q), p=Format(self.q),
            out=WIDE[self.q], causal=not self.full, window=self.window, sinks=self.sinks, lse=self.lse,
        )  # fmt: skip


_BY_HEAD, _BY_CHANNEL, _BY_TOKEN = (f"decode, int8 pages by {word}" for word in ("head", "channel", "token and head"))

ASKS: tuple[Ask, ...] = (
    Ask("decode, 16-bit pages", _ALL, "bf16", lse=True),
    Ask("decode, 16-bit pages", _ALL, "fp16", q="fp16", dims=(80, 80), window=9),
    Ask(_BY_HEAD, _OLD, "int8.head*bf16"),
    Ask(_BY_HEAD, _OLD, "int8-int8.head*fp16", q="fp16", window=33, lse=True),
    Ask(_BY_HEAD, _OLD, "int8.tensor*bf16", lse=True),
    Ask(_BY_CHANNEL, _OLD, "int8-int8.col*bf16"),
    Ask(_BY_CHANNEL, _OLD, "int8-fp32.col*fp32", lse=True),
    Ask(_BY_TOKEN, _OLD, "int8.row*fp32", window=9, lse=True),
    Ask(_BY_TOKEN, _OLD, "int8-int8.row*fp32"),
    Ask(_BY_TOKEN, _OLD, "int8-fp32.head*fp32", q="fp16", fits=False),
    Ask(_BY_TOKEN, _OLD, "int8.tensor*fp32", fits=False),
    Ask("prefill, 16-bit pages", _ALL, "bf16", _MIXED, page=128, lse=True),
    Ask("prefill, 16-bit pages", _ALL, "fp16", ((140, 300), (7, 129)), "fp16", page=128, window=50),
    Ask("prefill, 16-bit pages", _ALL, "bf16", _FULL, page=128, full=True),
    Ask("rows one after the other", _ALL, "bf16", _MIXED, sinks=True, window=20),
    Ask("rows one after the other", _ALL, "bf16", sinks=True, window=20),
    Ask("rows one after the other", _ALL, "int8.row*fp32", _MIXED, dims=(192, 128), lse=True),
    Ask("rows one after the other", _NEW, "e4m3fn.row*fp32", _FULL, full=True),
    Ask("rows one after the other", _OLD, "int8-fp32.col*fp32", fits=False),
    Ask("rows side by side", _ALL, "int8.row*fp32", _MIXED, "fp16", (80, 80), lse=True),
    Ask("rows side by side", _ALL, "int4.g32*fp16", _DECODE, "fp16", window=20),
    Ask("rows side by side", _ALL, "bf16", _FULL, dims=(256, 256), full=True, window=20),
    Ask("decode, latent pages", _ALL, "bf16", dims=(512, 64), heads=(4, 1), page=16),
    Ask("decode, latent pages", _ALL, "fp16", q="fp16", dims=(512, 64), heads=(16, 1), page=128),
    Ask("decode, latent rows", _ALL, "int8.row*fp32", dims=(512, 64), heads=(4, 1), page=64),
)


@dataclass(frozen=True)
class Answer:
    """What came out, and of what."""

    o: Tensor
    lse: Tensor | None
    cache: KVCache
    batch: PagedBatch
    q: Tensor
    sinks: Tensor | None
    pages: paged.Pages


def ask(a: Ask, ops: QuantOps) -> Answer:
    """Of rows that follow from the question's name alone."""
    r = a.request
    pages = paged.scatter(a.name, tuple(n for _, n in a.lens), a.page, width=4)
    layout, planes = ops.kv_planes(r.kv, attention=(r,))
    cache = KVCache.allocate(r.kv, pages.count, ops.device, planes=planes, layout=layout)
    paged.poison(cache, np.arange(pages.count))
    g = torch.Generator().manual_seed(len(a.name))
    for name in sorted(cache.static):
        whole = torch.randint(-9, 10, cache.planes[name].shape, generator=g).float()
        value = whole if name.endswith("zero") else ((whole + 25) * 2.0**-10)
        odd = 1 / 3 if name.endswith("zero") else 2.0**-20
        cache.set_static(name, (value if a.fits else value + odd).to(ops.device))
    tokens, kind = pages.slots.size, WIDE[a.q]
    axes = ((), ()) if r.kv.kind == "mla" else ((r.kv.heads,), (r.kv.heads,))
    k, v = (torch.randn(tokens, *heads, dim, generator=g).to(kind) for heads, dim in zip(axes, a.dims, strict=True))
    ops.quant_kv(k.to(ops.device), v.to(ops.device), cache, torch.from_numpy(pages.slots).to(ops.device))
    queries = [n for n, _ in a.lens]
    batch = ops.attention_batch(r, Limits(len(queries), sum(queries), pages.table.shape[1]))
    query_lens, kv_lens = (torch.tensor(n, dtype=torch.int32) for n in (queries, pages.lens))
    batch.plan(query_lens, kv_lens, torch.from_numpy(pages.table).to(ops.device))
    q = torch.randn(sum(queries), r.heads, a.dims[0] + (a.dims[1] if r.kv.kind == "mla" else 0), generator=g).to(kind)
    sinks = torch.randn(r.heads, generator=g).bfloat16().float().to(ops.device) if r.sinks else None
    lse = torch.zeros(q.shape[:2], device=ops.device) if r.lse else None
    o = ops.attention(q.to(ops.device), cache, batch, sinks=sinks, lse=lse)
    assert isinstance(batch, PagedBatch)
    return Answer(o, lse, cache, batch, q, sinks, pages)


def judged(a: Ask, ops: QuantOps, arch: str) -> str:
    """What is wrong: another line takes the batch, or the result is outside the suite's bound of its class."""
    r, before = a.request, library.CALLS.copy()
    path, found = choose(r, arch), ask(a, ops)
    if isinstance(path, Broken):
        return f"no line serves it: {path}"
    served = serving(found.cache, found.batch, found.sinks, found.lse, arch)
    called = {name: n for name, n in (library.CALLS - before).items() if "infer" in name}
    line = operator(a.line)
    if served is None or served[0] is not line or called != {line.op: 1}:
        return f"taken by {served and served[0].kind}, called {called}"
    sequences: list[Keys] = []
    for b, (queries, keys) in enumerate(a.lens):
        own = torch.from_numpy(found.pages.table[b, : -(-keys // a.page)]).long()
        k, v = (kv.read(found.cache, which, own, keys).numpy() for which in (0, 1))
        both = (np.concatenate([k, v], -1), k) if r.kv.kind == "mla" else (k, v)
        sequences.append((queries, *both, None))
    sinks = None if found.sinks is None else found.sinks.numpy()
    e = attend(found.q.float().numpy(), sequences, r, path.numerics, a.q, sinks)
    verdict = compare(found.o.double().numpy(), e.o, e.o_bound, a.q)
    if verdict.kind is None and found.lse is not None:
        verdict = compare(found.lse.double().numpy(), e.lse, e.lse_bound, "fp32")
    return verdict.detail
