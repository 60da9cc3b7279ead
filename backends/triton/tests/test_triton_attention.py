"""attention: cases of the suite, every cache format against the portable operation, and what the kernel alone has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton_ops import DEVICE, Emulated

from qhal import AttentionRequest, BatchError, Format, FormatError, KVCache, KVRequest, Limits
from qhal.caches import canonical_planes
from qhal.elements import element
from qhal.requests import NumericsClass
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_portable import kv as portable
from qhal_portable.attention import PagedBatch, attend
from qhal_triton.attention import TritonBatch
from qhal_triton.attention.config import _fill
from qhal_triton.bits import widen
from qhal_triton.kv.kernels.packed import ELEMENTS, word_numbers

OPS = Emulated()
ALL = [case for case in catalogue(0) if case.operation == "attention"]


def test_every_case_of_the_suite_is_taken() -> None:
    for case in ALL:
        assert OPS._path(OPERATIONS[case.operation].request(case)) is not None, case.id


SMALL = [case for case in ALL if "_d128_" not in case.id and "_r256_" not in case.id and case.size("l") == 1]


@pytest.mark.parametrize("case", SMALL[::7], ids=[case.id for case in SMALL[::7]])
def test_cases_of_the_suite(case: Case) -> None:
    record = run_case(case, OPS)
    assert record.outcome.status is Status.PASS, record.outcome.reason


FORMATS = (
    ("fp16", "bf16"),
    ("e4m3fn.head*fp32", "e5m2.col*fp32"),
    ("e4m3fnuz.tensor*fp32", "e5m2fnuz.row*bf16"),
    ("int8-int8.tensor*fp32", "uint8-uint8.head*fp32"),
    ("int8.row/fp32", "int8.tensor/fp32"),
    ("int4.row*fp32", "int4.g32*fp16"),
    ("uint4-fp16.row*fp16@domain=minmax", "uint4-uint4.g16*bf16@domain=minmax"),
    ("uint8-uint8.row*fp32@domain=minmax", "int4-int4.head*fp32"),
    ("e4m3fn.g32*e8m0", "e2m1.g32*e8m0"),
    ("e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*(e4m3fn.tensor*fp32)"),
    ("int8.row*(e4m3fn.tensor*fp32)", "int8.g16*(e4m3fn.tensor*fp32)"),
)


def request_of(k: str, v: str, *, mla: bool = False, **more: Any) -> AttentionRequest:
    kv = KVRequest(
        kind="mla" if mla else "mha", k=Format.parse(k), v=Format.parse(v), heads=1 if mla else 2, k_dim=64,
        v_dim=48, page=8,
    )  # fmt: skip
    asked = {"q": Format.parse("bf16"), "p": Format.parse("bf16"), "out": torch.float32, "phase": "mixed"} | more
    return AttentionRequest(kv=kv, heads=6, scale=0.17, **asked)


class Step:
    """Sequences in scattered pages of a cache that holds NaN elsewhere; what the portable operation makes of them."""

    def __init__(self, request: AttentionRequest, lens: tuple[tuple[int, int], ...], seed: int = 0) -> None:
        self.request, kv = request, request.kv
        g = torch.Generator().manual_seed(seed)
        self.queries, self.keys = (torch.tensor(n, dtype=torch.int32) for n in zip(*lens, strict=True))
        need = [-(-n // kv.page) for _, n in lens]
        order = torch.randperm(sum(need) + 2, generator=g).tolist()
        self.table = torch.full((len(lens), max(need) + 1), order[-1], dtype=torch.int32)
        slots = []
        for b, (_, n) in enumerate(lens):
            mine = [order.pop(0) for _ in range(need[b])]
            self.table[b, : need[b]] = torch.tensor(mine, dtype=torch.int32)
            slots += [mine[i // kv.page] * kv.page + i % kv.page for i in range(n)]
        self.cache = KVCache.allocate(kv, sum(need) + 2, "cpu", planes=canonical_planes(kv, [request]))
        for name in sorted(self.cache.static):
            plane = self.cache.planes[name]
            value = torch.rand(plane.shape, generator=g) / 32 + 1 / 64
            if name.endswith(".zero"):
                value = torch.randint(0, 4, plane.shape, generator=g).float()
            if name != "p.scale":
                self.cache.set_static(name, value)
        for name, plane in self.cache.planes.items():
            if name not in self.cache.static:
                plane.view(torch.uint8).fill_(0x7F) if plane.element_size() == 1 else plane.fill_(float("nan"))
        shapes = ((kv.k_dim,), (kv.v_dim,)) if kv.kind == "mla" else ((kv.heads, kv.k_dim), (kv.heads, kv.v_dim))
        x, y = (torch.randn(len(slots), *shape, generator=g).bfloat16() for shape in shapes)
        portable.quant_kv(x, y, self.cache, torch.tensor(slots))
        wide = kv.k_dim + kv.v_dim if kv.kind == "mla" else kv.k_dim
        tokens = int(self.queries.sum())
        self.q = torch.randn(tokens, request.heads, wide, generator=g).bfloat16()
        self.sinks = torch.randn(request.heads, generator=g) if request.sinks else None
        self.limits = Limits(len(lens), tokens, self.table.shape[1])
        trees = [torch.rand(n, n, generator=g) < 0.5 for n, _ in lens]
        for tree in trees:
            tree.fill_diagonal_(True)
        self.tree = torch.cat([tree.flatten() for tree in trees]) if request.tree else None

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = PagedBatch(self.request, self.limits, torch.device("cpu"))
        batch.plan(self.queries, self.keys, self.table, tree=self.tree)
        lse = torch.empty(self.q.shape[:2])
        return attend(self.q, self.cache, batch, self.sinks, None, lse), lse

    def got(self, batch: TritonBatch | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if batch is None:
            made = OPS.attention_batch(self.request, self.limits)
            assert isinstance(made, TritonBatch)
            batch = made
        planes = {name: plane.to(DEVICE) for name, plane in self.cache.planes.items()}
        cache = KVCache(self.request.kv, planes, "canonical", self.cache.host)
        tree = None if self.tree is None else self.tree.to(DEVICE)
        batch.plan(self.queries, self.keys, self.table.to(DEVICE), tree=tree)
        lse = torch.empty(self.q.shape[:2], device=DEVICE)
        sinks = None if self.sinks is None else self.sinks.to(DEVICE)
        o = OPS.attention(self.q.to(DEVICE), cache, batch, sinks=sinks, lse=lse)
        return o.cpu(), lse.cpu()

    def check(self, batch: TritonBatch | None = None) -> None:
        """As close as the suite asks of sums by matrix instructions; P's own rounding is tested there."""
        (o, lse), (wanted, log) = self.got(batch), self.expected()
        step = {"fp32": 2.0**-11, "bf16": 2.0**-7, "fp16": 2.0**-10, "e4m3fn": 2.0**-3}[
            self.request.p.element if self.request.p.plain else "bf16"
        ]
        size = wanted.abs().amax()
        assert torch.equal(torch.isnan(o), torch.isnan(wanted)) and torch.equal(lse == -torch.inf, log == -torch.inf)
        assert float((o - wanted).abs().max()) <= step * float(size)
        some = log != -torch.inf
        assert float((lse - log)[some].abs().max()) <= 2.0**-10


