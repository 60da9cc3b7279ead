"""What attention must not depend on, and what it must equal: laws over random batches, formats, masks and heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal import Format, KVCache, KVRequest

PAGE = 4
CACHES = ("bf16", "e4m3fn.tensor*fp32", "e4m3fn.head*fp32", "int8.row*fp32", "int8-fp32.col*fp32", "int4.g4*fp16",
          "e2m1.g4*(e4m3fn.tensor*fp32)", "e4m3fn.g4*e8m0")  # fmt: skip
QS = ("fp32", "bf16", "int8.row*fp32", "e4m3fn.g4*fp32", "int8.head*fp32", "e4m3fn.tensor*fp32")
PS = ("fp32", "bf16", "int8.tensor*fp32", "e4m3fn.tensor*fp32")
LAW = settings(deadline=None, max_examples=20)


@st.composite
def problems(draw, *, max_sequences: int = 3, p: tuple[str, ...] = PS, masks: bool = True):
    """(request, query lengths, key lengths, seed)"""
    groups = draw(st.sampled_from([1, 2]))
    f = Format.parse(draw(st.sampled_from(CACHES)))
    kv = KVRequest(kind="mha", k=f, v=f, heads=groups, k_dim=8, v_dim=8, page=PAGE)
    if draw(st.booleans()):
        kv = replace(kv, kind="mla", heads=1, v_dim=4)
    lens = draw(st.lists(st.integers(1, 11), min_size=1, max_size=max_sequences))
    queries = [draw(st.integers(1, n)) for n in lens]
    fields = {
        "heads": kv.heads * draw(st.sampled_from([1, 2, 3])),
        "q": Format.parse(draw(st.sampled_from(QS))),
        "p": Format.parse(draw(st.sampled_from(p))),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sinks": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, 3])) if masks else None,
        "causal": draw(st.booleans()) if masks else True,
        "lse": True,
    }
    return kv, fields, queries, lens, draw(st.integers(0, 99))


class Setup:
    """A filled cache, queries and sinks of one problem."""

    def __init__(self, problem, ops, attention_request, fill, plan) -> None:
        kv, fields, self.queries, self.lens, seed = problem
        self.ops, self._plan = ops, plan
        self.request = attention_request(kv, **fields)
        self.cache, self.table, self.rows = fill(ops, kv, self.lens, seed, attention=[self.request])
        g = torch.Generator().manual_seed(seed + 1)
        dim = kv.k_dim + (kv.v_dim if kv.kind == "mla" else 0)
        self.q = torch.randn(sum(self.queries), self.request.heads, dim, generator=g)
        self.sinks = torch.randn(self.request.heads, generator=g) if self.request.sinks else None

    def run(self, *, request=None, queries=None, lens=None, table=None, q=None, cache=None, sinks=None):
        """(o, lse) with some things changed."""
        request, q = request or self.request, self.q if q is None else q
        lens = self.lens if lens is None else lens
        table = self.table if table is None else table
        batch = self._plan(self.ops, request, self.queries if queries is None else queries, lens, table)
        lse = torch.empty(q.shape[:2])
        sinks = self.sinks if sinks is None else sinks
        o = self.ops.attention(q, cache or self.cache, batch, sinks=sinks if request.sinks else None, lse=lse)
        return o, lse


@pytest.fixture(scope="module")
def setup(ops, attention_request, fill, plan):
    return lambda problem: Setup(problem, ops, attention_request, fill, plan)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the order of float64 sums: each side is rounded to fp32 once, so one unit in the last place."""
    return torch.allclose(a, b, rtol=2**-23, atol=2**-40)


def same(a, b) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@LAW
@given(problem=problems())
def test_pages_may_be_anywhere(setup, problem):
    s = setup(problem)
    order = torch.randperm(s.cache.pages, generator=torch.Generator().manual_seed(problem[-1]))
    planes = {
        n: t if n in s.cache.static else t.view(torch.uint8)[order].view(t.dtype) if t.element_size() == 1 else t[order]
        for n, t in s.cache.planes.items()
    }
    back = torch.argsort(order).int()
    table = torch.where(s.table < s.cache.pages, back[s.table.clamp(max=s.cache.pages - 1).long()], s.table)
    assert same(s.run(cache=KVCache(s.cache.request, planes), table=table), s.run())


@LAW
@given(problem=problems())
def test_sequences_alone_or_together(setup, problem):
    s = setup(problem)
    assert s.ops.supports(s.request).batch_invariant  # so: bit for bit
    together, at = s.run(), 0
    for b, (t, n) in enumerate(zip(s.queries, s.lens, strict=True)):
        alone = s.run(queries=[t], lens=[n], table=s.table[b : b + 1], q=s.q[at : at + t])
        assert same(alone, [x[at : at + t] for x in together])
        at += t
    order = list(range(len(s.lens)))[::-1]
    parts = s.q.split(s.queries)
    swapped = s.run(
        queries=[s.queries[b] for b in order],
        lens=[s.lens[b] for b in order],
        table=s.table[order],
        q=torch.cat([parts[b] for b in order]),
    )
    assert same([torch.cat(x.split([s.queries[b] for b in order])[::-1]) for x in swapped], together)


@LAW
@given(problem=problems(max_sequences=1, p=("fp32", "bf16")), cut=st.integers(1, 10))
def test_a_prefill_in_chunks(setup, problem, cut):
    kv, fields, (t,), (n,), seed = problem
    s = setup((kv, {**fields, "causal": True}, [t], [n], seed))
    cut = min(cut, t)
    whole = s.run()
    first = s.run(queries=[cut], lens=[n - t + cut], q=s.q[:cut])
    second = s.run(queries=[t - cut], lens=[n], q=s.q[cut:])
    for a, b, c in zip(whole, first, second, strict=True):
        assert near(a, torch.cat([b, c]))


