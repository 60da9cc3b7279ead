"""Attention over paged caches: decode with 32 / 8 heads of 128, prefill, and MLA with 128 heads, against FlashInfer.

FlashInfer's decode kernels (fa2, xqa) sum the rounded weights in the denominator, xqa rounds Q to fp8 when the cache
is fp8, and MLA (fa3) keeps split results in 16 bits: looser than the contract, so those rows are shown, not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cuda_rows.bench import Bench, Call, Group, Measured, copies
from qhal.caches import KVCache, Limits
from qhal.formats import Format
from qhal.requests import AttentionRequest, KVRequest

HEADS, GROUPS_KV, DIM, PAGE = 32, 8, 128, 16
SHAPES = ((1, 32768), (16, 8192), (128, 2048))
CACHES = {
    "bf16": "bf16",
    "fp8": "e4m3fn.tensor*fp32",
    "fp8-row": "e4m3fn.row*fp32",
    "int8-row": "int8.row*fp32",
    "nvfp4": "e2m1.g16*(e4m3fn.tensor*fp32)",
}
_FA2 = "the denominator sums rounded weights"
_LOOSER = {"flashinfer fa2": _FA2, "flashinfer xqa": "Q rounded to fp8 over an fp8 cache; denominator not read"}
PLAIN = Format("bf16")


def _request(kv: KVRequest, heads: int, scale: float, phase: str, *, graph: bool) -> AttentionRequest:
    return AttentionRequest(
        kv=kv, heads=heads, scale=scale, phase=phase, q=PLAIN, p=PLAIN, out=torch.bfloat16, graph=graph
    )  # type: ignore[arg-type]


def _cache(bench: Bench, request: AttentionRequest, pages: int) -> KVCache:
    """Random codes, computed scales near 0.01; the canonical planes where our operations refuse the request."""
    layout, planes = "canonical", None
    if bench.ops.supports(request):
        layout, planes = bench.ops.kv_planes(request.kv, attention=[request])
    cache = KVCache.allocate(request.kv, pages, bench.device, planes=planes, layout=layout)
    for name in cache.planes.keys() - cache.static:
        t = cache.planes[name]
        if t.dtype in (torch.int8, torch.uint8):
            t.random_(0, 100)
        else:
            low, wide = (-0.5, 1.0) if name in ("k.codes", "v.codes", "latent.codes", "rope.codes") else (0.01, 0.01)
            t.copy_((torch.rand(t.shape, device=t.device, dtype=torch.bfloat16) * wide + low).to(t.dtype))
    return cache


def _lengths(batch: int, length: int, queries: int, page: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    each = -(-length // page)
    table = torch.randperm(batch * each, generator=torch.Generator().manual_seed(0)).int().reshape(batch, each)
    return (torch.full((batch,), queries, dtype=torch.int32), torch.full((batch,), length, dtype=torch.int32),
            table.to(device))  # fmt: skip


def decode(name: str, bench: Bench, wanted: Sequence[str]) -> Iterator[Measured]:
    """One new token per sequence."""
    fmt = Format.parse(CACHES[name])
    for batch, length in SHAPES:
        row = f"decode-{name}/b{batch}/l{length}"
        if row not in wanted:
            continue
        kv = KVRequest(kind="mha", k=fmt, v=fmt, heads=GROUPS_KV, k_dim=DIM, v_dim=DIM, page=PAGE)
        request = _request(kv, HEADS, DIM**-0.5, "decode", graph=True)
        answer = bench.ops.supports(request)
        nbytes = int(2 * batch * length * GROUPS_KV * DIM * fmt.bits / 8)
        lens = _lengths(batch, length, 1, PAGE, bench.device)
        q = torch.randn(batch, HEADS, DIM, device=bench.device, dtype=torch.bfloat16)
        pages = batch * -(-length // PAGE)
        caches = [_cache(bench, request, pages) for _ in range(copies(nbytes))] if answer and answer.graph else []

        def ours(request: Any = request, lens: Any = lens, q: Tensor = q, caches: Any = caches) -> list[Call]:
            planned = bench.ops.attention_batch(request, Limits(len(q), len(q), lens[2].shape[1]))
            planned.plan(*lens)
            return [partial(bench.ops.attention, q, c, planned) for c in caches]

        us, note = bench.ours(answer, ours)
        planes = [c.planes for c in caches] or [
            {f"{r}.codes": torch.zeros(pages, PAGE, GROUPS_KV, DIM, device=bench.device, dtype=torch.bfloat16)
             for r in "kv"}
        ] * copies(nbytes)  # fmt: skip
        peers = {}
        if name in ("bf16", "fp8"):
            peers = {
                "flashinfer fa2": lambda q=q, planes=planes, lens=lens: _fa2(q, planes, lens),
                "flashinfer xqa": lambda q=q, planes=planes, lens=lens: _xqa(q, planes, lens),
            }
        yield Measured(
            row, us, answer.executes, answer.numerics.label if answer.numerics is not None else "",
            bench.peers(peers), dict(_LOOSER) if peers else {},
            bench.floor(nbytes, 4.0 * batch * length * HEADS * DIM, "bf16"), nbytes, note=note,
        )  # fmt: skip


def _csr(lens: tuple[Tensor, Tensor, Tensor], page: int) -> tuple[Tensor, Tensor, Tensor]:
    _, keys, table = lens
    each = (keys + page - 1) // page
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), each.cumsum(0).int()])
    return indptr, table.reshape(-1), ((keys - 1) % page + 1).int()


def _fa2(q: Tensor, planes: Sequence[dict[str, Tensor]], lens: tuple[Tensor, Tensor, Tensor]) -> list[Call]:
    import flashinfer

    indptr, indices, last = _csr(lens, PAGE)
    space = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    on = q.device
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        space, "NHD", use_cuda_graph=True, use_tensor_cores=True, paged_kv_indptr_buffer=indptr.to(on),
        paged_kv_indices_buffer=indices.clone(), paged_kv_last_page_len_buffer=last.to(on), backend="fa2",
    )  # fmt: skip
    kind = planes[0]["k.codes"].dtype
    wrapper.plan(indptr, indices, last, HEADS, GROUPS_KV, DIM, PAGE, q_data_type=q.dtype, kv_data_type=kind)
    scales = {} if kind == torch.bfloat16 else {"k_scale": 1.0, "v_scale": 1.0}
    return [partial(wrapper.run, q, (p["k.codes"], p["v.codes"]), **scales) for p in planes]


def _xqa(q: Tensor, planes: Sequence[dict[str, Tensor]], lens: tuple[Tensor, Tensor, Tensor]) -> list[Call]:
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    space = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    keys = lens[1].to(q.device)
    how = {"bmm1_scale": DIM**-0.5, "bmm2_scale": 1.0, "kv_layout": "NHD"}
    most = int(lens[1].max())
    return [
        partial(
            xqa_batch_decode_with_kv_cache, q, (p["k.codes"], p["v.codes"]), space, lens[2], keys, most, **how
        )
        for p in planes
    ]  # fmt: skip


def prefill(bench: Bench, wanted: Sequence[str]) -> Iterator[Measured]:
    """Causal prefill of 4 x 4096 tokens over a bf16 cache; not in a graph for the library, so eager for both."""
    row, batch, length = "prefill-bf16/b4/l4096", 4, 4096
    kv = KVRequest(kind="mha", k=PLAIN, v=PLAIN, heads=GROUPS_KV, k_dim=DIM, v_dim=DIM, page=PAGE)
    request = _request(kv, HEADS, DIM**-0.5, "prefill", graph=False)
    answer = bench.ops.supports(request)
    lens = _lengths(batch, length, length, PAGE, bench.device)
    q = torch.randn(batch * length, HEADS, DIM, device=bench.device, dtype=torch.bfloat16)
    cache = _cache(bench, request, lens[2].numel())

    def ours() -> list[Call]:
        planned = bench.ops.attention_batch(request, Limits(batch, len(q), lens[2].shape[1]))
        planned.plan(*lens)
        return [partial(bench.ops.attention, q, cache, planned)]

    def library() -> list[Call]:
        return [partial(_fa3(lens, length).run, q, (cache.planes["k.codes"], cache.planes["v.codes"]))]

    us, note = (None, f"no kernel: {answer.executes}") if answer.level != "full" else _timed(bench, ours)
    yield Measured(
        row, us, answer.executes, answer.numerics.label if answer.numerics is not None else "",
        bench.peers({"flashinfer fa3": library}),
        floor_us=bench.floor(0, 2.0 * batch * length * length * HEADS * DIM, "bf16"), note=note,
    )  # fmt: skip


def _fa3(lens: tuple[Tensor, Tensor, Tensor], length: int) -> Any:
    """The library's prefill wrapper, planned."""
    import flashinfer

    indptr, indices, last = _csr(lens, PAGE)
    starts = torch.arange(len(lens[0]) + 1, dtype=torch.int32) * length
    space = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend="fa3")
    wrapper.plan(
        starts, indptr, indices, last, HEADS, GROUPS_KV, DIM, PAGE, causal=True, sm_scale=DIM**-0.5,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    return wrapper


def _warm_prefill() -> object:
    return _fa3(_lengths(1, PAGE, PAGE, PAGE, torch.device("cuda")), PAGE)


def _timed(bench: Bench, make: Any) -> tuple[float | None, str]:
    try:
        return bench.time(make()), ""
    except Exception as error:
        return None, f"failed: {error}"


MLA_SHAPES = ((1, 32768), (32, 4096), (128, 4096))
MLA_HEADS, LATENT, ROPE, MLA_PAGE = 128, 512, 64, 64


def mla(name: str, bench: Bench, wanted: Sequence[str]) -> Iterator[Measured]:
    """Decode over latent rows; rope rows in bf16 beside an fp8 latent."""
    fmt = Format.parse(CACHES[name])
    for batch, length in MLA_SHAPES:
        row = f"mla-{name}/b{batch}/l{length}"
        if row not in wanted:
            continue
        kv = KVRequest(kind="mla", k=fmt, v=PLAIN, heads=1, k_dim=LATENT, v_dim=ROPE, page=MLA_PAGE)
        request = _request(kv, MLA_HEADS, (128 + 64) ** -0.5, "decode", graph=True)
        answer = bench.ops.supports(request)
        nbytes = int(batch * length * (LATENT * fmt.bits + ROPE * 16) / 8)
        lens = _lengths(batch, length, 1, MLA_PAGE, bench.device)
        q = torch.randn(batch, MLA_HEADS, LATENT + ROPE, device=bench.device, dtype=torch.bfloat16)
        caches = [_cache(bench, request, lens[2].numel()) for _ in range(copies(nbytes))]

        def ours(request: Any = request, lens: Any = lens, q: Tensor = q, caches: Any = caches) -> list[Call]:
            planned = bench.ops.attention_batch(request, Limits(len(q), len(q), lens[2].shape[1]))
            planned.plan(*lens)
            return [partial(bench.ops.attention, q, c, planned) for c in caches]

        us, note = bench.ours(answer, ours)
        peers = {"flashinfer fa3": partial(_mla, q, caches, lens)} if name == "bf16" else {}
        yield Measured(
            row, us, answer.executes, answer.numerics.label if answer.numerics is not None else "",
            bench.peers(peers), {"flashinfer fa3": "split results kept in 16 bits"} if peers else {},
            bench.floor(nbytes, 2.0 * batch * MLA_HEADS * length * (2 * LATENT + ROPE), "bf16"), nbytes, note=note,
        )  # fmt: skip


def _mla(q: Tensor, caches: Sequence[KVCache], lens: tuple[Tensor, Tensor, Tensor]) -> list[Call]:
    import flashinfer

    indptr, indices, _ = _csr(lens, MLA_PAGE)
    on, batch = q.device, len(lens[1])
    starts = torch.arange(batch + 1, dtype=torch.int32)
    space = torch.zeros(256 << 20, dtype=torch.uint8, device=on)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(
        space, use_cuda_graph=True, qo_indptr=starts.to(on), kv_indptr=indptr.to(on), kv_indices=indices.clone(),
        kv_len_arr=lens[1].to(on), backend="fa3",
    )  # fmt: skip
    wrapper.plan(
        starts.to(on), indptr.to(on), indices, lens[1].to(on), MLA_HEADS, LATENT, ROPE, MLA_PAGE, True,
        (128 + 64) ** -0.5, q.dtype, q.dtype,
    )  # fmt: skip
    nope, rope = q[..., :LATENT].contiguous(), q[..., LATENT:].contiguous()
    return [partial(wrapper.run, nope, rope, c.planes["latent.codes"], c.planes["rope.codes"]) for c in caches]


def _warm_mla() -> object:
    kv = KVRequest(kind="mla", k=PLAIN, v=PLAIN, heads=1, k_dim=LATENT, v_dim=ROPE, page=MLA_PAGE)
    q = torch.zeros(1, MLA_HEADS, LATENT + ROPE, device="cuda", dtype=torch.bfloat16)
    return _mla(q, [KVCache.allocate(kv, 1, "cuda")], _lengths(1, MLA_PAGE, 1, MLA_PAGE, q.device))[0]()


def _small(name: str, library: Any) -> object:
    """A call over one page: compiles the library's kernel."""
    on, kind = torch.device("cuda"), torch.bfloat16 if name == "bf16" else torch.float8_e4m3fn
    planes = [{f"{r}.codes": torch.zeros(1, PAGE, GROUPS_KV, DIM, device=on, dtype=kind) for r in "kv"}]
    q = torch.zeros(1, HEADS, DIM, device=on, dtype=torch.bfloat16)
    return library(q, planes, _lengths(1, PAGE, 1, PAGE, on))[0]()


def _warm(name: str) -> dict[str, Any]:
    if name not in ("bf16", "fp8"):
        return {}
    return {"flashinfer fa2": partial(_small, name, _fa2), "flashinfer xqa": partial(_small, name, _xqa)}


GROUPS = (
    *(Group(tuple(f"decode-{n}/b{b}/l{s}" for b, s in SHAPES), partial(decode, n), _warm(n)) for n in CACHES),
    Group(("prefill-bf16/b4/l4096",), prefill, {"flashinfer fa3": _warm_prefill}),
    *(
        Group(
            tuple(f"mla-{n}/b{b}/l{s}" for b, s in MLA_SHAPES),
            partial(mla, n),
            {"flashinfer fa3": _warm_mla} if n == "bf16" else {},
        )
        for n in ("bf16", "fp8", "fp8-row")
    ),
)