LENS = ((1, 9), (5, 5), (3, 0), (4, 2), (7, 70))


@pytest.mark.parametrize(("k", "v"), FORMATS, ids=[f"{k}~{v}" for k, v in FORMATS])
@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_every_cache_format(mla: bool, k: str, v: str) -> None:
    request = request_of(k, v, mla=mla, p=Format.parse("fp32"))
    path = OPS._path(request)
    assert path is not None and path.kernel == "attend" and path.numerics == NumericsClass.REDUCED_ACC
    Step(request, LENS[:4] if mla else LENS).check()


WORDS = (
    ("e4m3fn.head*fp32", "int8.row*fp32"),
    ("int8.tensor*fp32", "e5m2.tensor*fp32"),
    ("e5m2.row*fp32", "e4m3fn.row*fp32"),
)


@pytest.mark.parametrize(("k", "v"), WORDS, ids=[f"{k}~{v}" for k, v in WORDS])
@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
def test_codes_of_eight_bits_are_read_as_words(mla: bool, k: str, v: str) -> None:
    request = request_of(k, v, mla=mla, p=Format.parse("fp32"), phase="decode")
    request = replace(request, kv=replace(request.kv, v_dim=64))
    step = Step(request, ((1, 40), (1, 64), (1, 3)))
    made = OPS.attention_batch(request, step.limits)
    assert isinstance(made, TritonBatch) and made.words == (True, True)
    step.check(made)
    codes = step.cache.planes["latent.codes" if mla else "v.codes"]
    if codes.dtype.is_floating_point:
        codes[step.table[1, 3], 2, ..., 5] = float("nan")  # of one head or of the latent row, in the second sequence
        spoilt = torch.isnan(step.got(made)[0])
        assert torch.equal(spoilt, torch.isnan(step.expected()[0]))
        assert bool(spoilt[1].any()) and not bool(spoilt[[0, 2]].any())


