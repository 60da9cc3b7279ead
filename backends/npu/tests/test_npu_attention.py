"""Fused attention: every line of its table within the suite's bounds, every demand named, what is left to torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import qhal_npu_emulation as emulation
import torch
from qhal_npu_emulation import attentions, library
from qhal_npu_emulation.attentions import ASKS, Ask

from qhal.caches import KVCache, Limits
from qhal.formats import Format
from qhal.requests import AttentionRequest, NumericsClass, minimum_class
from qhal_npu import attention_table as table
from qhal_npu import calls, fused
from qhal_npu.attention import Broken, choose
from qhal_portable import attention as portable

ARCHS = ("A2", "A3", "A5")
EACH = [(a, arch) for a in ASKS for arch in a.on]


@pytest.mark.parametrize(("a", "arch"), EACH, ids=[f"{arch} {a.name}" for a, arch in EACH])
def test_every_question_is_answered_by_its_line_within_the_bound(a: Ask, arch: str) -> None:
    assert attentions.judged(a, emulation.ops(arch), arch) == ""


def test_every_line_is_asked_on_every_generation_it_names() -> None:
    asked = {(a.line, arch) for a, arch in EACH}
    assert asked == {(line.kind, arch) for line in table.FUSED for arch in line.on}
    assert len({a.name for a in ASKS}) == len(ASKS)
    assert all(set(line.aclnn) == set(ARCHS) for line in table.FUSED)
    assert {line.op for line in table.FUSED} <= set(library.KERNELS)


def asked(line: str, **more: Any) -> AttentionRequest:
    """The request of the first question of a line, changed."""
    r = next(a.request for a in ASKS if a.line == line)
    kv = {name: more.pop(name) for name in ("k", "v", "k_dim", "v_dim", "page", "heads_kv") if name in more}
    if "heads_kv" in kv:
        kv["heads"] = kv.pop("heads_kv")
    return replace(r, kv=replace(r.kv, **kv), **more)


BF16, FP16, INT8 = Format("bf16"), Format("fp16"), Format.parse("int8.row*fp32")
_PAGES, _TND, _BSND = "decode, 16-bit pages", "rows one after the other", "rows side by side"
_HEAD, _LATENT = "decode, int8 pages by head", "decode, latent pages"
BROKEN: list[tuple[str, AttentionRequest, str]] = [
    ("attention-generation", asked(_HEAD), "A5"),
    ("attention-types", asked(_PAGES, q=Format("fp32")), "A2"),
    ("attention-types", asked(_PAGES, p=Format("fp32")), "A2"),
    ("attention-types", asked(_PAGES, out=torch.float32), "A2"),
    ("attention-types", asked(_PAGES, k=FP16), "A2"),
    ("attention-options", asked(_PAGES, softcap=5.0), "A2"),
    ("attention-options", asked(_TND, tree=True, window=None, sinks=False), "A2"),
    ("attention-options", asked(_BSND, sinks=True, lse=False), "A2"),
    ("decode-page", asked(_PAGES, page=24), "A2"),
    ("decode-page", asked(_HEAD, page=16), "A2"),
    ("decode-page", asked(_PAGES, page=1024), "A2"),
    ("prefill-page", asked("prefill, 16-bit pages", page=64), "A2"),
    ("head-dims", asked(_BSND, k_dim=72, v_dim=72), "A2"),
    ("head-dims", asked(_HEAD, k_dim=80, v_dim=80), "A2"),
    ("head-count", asked(_PAGES, heads=130), "A2"),
    ("row-width", asked(_PAGES, heads=256, heads_kv=256, k_dim=512, v_dim=512), "A2"),
    ("antiquant-pair", asked(_HEAD, v=Format.parse("int8-int8.head*bf16")), "A2"),
    ("tnd-type", asked(_BSND), "A2"),
    ("tnd-width", asked(_TND, k_dim=256, v_dim=256, sinks=False), "A2"),
    ("sink-width", asked(_TND, k_dim=192, v_dim=192), "A2"),
    ("sink-lse", asked(_TND, lse=True), "A2"),
    ("latent-sizes", asked(_LATENT, k_dim=256), "A2"),
    ("latent-sizes", asked(_LATENT, heads=6), "A2"),
    ("latent-page", asked(_LATENT, page=64), "A2"),
    ("latent-queries", asked(_LATENT, phase="prefill"), "A2"),
    ("latent-lse", asked(_LATENT, lse=True), "A2"),
    ("quantized-queries", asked(_LATENT, q=INT8, q_rope=BF16), "A2"),
]


@pytest.mark.parametrize(("demand", "r", "arch"), BROKEN, ids=[f"{name} {i}" for i, (name, *_) in enumerate(BROKEN)])
def test_a_broken_demand_is_named_in_the_answer(demand: str, r: AttentionRequest, arch: str) -> None:
    """Whether another line serves the request or none."""
    found = choose(r, arch)
    assert f"[{demand}: " in (str(found) if isinstance(found, Broken) else found.note)
    answer = emulation.ops(arch).supports(r)
    assert answer and demand in answer.reason


def test_every_demand_has_a_request_that_breaks_it() -> None:
    assert {name for name, *_ in BROKEN} == set(table.DEMANDS)


def test_claims_are_no_looser_than_what_is_asked() -> None:
    seen = set()
    for _, r, arch in (*BROKEN, *(("", a.request, arch) for a, arch in EACH)):
        answer = emulation.ops(arch).supports(r)
        assert answer.numerics is not None and answer.numerics <= minimum_class(r)
        seen.add(answer.numerics)
    assert seen == {NumericsClass.FP32_ACC, NumericsClass.REDUCED_ACC, NumericsClass.DEQUANT_16}


def batch_of(r: AttentionRequest, lens: list[tuple[int, int]], pages: int = 4) -> tuple[Any, KVCache, torch.Tensor]:
    """(batch, cache, q) of random numbers; every sequence has pages of its own."""
    ops = emulation.ops("A2")
    cache = KVCache.allocate(r.kv, pages * len(lens), "cpu")
    slots = torch.arange(cache.pages * r.kv.page)
    k, v = (torch.randn(slots.numel(), r.kv.heads, n).bfloat16() for n in (r.kv.k_dim, r.kv.v_dim))
    ops.quant_kv(k, v, cache, slots)
    batch = ops.attention_batch(r, Limits(len(lens), sum(n for n, _ in lens), pages))
    own = torch.arange(cache.pages, dtype=torch.int32).reshape(len(lens), pages)
    batch.plan(torch.tensor([n for n, _ in lens]), torch.tensor([n for _, n in lens]), own)
    return batch, cache, torch.randn(sum(n for n, _ in lens), r.heads, r.kv.k_dim).bfloat16()


def called(r: AttentionRequest, cache: KVCache, batch: Any, q: torch.Tensor, **more: Any) -> str:
    """Which fused operator is called, if any; without one the result is the torch operators'."""
    before = library.CALLS.copy()
    found = emulation.ops("A2").attention(q, cache, batch, **more)
    names = [name for name in library.CALLS - before if "infer" in name]
    wanted = portable.attend(q, cache, batch, more.get("sinks"), None, None, torch.float32)
    assert names or torch.equal(found, wanted)
    return ", ".join(names)


