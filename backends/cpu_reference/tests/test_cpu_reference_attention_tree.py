"""Trees of new tokens: a chain is causal, a tree is each of its root-to-leaf paths, and what a plan refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal import BatchError, Format, KVRequest, Limits

PAGE = 4


def ancestors(parents: list[int]) -> torch.Tensor:
    """bool [q, q]: token i sees itself and its ancestors; parents[i] < i, or -1 at a root."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            seen[i] |= seen[parent]
    return seen


def path(parents: list[int], leaf: int) -> list[int]:
    found = [leaf]
    while parents[found[0]] >= 0:
        found.insert(0, parents[found[0]])
    return found


@pytest.mark.parametrize("lens", [[4, 9, 3], [7, 7, 1]], ids=str)  # the last: more new tokens than keys
def test_a_chain_is_causal(ops, kv_request, attention_request, fill, plan, lens):
    request = attention_request(kv_request("int8.row*fp32"), lse=True)
    queries = [4, 5, 3]
    q = torch.randn(12, 4, 8)
    chain = torch.cat([torch.ones(n, n).tril().bool().flatten() for n in queries])
    cache, table, _ = fill(ops, request.kv, lens)
    logs = torch.empty(2, 12, 4)
    causal = ops.attention(q, cache, plan(ops, request, queries, lens, table), lse=logs[0])
    asked = replace(request, tree=True)
    tree = ops.attention(q, cache, plan(ops, asked, queries, lens, table, chain), lse=logs[1])
    assert torch.equal(tree, causal) and torch.equal(logs[0], logs[1])


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_tree_is_its_paths(ops, kv_request, attention_request, fill, plan, data):
    earlier = data.draw(st.integers(0, 6))
    count = data.draw(st.integers(1, 7))
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(count)]
    request = attention_request(kv_request(), tree=True, lse=True, sinks=data.draw(st.booleans()))
    kv, length = request.kv, earlier + count
    cache, table, rows = fill(ops, kv, [length], 3)
    g = torch.Generator().manual_seed(5)
    q, sinks = torch.randn(count, 4, 8, generator=g), torch.randn(4, generator=g) if request.sinks else None
    lse = torch.empty(count, 4)
    batch = plan(ops, request, [count], [length], table, ancestors(parents).flatten())
    o = ops.attention(q, cache, batch, sinks=sinks, lse=lse)
    (k, v), chain = rows[0], replace(request, tree=False)
    for leaf in (i for i in range(count) if i not in parents):
        tokens = path(parents, leaf)
        keep = [*range(earlier), *(earlier + i for i in tokens)]
        alone, own_table, _ = fill(ops, kv, [len(keep)], 4)
        slots = own_table[0, torch.arange(len(keep)) // PAGE] * PAGE + torch.arange(len(keep)).int() % PAGE
        ops.quant_kv(k[keep], v[keep], alone, slots)
        log = torch.empty(len(tokens), 4)
        own = ops.attention(
            q[tokens], alone, plan(ops, chain, [len(tokens)], [len(keep)], own_table), sinks=sinks, lse=log
        )
        # float64 sums over other neighbours, rounded once to fp32: one unit in the last place at a tie
        assert torch.allclose(o[tokens], own, rtol=2**-23, atol=2**-26)
        assert torch.allclose(lse[tokens], log, rtol=2**-23, atol=2**-26)


def test_several_trees_of_unequal_size(ops, kv_request, attention_request, fill, plan):
    request = attention_request(kv_request(), tree=True)
    lens, queries = [6, 3, 0, 9], [4, 0, 2, 3]
    trees = [ancestors([-1, 0, 0, 2]), ancestors([]), ancestors([-1, -1]), ancestors([-1, 0, 0])]
    cache, table, _ = fill(ops, request.kv, lens)
    q = torch.randn(9, 4, 8)
    o = ops.attention(q, cache, plan(ops, request, queries, lens, table, torch.cat([t.flatten() for t in trees])))
    at = 0
    for b, (t, n) in enumerate(zip(queries, lens, strict=True)):
        one = plan(ops, request, [t], [n], table[b : b + 1], trees[b].flatten())
        assert torch.equal(ops.attention(q[at : at + t], cache, one), o[at : at + t])
        at += t
    assert (o[4:6] == 0).all()  # no key at all


def test_a_tree_may_look_ahead_and_serves_mla(ops, attention_request, fill, plan):
    kv = KVRequest(kind="mla", k=Format("fp32"), v=Format("fp32"), heads=1, k_dim=8, v_dim=4, page=PAGE)
    request = attention_request(kv, tree=True)
    cache, table, _ = fill(ops, kv, [6])
    q = torch.randn(3, 4, 12)
    everything = plan(ops, request, [3], [6], table, torch.ones(9, dtype=torch.bool))
    full = plan(ops, replace(request, tree=False, causal=False), [3], [6], table)
    assert torch.equal(ops.attention(q, cache, everything), ops.attention(q, cache, full))


def test_a_hidden_sibling_does_not_leak(ops, kv_request, attention_request, fill, plan):
    request = attention_request(kv_request(), tree=True)
    cache, table, _ = fill(ops, request.kv, [5])
    batch = plan(ops, request, [3], [5], table, ancestors([-1, 0, 0]).flatten())
    q = torch.randn(3, 4, 8)
    o = ops.attention(q, cache, batch)
    for name in ("k.codes", "v.codes"):
        cache.planes[name][table[0, 0], 3] = float("nan")  # the second new token
    again = ops.attention(q, cache, batch)
    assert torch.allclose(again[[0, 2]], o[[0, 2]], rtol=2**-23, atol=2**-26) and again[1].isnan().all()


def test_errors(ops, kv_request, attention_request):
    request = attention_request(kv_request(), tree=True)
    batch = ops.attention_batch(request, Limits(batch=2, tokens=8, pages=2))
    lens, table = torch.tensor([2, 1]).int(), torch.zeros(2, 2).int()
    good = torch.tensor([1, 0, 1, 1, 1]).bool()
    batch.plan(lens, lens, table, tree=good)
    for tree, words in (
        (None, "tree is missing"),
        (good[:4], r"bool \[5\], the sum of their squares"),
        (good.int(), "int32"),
        (good.reshape(1, 5), r"\(1, 5\)"),
        (torch.tensor([1, 0, 1, 0, 1]).bool(), r"sequence 0: tokens \[1\] do not see themselves"),
    ):
        with pytest.raises(BatchError, match=words):
            batch.plan(lens, lens, table, tree=tree)
    assert batch.sequences == 2  # what was planned before still stands
    plain = ops.attention_batch(replace(request, tree=False), Limits(batch=2, tokens=8, pages=2))
    with pytest.raises(BatchError, match="tree is given"):
        plain.plan(lens, lens, table, tree=good)
    for fields in ({"window": 4}, {"causal": False}):
        answer = ops.supports(replace(request, **fields))
        assert not answer and answer.reason.startswith("tree:")
