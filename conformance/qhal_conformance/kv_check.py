"""quant_kv: the right codes in the right slots, slot -1 skipped, everything else of the cache untouched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qhal.caches import KVCache
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import KVRequest, NumericsClass
from qhal_conformance import guards, mla_cases, paged
from qhal_conformance.cases import Case
from qhal_conformance.decode import to_numpy
from qhal_conformance.generator import I64, Stream, fingerprint
from qhal_conformance.outcome import FailKind, Outcome
from qhal_conformance.problem import DTYPES, Fault, claim, outcome, refusal
from qhal_conformance.remembering import remembered
from qhal_conformance.tolerance import Verdict

KV_DATA: dict[str, str] = {
    "scattered": "distinct slots in random pages, several skipped: slots that are taken as consecutive, neighbours",
    "positive": "a long prompt in consecutive slots over several pages, several skipped, all numbers of one sign",
    "skipped": "every slot is -1 and the rows are NaN: nothing may change",
    "limits": "rows of zeros and over the range of their type, in two calls: empty scales, saturation, narrower types",
    "single": "one token, which is the largest part of what a cache sees",
}

FORMATS: tuple[tuple[str, str], ...] = (
    ("bf16", "bf16"),
    ("e4m3fn.tensor*fp32", "e4m3fn.tensor*fp32"),
    ("e4m3fn.row*fp32", "e4m3fn.row*fp32"),
    ("int8.row*fp32", "int8.row*fp32"),
    ("int8.tensor*fp32", "e4m3fn.row*fp32"),
    ("int4.g32*fp16", "int4.g32*fp16"),
)
_REQUIRED = {"bf16", "e4m3fn.tensor*fp32", "e4m3fn.row*fp32", "int8.row*fp32"}


@dataclass(frozen=True)
class Problem:
    """Rows, the slots they go to, and the cache they go into."""

    request: KVRequest
    k: paged.Rows
    v: paged.Rows
    slots: I64
    pages: int
    inputs_sha: str


def cases(level: int) -> list[Case]:
    """Every cache format with every data set; level 1 adds sizes."""
    more = [(257, 8, 128, 16), (64, 1, 96, 64), (130, 4, 80, 32)] * (level > 0)
    first = {"scattered": (19, 2, 64, 16), "positive": (520, 8, 32, 64)}
    first |= {"skipped": (19, 2, 64, 16), "single": (1, 1, 128, 32), "limits": (21, 2, 64, 16)}
    found = []
    for number, (k, v) in enumerate(FORMATS):
        for i, data in enumerate(KV_DATA):
            for j, (tokens, heads, dim, page) in enumerate([first[data], *(more if data != "single" else [])]):
                shape = (("t", tokens), ("g", heads), ("d", dim), ("p", page))
                kind = ("bf16", "fp16")[(i + number + j) % 2] if k != "bf16" else "bf16"
                required = k == v and k in _REQUIRED
                found.append(
                    Case(
                        "quant_kv", k if k == v else f"{k}~{v}", shape, kind, data, 0,
                        guards.STORAGES[(i + number) % 3], (), "kv", int(j > 0), required,
                    )
                )  # fmt: skip
    return found


def request_of(case: Case) -> KVRequest:
    """What is asked of `supports`."""
    if mla_cases.is_mla(case):
        return mla_cases.kv_request(case)
    k, _, v = case.subject.partition("~")
    d = case.size("d")
    return KVRequest(
        kind="mha",
        k=Format.parse(k),
        v=Format.parse(v or k),
        heads=case.size("g"),
        k_dim=d,
        v_dim=d,
        page=case.size("p"),
    )


@remembered
def build(case: Case) -> Problem:
    """Inputs and expected codes; both follow from the case's id."""
    request = request_of(case)
    tokens, page = case.size("t"), case.size("p")
    first, second = paged.names(request)
    k = paged.rows(case.id, first, request.k, (tokens, request.heads, request.k_dim), case.out, case.data)
    v = paged.rows(case.id, second, request.v, (tokens, request.heads, request.v_dim), case.out, case.data)
    pages = -(-tokens // page) + 3
    g = Stream(case.id, "slots")
    if case.data == "scattered":
        slots = g.permutation(pages * page)[:tokens]
    else:  # as a prompt fills its pages, from somewhere inside the first
        slots = np.arange(tokens) + int(g.integers(1, page, (1,))[0])
    slots = np.where(np.arange(tokens) % 5 == 2, -1, slots)
    if case.data == "skipped":
        slots = np.full(tokens, -1, dtype=np.int64)
    return Problem(request, k, v, slots, pages, fingerprint({"k": k.x, "v": v.x, "slots": slots}))


def run(case: Case, ops: QuantOps) -> Outcome:
    """Fill a cache with a pattern, write, and compare every plane bit for bit with what must be there."""
    p = build(case)
    device, dtype = ops.device, DTYPES[case.out]
    granted = claim(ops, p.request)
    if granted is None:
        return refusal(ops, p.request, lambda: ops.kv_planes(p.request))
    cache = paged.allocate(ops, p.request, p.pages)
    paged.poison(cache, np.arange(0, p.pages, 2))
    before = _canonical_planes(ops, cache)
    inputs = []
    for r in (p.k, p.v):
        x = paged.given(r, p.request, dtype)
        skipped = torch.from_numpy(p.slots < 0)
        x[skipped] = float("nan")
        inputs.append(guards.place(x, case.storage, device))
    slots = torch.from_numpy(p.slots).to(torch.int32 if case.seed % 2 == 0 else torch.int64).to(device)
    kept = slots.clone()
    half = case.size("t") // 2 if case.data == "limits" else 0
    for part in (slice(0, half), slice(half, None)):
        if slots[part].numel():
            ops.quant_kv(inputs[0].view[part], inputs[1].view[part], cache, slots[part])
    ops.synchronize()
    if any(g.changed() for g in inputs) or not torch.equal(slots, kept):
        raise Fault(FailKind.INPUT_MUTATED, "quant_kv changed k, v or slots, or memory beside them")
    after = _canonical_planes(ops, cache)
    page = p.request.page
    use = p.slots >= 0
    first, second = paged.names(p.request)
    wanted = paged.expected_planes(first, p.request.k, p.k) | paged.expected_planes(second, p.request.v, p.v)
    compared = 0
    for name, plane in before.items():
        must = plane.copy()
        if name in wanted:
            must[p.slots[use] // page, p.slots[use] % page] = wanted[name][use].reshape(-1, *plane.shape[2:])
        compared += must.size
        wrong = must.view(np.uint8) != after[name].view(np.uint8)
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            where = "a slot that was not written" if not _written(place, p, page) else "a written slot"
            raise Fault(FailKind.EXACT, f"{name}: {int(wrong.sum())} bytes differ, first at {place}, {where}")
    return outcome(Verdict(None, "", None, 0.0), NumericsClass.EXACT, compared, granted.support)


def _written(place: tuple[int, ...], p: Problem, page: int) -> bool:
    return len(place) > 1 and bool(np.any(p.slots == place[0] * page + place[1]))


def _canonical_planes(ops: QuantOps, cache: KVCache) -> dict[str, np.ndarray]:
    back = cache if cache.layout == "canonical" else ops.restore(cache)
    if not isinstance(back, KVCache):
        raise Fault(FailKind.RETURN, f"restore returned {type(back).__name__}, must be a KVCache")
    return {name: to_numpy(plane).copy() for name, plane in back.planes.items()}