@pytest.mark.parametrize("k", ["bf16", "e4m3fn.tensor*fp32", "e4m3fn.row*fp32", "int8.row*fp32"])
def test_many_heads_over_latent_rows(k: str) -> None:
    """Tiles of 64 heads, whose masks are at edges only."""
    request = request_of(k, "bf16", mla=True, phase="decode", sinks=True)
    kv = replace(request.kv, k_dim=512, v_dim=64, page=64)
    step = Step(replace(request, kv=kv, heads=80, scale=0.05), ((1, 130), (1, 64), (1, 0)))
    made = OPS.attention_batch(step.request, step.limits)
    assert isinstance(made, TritonBatch) and made.config.m == 64 and made.config.edges
    step.check(made)
    step.table[1, 0] = -1
    spoilt = torch.isnan(step.got(made)[0]).all(-1).all(-1)
    assert spoilt.tolist() == [False, True, False]


@triton.jit
def both(words, low, high, ELEMENT: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    code = tl.load(words + at)
    tl.store(low + at, widen(word_numbers(code, ELEMENT, 0)))
    tl.store(high + at, widen(word_numbers(code, ELEMENT, 1)))


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_word_of_two_codes(name: str) -> None:
    low, high = torch.arange(256).repeat(256), torch.arange(256).repeat_interleave(256)
    words = (low + 256 * high).to(torch.int16).to(DEVICE)
    found = torch.empty(2, 1 << 16, device=DEVICE)
    both[(64,)](words, found[0], found[1], ELEMENT=name, N=1024, num_warps=4)
    values = torch.arange(256, dtype=torch.uint8).view(element(name).storage).float()
    assert torch.equal(found[0].cpu().nan_to_num(7e7), values[low].nan_to_num(7e7))
    assert torch.equal(found[1].cpu().nan_to_num(7e7), values[high].nan_to_num(7e7))


@pytest.mark.parametrize(
    "more",
    [
        {"window": 5}, {"softcap": 3.0}, {"sinks": True}, {"causal": False}, {"causal": False, "window": 4},
        {"tree": True}, {"p": Format.parse("e4m3fn")}, {"p": Format.parse("uint8.tensor*fp32"), "sinks": True},
        {"q": Format.parse("int8-int8.row*fp32@domain=minmax")}, {"q": Format.parse("e4m3fn.g16*fp32")},
        {"q": Format.parse("fp16")}, {"q": Format.parse("int8-int8.head*fp32")}, {"out": torch.bfloat16},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_request_can_ask(more: dict[str, Any]) -> None:
    request = request_of("int8.row*fp32", "e4m3fn.head*fp32", **more)
    assert OPS._path(request) is not None
    Step(request, LENS).check()


@pytest.mark.parametrize("k", ["bf16", "int4.g32*fp16"])
def test_parts_of_the_keys_are_merged(k: str) -> None:
    request = request_of(k, k, phase="decode", sinks=True, p=Format.parse("fp32"))
    step = Step(request, ((1, 98), (1, 0), (1, 64)))
    made = OPS.attention_batch(request, step.limits)
    assert isinstance(made, TritonBatch)
    split = TritonBatch(request, step.limits, made.device, made.target, made.arithmetic, made.config._replace(splits=3))
    step.check(split)
    assert torch.equal(step.got(split)[0], step.got(split)[0])


def test_rows_of_a_batch_do_not_depend_on_each_other() -> None:
    request = request_of("e4m3fn.row*fp32", "int8.row*fp32", batch_invariant=True)
    assert OPS.supports(request).batch_invariant
    step = Step(request, LENS)
    batch = OPS.attention_batch(request, step.limits)
    assert isinstance(batch, TritonBatch)
    whole, at = step.got(batch)[0], 0
    for b, n in enumerate(step.queries.tolist()):
        alone = Step(request, LENS)
        alone.q, alone.queries, alone.keys = step.q[at : at + n], step.queries[b : b + 1], step.keys[b : b + 1]
        alone.table = step.table[b : b + 1]
        assert torch.equal(alone.got(batch)[0], whole[at : at + n])
        at += n


def test_a_batch_is_planned_again_and_again() -> None:
    """Buffers keep their addresses, and nothing of an earlier plan is left."""
    request = request_of("bf16", "bf16")
    first, second = Step(request, LENS), Step(request, ((2, 12), (0, 5), (9, 9)), seed=3)
    made = OPS.attention_batch(request, Limits(6, 40, 12))
    assert isinstance(made, TritonBatch)
    held = (made.steps.data_ptr(), made.table.data_ptr(), made.partial.data_ptr())
    for step in (first, second, first):
        step.check(made)
    assert held == (made.steps.data_ptr(), made.table.data_ptr(), made.partial.data_ptr())


def test_lengths_on_the_device_count() -> None:
    request = request_of("bf16", "bf16")
    step = Step(request, LENS)
    batch = OPS.attention_batch(request, step.limits)
    wanted = step.expected()[0]
    for bound in (step.keys, step.keys + 3):
        bound = torch.minimum(bound, torch.tensor(step.table.shape[1] * request.kv.page))
        batch.plan(step.queries, bound, step.table.to(DEVICE), kv_lens_device=step.keys.to(DEVICE))
        cache = KVCache(request.kv, {n: p.to(DEVICE) for n, p in step.cache.planes.items()})
        o = OPS.attention(step.q.to(DEVICE), cache, batch).cpu()
        assert float((o - wanted).abs().max()) <= 2.0**-7 * float(wanted.abs().max())
    with pytest.raises(BatchError, match="kv_lens_device says 70, the bound on the host was 69"):
        batch.plan(step.queries, step.keys - (step.keys > 69).int(), step.table, kv_lens_device=step.keys)


def test_a_page_outside_of_the_cache_is_not_read() -> None:
    request = request_of("bf16", "bf16")
    step = Step(request, LENS)
    step.table[1, 0], step.table[4, 2] = 1 << 20, -7
    o = step.got()[0]
    assert bool(torch.isnan(o[1:6]).all()) and bool(torch.isnan(o[13:]).all()) and bool(torch.isfinite(o[:1]).all())


def test_bad_arguments() -> None:
    request = request_of("bf16", "bf16")
    step = Step(request, LENS)
    batch = OPS.attention_batch(request, step.limits)
    with pytest.raises(BatchError, match="21 query tokens, the batch was made for 20"):
        batch.plan(step.queries + torch.tensor([1, 0, 0, 0, 0]), step.keys, step.table)
    cache = KVCache(request.kv, {n: p.to(DEVICE) for n, p in step.cache.planes.items()})
    with pytest.raises(BatchError, match=r"planned with 0; call its plan\(\) with the lengths of this step first"):
        OPS.attention(step.q.to(DEVICE), cache, batch)
    batch.plan(step.queries, step.keys, step.table)
    with pytest.raises(BatchError, match="q has 19 tokens"):
        OPS.attention(step.q[1:].to(DEVICE), cache, batch)
    with pytest.raises(FormatError, match="sinks given"):
        OPS.attention(step.q.to(DEVICE), cache, batch, sinks=torch.zeros(6, device=DEVICE))
    with pytest.raises(FormatError, match="out is"):
        OPS.attention(step.q.to(DEVICE), cache, batch, out=torch.empty(20, 6, 48, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(FormatError, match="q is on meta, must be on"):
        OPS.attention(step.q.to("meta"), cache, batch)
    with pytest.raises(FormatError, match="the batch was made for"):
        other = replace(request.kv, page=16)
        OPS.attention(step.q.to(DEVICE), KVCache.allocate(other, 2, DEVICE), batch)
    OPS.attention(step.q.to(DEVICE), cache, batch)
    with pytest.raises(FormatError, match="the batch was made for"):  # the cache is known, to another batch
        OPS.attention(step.q.to(DEVICE), cache, OPS.attention_batch(replace(request, kv=other), batch.limits))


def test_what_no_kernel_takes_stays_portable() -> None:
    paged = request_of("bf16", "bf16")
    for request in (
        replace(paged, kv=replace(paged.kv, page=48)),
        request_of("fp32", "bf16"),
        request_of("bf16", "bf16", q=Format.parse("fp32")),
        request_of("bf16", "bf16", p=Format.parse("int4.tensor*fp32")),
        request_of("uint8.row*fp32+fp32@domain=minmax", "bf16"),
    ):
        answer = OPS.supports(request)
        assert OPS._path(request) is None and answer and answer.executes.startswith("dequantize the cache")


@pytest.mark.parametrize(
    ("programs", "most", "parts"), [(8, 64, 30), (128, 32, 2), (1024, 8, 1), (8, 1, 1), (200, 4, 1), (0, 4, 1)]
)
def test_parts_of_the_keys_fill_the_chip(programs: int, most: int, parts: int) -> None:
    """264 slots: of an H100, with two programs to a multiprocessor."""
    assert _fill(programs, most, 264) == parts
