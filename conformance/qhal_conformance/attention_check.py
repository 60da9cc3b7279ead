"""attention over a paged cache: values within a computed bound, families that are exact, what must not be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qhal.caches import KVCache, Limits
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import AttentionRequest, KVRequest, NumericsClass
from qhal.tensors import same_bits
from qhal_conformance import elements, encode, guards, mla_cases, paged
from qhal_conformance.attention_cases import LENS
from qhal_conformance.attention_reference import Attended, Tree, attend
from qhal_conformance.cases import Case
from qhal_conformance.decode import decode, numbers
from qhal_conformance.elements import round_wide
from qhal_conformance.generator import F32, Stream, fingerprint
from qhal_conformance.outcome import FailKind, Outcome
from qhal_conformance.problem import DTYPES, Fault, claim, outcome, refusal, well_formed
from qhal_conformance.remembering import remembered
from qhal_conformance.tolerance import Verdict, compare


@dataclass(frozen=True)
class Problem:
    """Queries, keys, values and where they live; sequences by length.

    q, held  as they are given, and as the request's format holds them
    k, v     the two rows that `quant_kv` writes (MLA: latent and rope)
    keys, values  what they are worth, [T, G, D]
    static   the static planes of Q and P
    trees    per sequence, None without trees
    """

    request: AttentionRequest
    q: F32
    held: F32
    static: dict[str, F32]
    trees: tuple[Tree | None, ...]
    query_lens: tuple[int, ...]
    k: paged.Rows
    v: paged.Rows
    keys: F32
    values: F32
    pages: paged.Pages
    sinks: F32 | None
    inputs_sha: str

    def expected(self, numerics: NumericsClass, out: str) -> Attended:
        """The reference and its bounds under one class."""
        sequences, at = [], 0
        for count, length, tree in zip(self.query_lens, self.pages.lens, self.trees, strict=True):
            sequences.append((count, self.keys[at : at + length], self.values[at : at + length], tree))
            at += length
        return attend(self.held, sequences, self.request, numerics, out, self.sinks, self.static.get("p.scale"))


def request_of(case: Case) -> AttentionRequest:
    """What is asked of `supports`."""
    if mla_cases.is_mla(case):
        kv, scale = mla_cases.kv_request(case), mla_cases.scale(case)
    else:
        d, f = case.size("d"), Format.parse(case.subject)
        kv = KVRequest(kind="mha", k=f, v=f, heads=case.size("g"), k_dim=d, v_dim=d, page=case.size("p"))
        scale = d**-0.5
    phase, _ = LENS[case.size("l")]
    declared = dict(option.split("=", 1) for option in case.options if "=" in option)
    return AttentionRequest(
        kv=kv,
        heads=case.size("h"),
        scale=float(declared.get("scale", scale)),
        phase=phase,
        q=Format.parse(declared.get("q", case.out)),
        p=Format.parse("fp32" if case.has("p32") else declared.get("p", case.out)),
        out=DTYPES[case.out],
        causal=not case.has("full"),
        window=9 if case.has("window") else None,
        softcap=5.0 if case.has("softcap") else None,
        sinks=case.has("sinks"),
        lse=case.has("lse"),
        tree=case.has("tree"),
        q_rope=Format.parse(declared["q_rope"]) if "q_rope" in declared else None,
    )


@remembered
def build(case: Case) -> Problem:
    """Inputs and cache contents; both follow from the case's id."""
    request = request_of(case)
    _, lens = LENS[case.size("l")]
    query_lens, kv_lens = tuple(a for a, _ in lens), tuple(b for _, b in lens)
    tokens, keys = sum(query_lens), sum(kv_lens)
    kv = request.kv
    data = "positive" if case.data == "positive" else "normal"
    first, second = paged.names(kv)
    k = paged.rows(case.id, first, kv.k, (keys, kv.heads, kv.k_dim), case.out, data)
    v = paged.rows(case.id, second, kv.v, (keys, kv.heads, kv.v_dim), case.out, data)
    worth = (k.value, v.value)
    if kv.kind == "mla":  # keys are both rows together, values the latent ones
        worth = (np.concatenate([k.value, v.value], axis=-1), k.value)
    q = Stream(case.id, "q").normal((tokens, request.heads, worth[0].shape[-1]))
    if case.data == "uniform":
        q = np.zeros_like(q)
    elif case.data in ("dominant", "saturated"):
        q = _dominant(q, query_lens, kv_lens, worth[0], request)
    q = round_wide(case.out, q)
    sinks = Stream(case.id, "sinks").normal((request.heads,)) if request.sinks else None
    pages = paged.scatter(case.id, kv_lens, kv.page, width=max(-(-n // kv.page) for n in kv_lens) + 1)
    arrays: dict[str, npt.NDArray[Any]] = {"q": q, "k": k.x, "v": v.x, "slots": pages.slots, "table": pages.table}
    static = _static(case, request)
    trees = tuple(_tree(case, b, n) if request.tree else None for b, n in enumerate(query_lens))
    arrays |= static | {f"tree{b}": tree for b, tree in enumerate(trees) if tree is not None}
    held = _held(q, request, static.get("q.scale"))
    return Problem(request, q, held, static, trees, query_lens, k, v, *worth, pages, sinks, fingerprint(arrays))


def _static(case: Case, request: AttentionRequest) -> dict[str, F32]:
    """Static scales of Q (a different one per head) and of P (1 / largest code, or three quarters of it)."""
    found: dict[str, F32] = {}
    block = request.q.block
    if block is not None and block.kind in ("tensor", "head"):
        heads = np.arange(request.heads if block.kind == "head" else 1)
        found["q.scale"] = (paged.STATIC_SCALE * (1 + heads / 8)).astype(np.float32)
    if not request.p.plain:
        share = 0.75 if case.data == "saturated" else 1.0
        found["p.scale"] = np.array([share / elements.largest(request.p.element)], np.float32)
    return found


def _held(q: F32, request: AttentionRequest, scale: F32 | None) -> F32:
    """Q as the request's format holds it, by the suite's own rule: (token, head) rows."""
    if request.q_rope is not None:
        latent = request.kv.k_dim
        parts = ((q[..., :latent], request.q, scale), (q[..., latent:], request.q_rope, None))
        return np.concatenate([_rows_held(*part) for part in parts], axis=-1)
    return _rows_held(q, request.q, scale)


def _rows_held(q: F32, f: Format, scale: F32 | None) -> F32:
    if f.plain:
        return round_wide(f.element, q)
    static = scale if scale is None or scale.size == 1 else np.tile(scale, q.shape[0])
    return decode(encode.quantize(q.reshape(-1, q.shape[-1]), f, scale=static)).value.reshape(q.shape)


def _tree(case: Case, sequence: int, tokens: int) -> Tree:
    """[q, q]: every token has an earlier one or none as its parent, and sees its ancestors and itself."""
    tree = np.eye(tokens, dtype=np.bool_)
    draws = Stream(case.id, f"tree{sequence}").integers(0, 1 << 20, (tokens,))
    for i in range(tokens):
        parent = int(draws[i] % (i + 1)) - 1
        if parent >= 0:
            tree[i] |= tree[parent]
    return tree


def _dominant(q: F32, query_lens: tuple[int, ...], kv_lens: tuple[int, ...], k: F32, request: AttentionRequest) -> F32:
    """Each query is 64 times one visible key of its own head: softmax is 1 there and 0 elsewhere."""
    share = request.heads // request.kv.heads
    q = q.copy()
    token = key = 0
    for count, length in zip(query_lens, kv_lens, strict=True):
        for i in range(count if length else 0):
            last = length - count + i
            for h in range(request.heads):
                q[token + i, h] = 64 * k[key + max(last - h % 5, 0), h // share]
        token, key = token + count, key + length
    return q


def run(case: Case, ops: QuantOps) -> Outcome:
    """Write the cache through quant_kv, attend, compare; then relabel every page and attend again, bit for bit."""
    p = build(case)
    granted = claim(ops, p.request)
    limits = Limits(len(p.query_lens), sum(p.query_lens), p.pages.table.shape[1])
    if granted is None:
        return refusal(ops, p.request, lambda: ops.attention_batch(p.request, limits))
    cache = filled(ops, p, case)
    got, lse = _attend(case, ops, p, cache, p.pages.table, limits)
    expected = p.expected(granted.numerics, case.out)
    verdict = compare(numbers(got).astype(np.float64), expected.o, expected.o_bound, case.out)
    if verdict.kind is None and lse is not None:
        inner = compare(numbers(lse).astype(np.float64), expected.lse, expected.lse_bound, "fp32")
        if inner.kind is not None:
            verdict = Verdict(inner.kind, f"lse: {inner.detail}", inner.worst, inner.headroom)
    if verdict.kind is None and case.data == "relabel":
        moved, table = _relabelled(case, cache, p.pages)
        again, _ = _attend(case, ops, p, moved, table, limits)
        if not same_bits(got, again):
            verdict = Verdict(FailKind.EXACT, "the result depends on which pages the tokens lie in", None, 0.0)
    return outcome(verdict, granted.numerics, expected.o.size, granted.support)


def filled(ops: QuantOps, p: Problem, case: Case) -> KVCache:
    """A cache that holds the sequences and is poisoned everywhere else."""
    device, dtype = ops.device, DTYPES[case.out]
    cache = paged.allocate(ops, p.request.kv, p.pages.count, (p.request,))
    paged.poison(cache, np.arange(p.pages.count))
    slots = torch.from_numpy(p.pages.slots).to(device)
    k, v = (paged.given(r, p.request.kv, dtype).to(device) for r in (p.k, p.v))
    for name, value in p.static.items():
        cache.set_static(name, torch.from_numpy(value).to(device))
    if slots.numel():
        ops.quant_kv(k, v, cache, slots)
    ops.synchronize()
    return cache


def _attend(
    case: Case,
    ops: QuantOps,
    p: Problem,
    cache: KVCache,
    table: np.ndarray,
    limits: Limits,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    device, dtype = ops.device, DTYPES[case.out]
    batch = ops.attention_batch(p.request, limits)
    lens = [torch.tensor(n, dtype=torch.int32) for n in (p.query_lens, p.pages.lens)]
    trees = [torch.from_numpy(tree.reshape(-1)) for tree in p.trees if tree is not None]
    tree = torch.cat(trees).to(device) if p.request.tree else None
    pages = torch.from_numpy(np.ascontiguousarray(table)).to(device)
    exact = None
    if case.has("devlens"):  # the host knows upper bounds only: the lengths that count stand on the device
        exact, lens[1] = lens[1].to(device), torch.full_like(lens[1], table.shape[1] * p.request.kv.page)
    batch.plan(lens[0], lens[1], pages, kv_lens_device=exact, tree=tree)
    guard = guards.place(torch.from_numpy(p.q).to(dtype), case.storage, device)
    shape = (*p.q.shape[:2], p.values.shape[-1])
    target = guards.poisoned(shape, dtype, "contiguous", device)
    lse = torch.full(shape[:2], float("nan"), device=device) if p.request.lse else None
    sinks = None if p.sinks is None else torch.from_numpy(p.sinks).to(device)
    before = guards.snapshot(cache.planes)
    first = well_formed(ops.attention(guard.view, cache, batch, sinks=sinks), "attention", shape, dtype, device).clone()
    result = ops.attention(guard.view, cache, batch, sinks=sinks, out=target.view, lse=lse)
    ops.synchronize()
    well_formed(result, "attention(out=)", shape, dtype, device)
    if guard.changed() or guards.differing(before, cache.planes):
        raise Fault(FailKind.INPUT_MUTATED, "attention changed q, the cache, or memory beside q")
    if target.touched_outside():
        raise Fault(FailKind.OOB, "attention wrote beside out=")
    if result.data_ptr() != target.view.data_ptr():
        raise Fault(FailKind.OUT_IGNORED, "attention must write out= and return it")
    if ops.supports(p.request).deterministic and not same_bits(first, target.view.clone()):
        raise Fault(FailKind.NONDETERMINISTIC, "two calls differ, but supports declares deterministic")
    return target.view.clone(), lse


def _relabelled(case: Case, cache: KVCache, pages: paged.Pages) -> tuple[KVCache, np.ndarray]:
    """The same tokens in other pages: axis 0 of every paged plane permuted, the table renamed."""
    order = Stream(case.id, "relabel").permutation(pages.count)
    index = torch.from_numpy(order)
    planes = {}
    for name, plane in cache.planes.items():
        if plane.dim() > 1 and plane.shape[0] == pages.count:
            raw = plane.contiguous().view(torch.uint8) if plane.element_size() == 1 else plane
            planes[name] = raw[index.to(plane.device)].view(plane.dtype)
        else:
            planes[name] = plane
    where = np.argsort(order).astype(np.int32)
    return KVCache(cache.request, planes, cache.layout, dict(cache.host)), where[pages.table]
