"""FlashInfer without a GPU: every call against a double that raises as the wrapper does and computes as its kernel.

The double works on pages, in fp32, rounds P to the type of the cache, and keeps the sum of unrounded weights (L2).
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import qhal
from qhal.caches import KVCache, Limits
from qhal.formats import Format
from qhal.requests import AttentionRequest, KVRequest
from qhal_conformance.cases import Case
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_cuda import flashinfer
from qhal_cuda.ops import CudaOps


class Wrapper:
    """BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend="fa3")."""

    made: ClassVar[list[Wrapper]] = []

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str = "auto") -> None:
        assert float_workspace_buffer.data_ptr() % 16 == 0 and kv_layout == "NHD" and backend == "fa3"
        self.plans = 0
        Wrapper.made.append(self)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        o_data_type: torch.dtype | None = None,
        seq_lens: Tensor | None = None,
    ) -> None:
        for t in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, seq_lens):
            assert t is not None and t.dtype == torch.int32 and t.dim() == 1
        assert head_dim_qk in (64, 128, 256) and num_qo_heads % num_kv_heads == 0
        assert q_data_type == kv_data_type == o_data_type and len(paged_kv_indices) >= int(paged_kv_indptr[-1])
        self.plans += 1
        self.args = (qo_indptr, paged_kv_indptr, seq_lens, causal, sm_scale, window_left, logits_soft_cap)
        self.indices, self.kind, self.heads = paged_kv_indices, q_data_type, (num_qo_heads, num_kv_heads)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
    ) -> Any:
        starts, pages, lens, causal, scale, left, cap = self.args
        k, v = paged_kv_cache
        if q.shape[0] != int(starts[-1]):
            raise ValueError("q.shape[0] does not match qo_indptr[-1]")
        assert q.dtype == k.dtype == v.dtype == self.kind and k.stride() == v.stride() and out is not None
        assert out.shape == q.shape and out.dtype == self.kind and q.stride(-1) == 1 and k.stride(-1) == 1
        assert all(t.data_ptr() % 16 == 0 for t in (q, k, v, out)) and (not return_lse or lse_base == "ln")
        assert scale is not None and lens is not None
        share = self.heads[0] // self.heads[1]
        for b in range(len(lens)):
            rows, length = slice(int(starts[b]), int(starts[b + 1])), int(lens[b])
            own = self.indices[int(pages[b]) : int(pages[b + 1])].long()
            keys, values = (t[own].flatten(0, 1)[:length].float().repeat_interleave(share, 1) for t in (k, v))
            s = torch.einsum("thd,lhd->htl", q[rows].float(), keys) * scale
            s = cap * torch.tanh(s / cap) if cap else s
            at, place = torch.arange(length - s.shape[1], length)[:, None], torch.arange(length)
            seen = place <= at if causal else torch.ones(len(at), length, dtype=torch.bool)
            seen = seen & (place >= at - left) if left >= 0 else seen
            s = s.masked_fill(~seen, -math.inf)
            top = s.amax(-1, keepdim=True) if length else s.new_full((*s.shape[:2], 1), -math.inf)
            e = torch.exp(s - top.clamp(min=-3e38))
            total = e.sum(-1, keepdim=True)
            o = torch.einsum("htl,lhd->thd", e.to(self.kind).float(), values)
            share_of = torch.where(total > 0, 1 / total, 0.0).permute(1, 0, 2)
            out[rows] = (o * share_of).to(self.kind)
            if lse is not None:
                lse[rows] = (top + total.log()).squeeze(-1).T
        return (out, lse) if return_lse else out


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Wrapper.made.clear()
    for name, content in (
        ("flashinfer", {}),
        ("flashinfer.prefill", {"BatchPrefillWithPagedKVCacheWrapper": Wrapper}),
    ):
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    yield


class Emulated(CudaOps):
    """The same code on the processor, with the double."""

    interface: ClassVar[tuple[int, int]] = (1, 0)

    def _path(self, request: Any) -> None:
        """No shared kernel, so that the library is what is tested."""


OPS = Emulated("sm_90", "cpu", {"flashinfer"})
PLAIN = Format("bf16")
KV = KVRequest(kind="mha", k=PLAIN, v=PLAIN, heads=2, k_dim=64, v_dim=64, page=16)
REQUEST = AttentionRequest(
    kv=KV, heads=4, scale=0.125, phase="prefill", q=PLAIN, p=PLAIN, out=torch.bfloat16, lse=True
)  # fmt: skip


def cases() -> list[Case]:
    """What the suite asks up to level 1, its long sequences left out."""
    found = []
    for case in catalogue(1):
        r = OPERATIONS[case.operation].request(case)
        if isinstance(r, AttentionRequest) and flashinfer.choose(r, (9, 0)) and case.size("l") == 1:
            found.append(case)
    return found


CASES = cases()


def test_the_suite_asks_flashinfer() -> None:
    assert len(CASES) >= 5 and {"window", "softcap", "lse"} <= {o for case in CASES for o in case.options}


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_the_arithmetic_is_in_its_class(case: Case) -> None:
    record = run_case(case, OPS)
    assert record.outcome.status is Status.PASS, record.outcome.reason
    assert Wrapper.made and Wrapper.made[0].plans >= 2  # one that compiles, one for the step


def filled(request: KVRequest, pages: int) -> KVCache:
    cache, chance = KVCache.allocate(request, pages, "cpu"), torch.Generator().manual_seed(0)
    for t in cache.planes.values():
        t.copy_(torch.randn(t.shape, generator=chance))
    return cache


def step() -> tuple[Tensor, Tensor, Tensor]:
    table = torch.tensor([[3, 1, 7], [2, 0, 99], [5, 99, 99]])
    return torch.tensor([5, 20, 0]), torch.tensor([40, 20, 3]), table


def test_a_plan_is_handed_over_as_the_library_reads_it() -> None:
    batch = OPS.attention_batch(REQUEST, Limits(3, 64, 3))
    assert isinstance(batch, flashinfer.FlashBatch)
    batch.plan(*step())
    wrapper = Wrapper.made[0]
    assert wrapper.args[0].tolist() == [0, 5, 25, 25] and wrapper.args[1].tolist() == [0, 3, 5, 6]
    assert wrapper.indices.tolist() == [3, 1, 7, 2, 0, 5]
    cache, q = filled(KV, 8), torch.randn(25, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    out, lse = torch.empty(25, 4, 64, dtype=torch.bfloat16), torch.empty(25, 4)
    y = OPS.attention(q, cache, batch, out=out, lse=lse)
    assert y is out
    plain = CudaOps("sm_90", "cpu")
    other = plain.attention_batch(REQUEST, Limits(3, 64, 3))
    other.plan(*step())
    logs = torch.empty(25, 4)
    expected = plain.attention(q, cache, other, lse=logs)
    assert torch.allclose(y.float(), expected.float(), atol=2e-2) and torch.allclose(lse, logs, atol=1e-4)
    wider = torch.empty(25, 4, 65, dtype=torch.bfloat16)[..., :64]  # rows that begin anywhere
    assert torch.equal(OPS.attention(q, cache, batch, out=wider, lse=lse), y)
    lines = torch.empty(4, 25).T
    assert torch.equal(OPS.attention(q.float(), cache, batch, lse=lines), y) and torch.equal(lines, lse)


def test_what_a_plan_cannot_say_goes_to_the_other_kernel() -> None:
    batch = OPS.attention_batch(REQUEST, Limits(3, 64, 3))
    cache, q = filled(KV, 8), torch.randn(25, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    query_lens, kv_lens, table = step()
    batch.plan(query_lens, kv_lens, table)
    expected = OPS.attention(q, cache, batch)
    uneven = dict(cache.planes)
    uneven["v.codes"] = torch.empty(8, 16, 2, 65, dtype=torch.bfloat16)[..., :64].copy_(cache.planes["v.codes"])
    y = OPS.attention(q, replace(cache, planes=uneven), batch)
    assert torch.allclose(y.float(), expected.float(), atol=2e-2)
    bounds = torch.tensor([48, 48, 48])
    batch.plan(query_lens, bounds, table.clamp(max=7), kv_lens_device=kv_lens)
    assert torch.allclose(OPS.attention(q, cache, batch).float(), expected.float(), atol=2e-2)
    assert "lengths that only the device knows" in OPS.supports(REQUEST).executes


def test_a_page_outside_of_the_cache_is_not_read() -> None:
    batch = OPS.attention_batch(REQUEST, Limits(1, 64, 3))
    batch.plan(torch.tensor([4]), torch.tensor([33]), torch.tensor([[0, 1000, -5]]))
    y = OPS.attention(torch.zeros(4, 4, 64).bfloat16(), filled(KV, 2), batch)
    assert bool(torch.isfinite(y).all())


def test_bad_plans_and_queries_are_one_error() -> None:
    batch = OPS.attention_batch(REQUEST, Limits(2, 8, 3))
    with pytest.raises(qhal.BatchError, match="3 sequences, the batch was made for 2"):
        batch.plan(*step())
    batch.plan(torch.tensor([3]), torch.tensor([3]), torch.tensor([[0]]))
    with pytest.raises(qhal.BatchError, match="q has 4 tokens"):
        OPS.attention(torch.zeros(4, 4, 64).bfloat16(), filled(KV, 2), batch)
    with pytest.raises(qhal.FormatError, match="the cache is"):
        OPS.attention(torch.zeros(3, 4, 64).bfloat16(), filled(replace(KV, page=32), 2), batch)
    empty = OPS.attention_batch(REQUEST, Limits(2, 8, 3))
    empty.plan(torch.tensor([0]), torch.tensor([3]), torch.tensor([[0]]))
    assert OPS.attention(torch.zeros(0, 4, 64).bfloat16(), filled(KV, 2), empty).shape == (0, 4, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "decode"},
        {"phase": "mixed"},
        {"p": Format("fp32")},
        {"out": torch.float32},
        {"graph": True},
        {"batch_invariant": True},
        {"sinks": True},
        {"tree": True},
        {"scale": -0.125},
        {"window": 8, "causal": False},
        {"kv": replace(KV, k=Format.parse("e4m3fn.tensor*fp32"))},
        {"kv": replace(KV, k_dim=96, v_dim=96)},
    ],
    ids=str,
)
def test_what_it_would_not_do_exactly_is_not_asked_of_it(change: dict[str, Any]) -> None:
    assert flashinfer.choose(REQUEST, (9, 0)) and not flashinfer.choose(REQUEST, (8, 0))
    assert flashinfer.choose(replace(REQUEST, **change), (9, 0)) is None


def test_a_kernel_that_cannot_be_made_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*a: Any, **k: Any) -> None:
        raise RuntimeError("Ninja build failed:\n /bin/sh: nvcc: not found")

    monkeypatch.setattr(Wrapper, "plan", nothing)
    with pytest.raises(
        qhal.BackendError, match=r"could not make its kernel .*nvcc: not found.*uninstall it to go without"
    ):
        OPS.attention_batch(REQUEST, Limits(1, 8, 1))
