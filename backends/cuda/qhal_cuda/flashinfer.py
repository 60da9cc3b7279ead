"""Prefill over bf16 and fp16 caches through FlashInfer 0.7.2.post1's kernels for sm_90 ("fa3").

Read in the library's sources (`attention/hopper/`): the denominator sums the unrounded weights in fp32, P is rounded to
the type of the cache, a row's sum is kept whole, and the result is rounded once. Sums are those of the matrix
instruction, tanh of a soft-cap is the hardware's: class reduced-acc. Not taken, because it would not be what was asked:

* its other kernels for 16-bit sums ("fa2", also over fp8 and NVFP4 caches): the denominator sums the rounded weights,
  so the result and above all lse differ; a scale of V is applied to the 16-bit result.
* decode: fa3 does not split a long sequence, and fa2 is out. MLA: results of splits are kept in 16 bits. xqa: Q is
  rounded to fp8 over an fp8 cache.
* graphs, windows without causal masks, sinks (a variant of its own), trees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.elements import element
from qhal.errors import FormatError
from qhal.formats import Format
from qhal.requests import AttentionRequest, NumericsClass
from qhal_cuda.libraries import making
from qhal_portable.attention import buffer, check_plan, check_queries, check_tree, same_cache
from qhal_triton.paths import Path

ARCH = (9, 0)
DIMS = (64, 128, 256)
"""Head dims that the kernels are instantiated for."""
_HALVES = (Format("bf16"), Format("fp16"))
_WORKSPACE = 16 << 20  # bytes; the fa3 kernels keep no partial results, their schedule has a buffer of the library's
_ALIGNED = 16  # bytes: rows are read and written by vectors and by the tensor memory accelerator


def choose(r: AttentionRequest, capability: tuple[int, int]) -> Path | None:
    """The path for a request that is executable at all; None: another one's."""
    kv = r.kv
    if capability != ARCH or r.phase != "prefill" or kv.kind != "mha" or kv.k_dim != kv.v_dim or kv.k_dim not in DIMS:
        return None
    if r.q not in _HALVES or not r.q == r.p == kv.k == kv.v or r.out != element(r.q.element).storage:
        return None
    if r.scale <= 0 or r.graph or r.batch_invariant or r.tree or r.sinks or (r.window is not None and not r.causal):
        return None
    words = f"FlashInfer fa3, {r.q}: fp32 sums of unrounded weights, P rounded to {r.p}, one rounding"
    return Path(kernel="fa3", executes=words, numerics=NumericsClass.REDUCED_ACC, graph=False)