@LAW
@given(problem=problems(masks=False))
def test_keys_behind_the_mask_do_not_matter(setup, problem):
    """The key after a causal row's own may be in the cache or not."""
    s = setup(problem)
    for b, n in enumerate(s.lens):
        if n > 1:
            q = s.q[:1].expand(2, *s.q.shape[1:]).contiguous()
            two = s.run(queries=[2], lens=[n], table=s.table[b : b + 1], q=q)
            one = s.run(queries=[1], lens=[n - 1], table=s.table[b : b + 1], q=q[:1])
            assert near(two[0][:1], one[0]) and near(two[1][:1], one[1])


@LAW
@given(problem=problems())
def test_grouped_heads_are_repeated_heads(setup, problem):
    s = setup(problem)
    kv, heads = s.request.kv, s.request.heads
    if kv.kind == "mla":
        return
    share = heads // kv.heads
    wide = replace(kv, heads=heads)
    planes = {}
    for name, t in s.cache.planes.items():
        axis = {"k": 2, "v": 2}.get(name[0]) if name not in s.cache.static else 0 if t.numel() > 1 else None
        if name[0] in "qp" or axis is None:
            planes[name] = t
        else:
            raw = t.view(torch.uint8) if t.element_size() == 1 else t
            planes[name] = raw.repeat_interleave(share, axis).view(t.dtype)
    if any(f.block is not None and f.block.kind == "head" for f in (kv.k, kv.v)) and kv.heads == 1:
        planes |= {f"{p}.scale": s.cache.planes[f"{p}.scale"].expand(heads) for p in "kv"}
    repeated = s.run(request=replace(s.request, kv=wide), cache=KVCache(wide, planes, host=dict(s.cache.host)))
    assert all(near(a, b) for a, b in zip(repeated, s.run(), strict=True))


@LAW
@given(problem=problems())
def test_limits_of_softcap_and_window(setup, problem):
    s = setup(problem)
    plain = s.run(request=replace(s.request, softcap=None))
    # c tanh(s / c) = s - s^3 / (3 c^2) + ...: below the last bit of fp32 for c = 2^40
    capped = s.run(request=replace(s.request, softcap=2.0**40))
    assert all(torch.allclose(a, b, rtol=2**-22, atol=2**-22) for a, b in zip(capped, plain, strict=True))
    longest = max(s.lens)
    open_ = s.run(request=replace(s.request, window=None))
    assert same(s.run(request=replace(s.request, window=longest)), open_)
    assert same(s.run(request=replace(s.request, window=longest + 7)), open_)


@LAW
@given(problem=problems(max_sequences=1, p=("fp32",), masks=False), data=st.data())
def test_lse_merges_two_halves(setup, problem, data):
    """Attention over keys :c and c: merges to attention over all: weights e^(lse - max), sinks once."""
    kv, fields, _, (n,), seed = problem
    s = setup((kv, {**fields, "causal": False, "sinks": False}, [1], [n], seed))
    cut = data.draw(st.integers(0, n))
    spare = torch.arange(s.cache.pages, dtype=torch.int32).roll(1)[None]
    second = KVCache(kv, {name: t.clone() for name, t in s.cache.planes.items()}, host=dict(s.cache.host))
    k, v = s.rows[0]
    at = torch.arange(n - cut)
    s.ops.quant_kv(k[cut:], v[cut:], second, spare[0, at // PAGE] * PAGE + at.int() % PAGE)
    halves = [s.run(lens=[cut]), s.run(lens=[n - cut], cache=second, table=spare)]
    whole = s.run()
    logs = torch.stack([log.double() for _, log in halves])
    total = torch.logsumexp(logs, 0)
    merged = sum(torch.exp(log - total)[..., None] * o.double() for (o, _), log in zip(halves, logs, strict=True))
    # lse is stored in fp32: each half's weight errs by 2^-24 |lse|, each half's result by half a unit
    step = 2.0**-24 * (2 + logs[torch.isfinite(logs)].abs().max())
    size = max(o.abs().max() for o, _ in halves)
    assert torch.allclose(merged, whole[0].double(), rtol=0, atol=float(4 * step * size))
    assert torch.allclose(total, whole[1].double(), rtol=0, atol=float(2 * step))


@LAW
@given(problem=problems(), power=st.integers(-3, 3))
def test_a_power_of_two_moves_between_scale_and_q(setup, problem, power):
    """q * 2^i with scale / 2^i: the same scores to the bit, where the format of q keeps the mantissas."""
    s = setup(problem)
    if s.request.q.block is not None and s.request.q.block.kind not in ("row", "group"):
        return  # a static scale saturates at another size
    moved = replace(s.request, scale=s.request.scale * 2.0**-power)
    assert same(s.run(request=moved, q=s.q * 2.0**power), s.run())


@LAW
@given(problem=problems(p=("fp32",)), power=st.integers(-3, 3))
def test_v_scales_the_result(setup, problem, power):
    """A static scale of V twice as large doubles the result and leaves lse alone."""
    s = setup(problem)
    name = "v.scale"
    if name not in s.cache.static or s.request.kv.kind == "mla":
        return
    planes = {**s.cache.planes, name: s.cache.planes[name] * 2.0**power}
    o, lse = s.run(cache=KVCache(s.cache.request, planes))
    before = s.run()
    assert torch.equal(o, before[0] * 2.0**power) and torch.equal(lse, before[1])