_V1, _V2 = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"


def test_what_no_line_takes_runs_on_torch_operators() -> None:
    plain, sunk = asked(_PAGES), asked(_TND)
    for lens in ([(1, 0), (1, 0)], [(0, 20)]):
        batch, cache, q = batch_of(plain, lens)
        assert called(plain, cache, batch, q) == ""  # lengths: no query sees a key
    whole = replace(sunk, causal=False)
    batch, cache, q = batch_of(whole, [(5, 3), (1, 20)])
    assert called(whole, cache, batch, q, sinks=torch.zeros(4)) == ""  # lengths: more queries than keys, all seen
    batch, cache, q = batch_of(sunk, [(2, 3), (1, 20)])
    assert called(sunk, cache, batch, q, sinks=torch.full((4,), 0.1)) == ""  # sink-type: bf16 has no 0.1
    assert called(sunk, cache, batch, q, sinks=torch.full((4,), 0.5)) == _V2
    quiet = replace(plain, lse=False)
    batch, cache, q = batch_of(quiet, [(1, 20), (1, 9)])
    assert called(quiet, cache, batch, q) == _V1
    assert called(quiet, cache, batch, q, lse=torch.zeros(2, 4)) == ""  # lse


def test_a_batch_that_a_line_does_not_take_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    r = replace(asked(_PAGES), lse=False)
    batch, cache, q = batch_of(r, [(1, 20), (1, 9)])
    strided = replace(cache, planes={n: t.repeat_interleave(2, 0)[::2] for n, t in cache.planes.items()})
    assert called(r, strided, batch, q) == _V2  # planes: rows are gathered
    lines = {line.kind: line for line in table.FUSED}
    rows = [(1, 20, torch.zeros(1)), (1, 9, torch.zeros(1))]

    def broken(kind: str) -> str:
        return fused.broken_at_the_call(lines[kind], cache, rows, r, None, None)

    assert {broken(kind) for kind in (_PAGES, _TND, _BSND)} == {""}
    monkeypatch.setattr(table, "PAGES_LIMIT", cache.planes["k.codes"].numel())
    assert (broken(_PAGES), broken(_TND)) == ("planes", "")
    monkeypatch.setattr(table, "KEYS", 19)
    assert (broken(_BSND), broken(_TND)) == ("sizes", "")
    monkeypatch.setattr(table, "SEQUENCES", 1)
    assert broken(_TND) == "sizes"


