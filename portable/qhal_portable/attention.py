"""attention: one sequence after the other over its pages, all heads at once, in float64 (or `inner`).

s = scale * q.k, soft-capped; p = exp(s - max); o = (sum of p * v) / (sum of p, and of exp(sink - max)); one rounding.
q is quantized to request.q and every exp(s - max), rounded to fp32, to request.p before the product with v, as kernels
do; their sum is of the unrounded ones. Keys and values are the dequantizations of their codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, KVCache, Limits
from qhal.elements import WIDE, element
from qhal.encoding import encode
from qhal.errors import BatchError, FormatError
from qhal.formats import Format
from qhal.requests import AttentionRequest, KVRequest
from qhal_portable.kv import STATIC, read
from qhal_portable.rounding import round_once


class PagedBatch(AttentionBatch):
    """Lengths (on the processor) and pages (on the device) of one step, in buffers that keep their addresses."""

    def __init__(self, request: AttentionRequest, limits: Limits, device: torch.device) -> None:
        self.request, self.limits, self.sequences = request, limits, 0
        self.query_lens = torch.zeros(limits.batch, dtype=torch.int32, device="cpu")
        self.kv_bounds = torch.zeros(limits.batch, dtype=torch.int32, device="cpu")
        self.page_table = torch.zeros(limits.batch, limits.pages, dtype=torch.int64, device=device)
        self._device_lens: Tensor | None = None
        self._trees: list[Tensor | None] = []

    def plan(
        self,
        query_lens: Tensor,
        kv_lens: Tensor,
        page_table: Tensor,
        *,
        kv_lens_device: Tensor | None = None,
        tree: Tensor | None = None,
    ) -> None:
        """Checks everything against the limits, then copies."""
        count = query_lens.numel()
        need = check_plan(self.request, self.limits, query_lens, kv_lens, page_table, kv_lens_device)
        trees = self._split(tree, query_lens)
        self.sequences = count
        self._trees = trees
        self.query_lens[:count] = query_lens
        self.kv_bounds[:count] = kv_lens
        self.page_table[:count, :need] = page_table[:count, :need].to(torch.int64)
        self._device_lens = kv_lens_device

    def _split(self, tree: Tensor | None, query_lens: Tensor) -> list[Tensor | None]:
        """[q, q] of every sequence; None without trees."""
        lens = query_lens.tolist()
        check_tree(self.request, lens, tree)
        return [None] * len(lens) if tree is None else [part.clone() for part in check_roots(lens, tree)]

    def rows(self, pages: int) -> list[tuple[int, int, Tensor, Tensor | None]]:
        """(query length, key length, pages, tree) of every sequence; BatchError for pages outside the cache."""
        found = []
        for b in range(self.sequences):
            bound = int(self.kv_bounds[b])
            length = bound if self._device_lens is None else int(self._device_lens[b])
            if not 0 <= length <= bound:
                raise BatchError(f"sequence {b}: kv_lens_device says {length}, the bound on the host was {bound}")
            table = self.page_table[b, : -(-length // self.request.kv.page)]
            if table.numel() and (int(table.min()) < 0 or int(table.max()) >= pages):
                raise BatchError(f"sequence {b}: pages {table.tolist()}; the cache has 0 to {pages - 1}")
            found.append((int(self.query_lens[b]), length, table, self._trees[b]))
        return found


def check_plan(
    request: AttentionRequest,
    limits: Limits,
    query_lens: Tensor,
    kv_lens: Tensor,
    page_table: Tensor,
    kv_lens_device: Tensor | None,
) -> int:
    """The most pages that a sequence of this step needs; BatchError for what is past the limits."""
    count, page = query_lens.numel(), request.kv.page
    for name, t in (("kv_lens", kv_lens), ("kv_lens_device", kv_lens_device)):
        if t is not None and (t.dim() != 1 or t.numel() != count):
            raise BatchError(f"{name} has shape {tuple(t.shape)}, query_lens has {count} sequences")
    if page_table.dim() != 2 or page_table.shape[0] < count:
        raise BatchError(f"page_table has shape {tuple(page_table.shape)}, must be [{count}, pages]")
    if count > limits.batch:
        raise BatchError(f"{count} sequences, the batch was made for {limits.batch}")
    if count and (int(query_lens.min()) < 0 or int(kv_lens.min()) < 0):
        raise BatchError(f"negative lengths: query {query_lens.tolist()}, kv {kv_lens.tolist()}")
    if int(query_lens.sum()) > limits.tokens:
        raise BatchError(f"{int(query_lens.sum())} query tokens, the batch was made for {limits.tokens}")
    if request.phase == "decode" and count and int(query_lens.max()) > 1:
        raise BatchError(f"phase is decode, but a sequence has {int(query_lens.max())} query tokens")
    need = -(-int(kv_lens.max()) // page) if count else 0
    if need > min(limits.pages, page_table.shape[1]):
        raise BatchError(
            f"a sequence of {int(kv_lens.max())} tokens needs {need} pages of {page}; "
            f"the batch was made for {limits.pages}, the page table has {page_table.shape[1]}"
        )
    return need


def check_tree(request: AttentionRequest, lens: list[int], tree: Tensor | None) -> None:
    """BatchError unless the tree is there if it is asked for, and has an entry for every two tokens of a sequence."""
    if (tree is not None) != request.tree:
        given = "given" if tree is not None else "missing"
        raise BatchError(f"tree is {given}, the batch was made for a request with tree={request.tree}")
    needed = sum(n * n for n in lens)
    if tree is not None and (tree.dtype != torch.bool or tuple(tree.shape) != (needed,)):
        found = f"{tree.dtype} {tuple(tree.shape)}"
        raise BatchError(f"tree is {found}; {lens} query tokens need bool [{needed}], the sum of their squares")


def check_roots(lens: list[int], tree: Tensor) -> list[Tensor]:
    """[q, q] of every sequence; BatchError for a token that does not see itself. Reads the values."""
    parts = [part.reshape(n, n) for part, n in zip(tree.split([n * n for n in lens]), lens, strict=True)]
    for b, part in enumerate(parts):
        if not bool(part.diagonal().all()):
            blind = (~part.diagonal()).nonzero().flatten().tolist()
            raise BatchError(f"tree of sequence {b}: tokens {blind} do not see themselves; set their diagonal")
    return parts


def attend(
    q: Tensor,
    cache: KVCache,
    batch: PagedBatch,
    sinks: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    inner: torch.dtype = torch.float64,
) -> Tensor:
    """See QuantOps.attention. `sinks` join the denominator, so they are part of lse. inner: what it is computed in."""
    request, kv = batch.request, batch.request.kv
    if not same_cache(cache.request, kv):
        raise FormatError(f"the cache is {cache.request}, the batch was made for {kv}")
    rows = batch.rows(cache.pages)
    tokens = sum(queries for queries, _, _, _ in rows)
    mla = kv.kind == "mla"
    dim, wide = (kv.k_dim + kv.v_dim, kv.k_dim) if mla else (kv.k_dim, kv.v_dim)
    check_queries(q, request, sinks, tokens, dim)
    result = buffer(out, (tokens, request.heads, wide), request.out, "out", q.device)
    logs = None if lse is None else buffer(lse, (tokens, request.heads), torch.float32, "lse", q.device)
    q = _queries(q.detach(), request, cache)
    p_scale = None if request.p.plain else _static(cache, "p.scale", request.p)
    at = 0
    for queries, length, pages, tree in rows:
        k, v = read(cache, 0, pages, length), read(cache, 1, pages, length)
        if mla:  # one key-value head: keys are latent and rope together, values are the latent rows
            k, v = torch.cat([k, v], -1), k
        seen = visible(queries, length, request, q.device, tree)
        o, log = one_sequence(q[at : at + queries].to(inner), k.to(inner), v.to(inner), request, seen, sinks, p_scale)
        result[at : at + queries] = round_once(o, request.out)
        if logs is not None:
            logs[at : at + queries] = log
        at += queries
    return result


def one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: AttentionRequest,
    seen: Tensor,
    sinks: Tensor | None,
    p_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [t, H, D], k [L, G, D], v [L, G, Dv], all of one type -> o [t, H, Dv] and the natural log of the denominator.

    seen  bool [t, L]: which keys a query sees
    """
    (t, heads, dim), (length, groups, _) = q.shape, k.shape
    if length == 0:
        return q.new_zeros(t, heads, v.shape[-1]), q.new_full((t, heads), -torch.inf)
    share = heads // groups  # head h reads key-value head h // share
    s = torch.einsum("tgjd,lgd->gjtl", q.reshape(t, groups, share, dim), k) * request.scale
    if request.softcap is not None:
        s = request.softcap * torch.tanh(s / request.softcap)
    s = torch.where(seen, s, -torch.inf)
    top = s.amax(-1, keepdim=True)
    sink = None if sinks is None else sinks.to(q.dtype).reshape(groups, share, 1, 1)
    if sink is not None:
        top = torch.maximum(top, sink)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    o = _weighted(_weights(e, request.p, p_scale), v, seen) / total.permute(2, 0, 1, 3)
    o = torch.where(seen.any(-1)[:, None, None, None], o, 0.0)  # a row that sees no key is 0 / 0 until here
    log = torch.where(seen.any(-1)[:, None, None], (top + torch.log(total)).squeeze(-1).permute(2, 0, 1), -torch.inf)
    return o.reshape(t, heads, v.shape[-1]), log.reshape(t, heads)