class FlashBatch(AttentionBatch):
    """A planned wrapper of the library, and the batch of another kernel for what the library cannot do with a plan:
    lengths that only the device knows, and caches whose planes have other strides than each other."""

    def __init__(
        self, request: AttentionRequest, limits: Limits, device: torch.device, other: Callable[[], AttentionBatch]
    ) -> None:
        self.request, self.limits, self._device, self._make = request, limits, device, other
        self._other: AttentionBatch | None = None
        self._planned: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None
        self._tokens, self._pages = 0, 0
        self._indices = torch.zeros(1, dtype=torch.int32, device=device)
        self._copied: Any = None
        space = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
        one = torch.ones(1, dtype=torch.int32)
        with making("flashinfer", request):
            from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

            self._wrapper = BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend="fa3")
            self._hand_over(one, one, self._indices)  # compiles and loads the kernel now

    def plan(
        self,
        query_lens: Tensor,
        kv_lens: Tensor,
        page_table: Tensor,
        *,
        kv_lens_device: Tensor | None = None,
        tree: Tensor | None = None,
    ) -> None:
        """See AttentionBatch. Waits for the copies of the plan before, if they have not run: the library reuses the
        host memory that they come from."""
        need = check_plan(self.request, self.limits, query_lens, kv_lens, page_table, kv_lens_device)
        check_tree(self.request, query_lens.tolist(), tree)
        count = query_lens.numel()
        table = page_table[:count, :need].to(torch.int32, copy=True)
        lens = (query_lens.to(torch.int32, copy=True), kv_lens.to(torch.int32, copy=True))
        self._planned = (*lens, table, kv_lens_device)
        self._tokens, self._pages = int(query_lens.sum()), 0
        if self._other is not None or kv_lens_device is not None:
            self._plan_other()
        if kv_lens_device is None and self._tokens:
            each = (lens[1] + self.request.kv.page - 1) // self.request.kv.page
            first = torch.arange(count, dtype=torch.int32) * need - (each.cumsum(0) - each)
            place = torch.arange(int(each.sum())) + first.repeat_interleave(each)
            self._indices = table.reshape(-1).index_select(0, place.to(self._device)).contiguous()
            self._hand_over(*lens, self._indices)

    def takes(self, cache: KVCache) -> bool:
        """Whether the library reads this cache under this plan."""
        k, v = cache.planes["k.codes"], cache.planes["v.codes"]
        even = k.stride() == v.stride() and _aligned(k) and _aligned(v)
        return even and self._planned is not None and self._planned[3] is None

    @property
    def other(self) -> AttentionBatch:
        """The other kernel's batch, planned as this one was."""
        if self._other is None:
            self._plan_other()
        assert self._other is not None
        return self._other

    def run(self, q: Tensor, cache: KVCache, sinks: Tensor | None, out: Tensor | None, lse: Tensor | None) -> Tensor:
        """See QuantOps.attention."""
        r, kv = self.request, self.request.kv
        if not same_cache(cache.request, kv):
            raise FormatError(f"the cache is {cache.request}, the batch was made for {kv}")
        check_queries(q, r, sinks, self._tokens, kv.k_dim)
        shape = (self._tokens, r.heads, kv.v_dim)
        result = buffer(out, shape, r.out, "out", q.device)
        logs = None if lse is None else buffer(lse, shape[:2], torch.float32, "lse", q.device)
        if self._tokens == 0:
            return result
        held = q.detach().to(r.out)
        held = held if _aligned(held) else held.clone(memory_format=torch.contiguous_format)
        y = result if _aligned(result) else torch.empty_like(held)
        own = logs if logs is not None and logs.is_contiguous() else torch.empty(shape[:2], device=q.device)
        if self._pages != cache.pages:  # a page outside of the cache is no access outside of it
            self._indices.clamp_(0, cache.pages - 1)
            self._pages = cache.pages
        planes = (cache.planes["k.codes"], cache.planes["v.codes"])
        if logs is None:
            self._wrapper.run(held, planes, out=y)
        else:
            self._wrapper.run(held, planes, out=y, lse=own, return_lse=True, lse_base="ln")
            if own is not logs:
                logs.copy_(own)
        return y if y is result else result.copy_(y)

    def _hand_over(self, query_lens: Tensor, kv_lens: Tensor, indices: Tensor) -> None:
        r, page = self.request, self.request.kv.page
        if self._copied is not None:
            self._copied.synchronize()
        each = (kv_lens + page - 1) // page
        self._wrapper.plan(
            _starts(query_lens),
            _starts(each),
            indices,
            (kv_lens - 1).clamp(min=0) % page + 1,
            r.heads,
            r.kv.heads,
            r.kv.k_dim,
            page,
            causal=r.causal,
            sm_scale=r.scale,
            window_left=-1 if r.window is None else r.window - 1,
            logits_soft_cap=r.softcap,
            q_data_type=r.out,
            kv_data_type=r.out,
            o_data_type=r.out,
            seq_lens=kv_lens,
        )
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _plan_other(self) -> None:
        assert self._planned is not None
        if self._other is None:
            self._other = self._make()
        query_lens, kv_lens, table, on_device = self._planned
        self._other.plan(query_lens, kv_lens, table, kv_lens_device=on_device)


def _starts(lens: Tensor) -> Tensor:
    """int32 [B + 1]: where each begins, and the end."""
    return torch.cat([torch.zeros(1, dtype=torch.int32), lens.cumsum(0).to(torch.int32)])


def _aligned(t: Tensor) -> bool:
    """Whether every row is dense and begins at a multiple of 16 bytes."""
    size = t.element_size()
    starts = (t.data_ptr(), *(s * size for s in t.stride()[:-1]))
    return t.stride(-1) == 1 and all(at % _ALIGNED == 0 for at in starts)