@pytest.mark.parametrize(
    ("plane", "number", "taken"),
    [("k.scale", 0.03125, _V1), ("v.scale", 0.1, _V2), ("k.zero", -128.0, _V1), ("k.zero", 128.0, _V2),
     ("v.zero", 0.5, _V2)],
)  # fmt: skip
def test_scales_that_the_type_of_q_does_not_hold_are_not_rounded(plane: str, number: float, taken: str) -> None:
    c8 = Format.parse("int8-fp32.col*fp32")
    r = asked("decode, int8 pages by channel", k=c8, v=c8)
    batch, cache, q = batch_of(r, [(1, 20), (1, 100)])
    cache.set_static(plane, torch.full(cache.planes[plane].shape, number))
    assert called(r, cache, batch, q) == taken


def test_queries_of_another_type_are_held_as_the_request_says() -> None:
    r = replace(asked(_PAGES), lse=False)
    batch, cache, q = batch_of(r, [(1, 20), (1, 9)])
    wide, ops = q.float() * (1 + 2.0**-12), emulation.ops("A2")  # rounded away by bf16
    assert torch.equal(ops.attention(wide, cache, batch), ops.attention(q, cache, batch))


def test_table_entries_past_a_length_are_not_read() -> None:
    r = asked("decode, int8 pages by token and head")
    batch, cache, q = batch_of(r, [(1, 20), (1, 100)])
    wanted = emulation.ops("A2").attention(q, cache, batch)
    batch.page_table[0, 1:] = 10**6
    assert torch.equal(emulation.ops("A2").attention(q, cache, batch), wanted)


Plant = Callable[[pytest.MonkeyPatch], None]


def calling(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    """A fault: calls have other keywords."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        for op in ("fused_attention", "fused_attention_v2"):
            kept = getattr(calls, op)
            patch.setattr(calls, op, lambda *t, _kept=kept, **more: _kept(*t, **change(more)))

    return plant


def without(word: str) -> Plant:
    return calling(lambda more: {k: v for k, v in more.items() if word not in k})


def changed(word: str, change: Callable[[Any], Any]) -> Plant:
    return calling(lambda more: {k: change(v) if word in k else v for k, v in more.items()})


_CHANNEL, _TOKEN = "decode, int8 pages by channel", "decode, int8 pages by token and head"
_PREFILL = "prefill, 16-bit pages"
FAULTS: dict[str, tuple[Plant, str]] = {
    "offsets left out, as engines do": (without("antiquant_offset"), _CHANNEL),
    "offsets with the other sign": (changed("antiquant_offset", torch.neg), _TOKEN),
    "no sink": (without("learnable_sink"), _TND),
    "no window over pages": (without("atten_mask"), _TOKEN),
    "a window one key longer": (changed("pre_tokens", lambda n: n + 1), _PREFILL),
    "one key of the future": (changed("next_tokens", lambda n: n + 1), _PREFILL),
    "rope left out": (changed("query_rope", torch.zeros_like), _LATENT),
    "keys of another sequence": (changed("block_table", lambda t: t.roll(1, 0)), _PAGES),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, line = FAULTS[name]
    plant(monkeypatch)
    assert any(attentions.judged(a, emulation.ops("A2"), "A2") for a in ASKS if a.line == line and "A2" in a.on)


def test_the_emulation_refuses_what_the_documents_forbid() -> None:
    emulation.ops("A2")
    q, pages = torch.zeros(1, 2, 4, 64).bfloat16(), torch.zeros(2, 32, 128).bfloat16()
    more = {"num_heads": 4, "num_key_value_heads": 2, "actual_seq_lengths_kv": [20], "block_size": 32}
    more["block_table"] = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="block_size 32"):  # two queries need pages of 128
        calls.fused_attention(q, pages, pages, input_layout="BSND", **more)
    one = torch.zeros(1, 4, 1, 64).bfloat16()
    codes = pages.to(torch.int8)
    with pytest.raises(NotImplementedError, match="mode 2 in torch"):
        scales = {f"{n}_antiquant_scale": torch.ones(2) for n in ("key", "value")}
        modes = {f"{n}_antiquant_mode": 2 for n in ("key", "value")}
        calls.fused_attention(one, codes, codes, input_layout="BNSD", **more, **scales, **modes)
    rows = torch.zeros(20, 2, 64).bfloat16()
    with pytest.raises(NotImplementedError, match="D "):
        calls.fused_attention_v2(
            rows, rows, rows, num_query_heads=2, input_layout="TND", actual_seq_qlen=[20], actual_seq_kvlen=[20]
        )