def visible(t: int, length: int, request: AttentionRequest, device: torch.device, tree: Tensor | None = None) -> Tensor:
    """bool [t, L]: the last query stands at the last key (bottom right); a window ends with the query's own key.

    tree  bool [t, t] in place of the causal mask among the last t keys
    """
    position = torch.arange(length - t, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    if tree is not None:
        new = min(t, length)  # keys of new tokens that are in the cache
        return torch.cat(
            [torch.ones(t, length - new, dtype=torch.bool, device=device), tree[:, t - new :].to(device)], 1
        )
    seen = key <= position if request.causal else torch.ones(t, length, dtype=torch.bool, device=device)
    return seen if request.window is None else seen & (key > position - request.window)


def _queries(q: Tensor, request: AttentionRequest, cache: KVCache) -> Tensor:
    """float32 [T, H, D]: Q as the request holds it."""
    if request.q_rope is None:
        return _held(q, request.q, cache)
    latent = request.kv.k_dim
    parts = (_held(q[..., :latent], request.q, cache), _held(q[..., latent:], request.q_rope, cache))
    return torch.cat(parts, -1)


def _held(q: Tensor, fmt: Format, cache: KVCache) -> Tensor:
    if fmt.block is not None and fmt.block.kind in STATIC:
        zero = None if fmt.zero is None else _static(cache, "q.zero", fmt)
        return encode(q, fmt, scale=_static(cache, "q.scale", fmt), zero=zero).dequantize()
    outer = None if fmt.scale is None or fmt.scale.plain else _static(cache, "q.scale.scale", fmt)
    return encode(q.flatten(0, 1), fmt, scale=outer).dequantize().reshape(q.shape)


def _static(cache: KVCache, name: str, fmt: Format) -> Tensor:
    """The numbers of a static plane of Q or P, wide floats or whole numbers."""
    plane = cache.planes.get(name)
    if plane is None:
        raise FormatError(
            f"the cache has no plane {name} for {name[0]}={fmt}; make it from kv_planes(request, attention=[...])"
        )
    return plane.float()


def _weights(e: Tensor, p: Format, scale: Tensor | None) -> Tensor:
    """exp(s - max) as the product with v sees it, in the dtype of e."""
    if not p.plain:
        return encode(e.float(), p, scale=scale).dequantize().to(e.dtype)
    dtype = element(p.element).storage
    return e if dtype == torch.float32 else round_once(e, dtype).to(e.dtype)


def _weighted(p: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Sum over visible keys of p [G, J, t, L] * v [L, G, Dv] -> [t, G, J, Dv]. A hidden NaN or Inf stays hidden."""
    if bool(torch.isfinite(v).all()):
        return torch.einsum("gjtl,lgd->tgjd", p, v)
    rows = [torch.einsum("gjl,lgd->gjd", p[:, :, i, see], v[see]) for i, see in enumerate(seen)]
    return torch.stack(rows) if rows else v.new_zeros(0, v.shape[1], p.shape[1], v.shape[2])


def same_cache(a: KVRequest, b: KVRequest) -> bool:
    """Whether two requests describe the same planes; rules decide only how new codes are chosen."""
    sizes = [(r.kind, r.k.storage, r.v.storage, r.heads, r.k_dim, r.v_dim, r.page) for r in (a, b)]
    return sizes[0] == sizes[1]


def check_queries(q: Tensor, request: AttentionRequest, sinks: Tensor | None, tokens: int, dim: int) -> None:
    """FormatError unless q and sinks are what the request says; BatchError for another number of tokens."""
    if q.dtype not in WIDE.values() or q.dim() != 3 or tuple(q.shape[1:]) != (request.heads, dim):
        found = f"{q.dtype} {tuple(q.shape)}"
        raise FormatError(f"attention: q is {found}, must be bf16, fp16 or fp32 [T, {request.heads}, {dim}]")
    if q.shape[0] != tokens:
        found = f"attention: q has {q.shape[0]} tokens, the batch was planned with {tokens}"
        raise BatchError(f"{found}; call its plan() with the lengths of this step first")
    if (sinks is not None) != request.sinks:
        raise FormatError(f"attention: sinks {'given' if sinks is not None else 'missing'}, request: {request.sinks}")
    if sinks is not None and (sinks.dtype != torch.float32 or tuple(sinks.shape) != (request.heads,)):
        raise FormatError(f"attention: sinks are {sinks.dtype} {tuple(sinks.shape)}, must be fp32 [{request.heads}]")


def buffer(given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, name: str, device: torch.device) -> Tensor:
    """What was given, or a new tensor; FormatError for one of another shape or dtype."""
    if given is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if (tuple(given.shape), given.dtype) != (shape, dtype):
        raise FormatError(f"attention: {name} is {given.dtype} {tuple(given.shape)}, must be {dtype} {shape}")
    return given
