"""Rules about answers: total and pure, true both ways for every operation; foreign objects and wrong shapes refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, Limits
from qhal.errors import QhalError, UnsupportedError
from qhal.formats import Format
from qhal.groups import Offsets
from qhal.interface import Codec, QuantOps
from qhal.layer_formats import Activation
from qhal.prepared import Prepared
from qhal.requests import (
    AttentionRequest,
    CommRequest,
    GroupedRequest,
    HadamardRequest,
    KVRequest,
    QuantizeRequest,
    Request,
    Support,
    VQRequest,
)
from qhal.rotations import Hadamard, kinds
from qhal.tensors import QTensor
from qhal_conformance import attention_check, datasets
from qhal_conformance.cases import Case
from qhal_conformance.contract_calls import (
    ATTENTION_SHAPE,
    activation,
    bound,
    calls,
    codebook_weight,
    gemm_request,
    must_raise,
)
from qhal_conformance.outcome import FailKind
from qhal_conformance.problem import Fault, first_line

_ODD = ("int3.g48*bf16", "lut4.row*fp16", "q4_k", "mxfp4_dual", "e5m2fnuz.col*bf16", "uint8-uint8.head*fp16", "e8m0")
Asked = tuple[Request, Callable[[], object] | None]


def _asked(case: Case, ops: QuantOps) -> Iterator[Asked]:
    """Requests of every operation that few backends execute, and the call that each stands for."""
    for make in (_gemms, _quantizes, _groupeds, _caches, _hadamards, _others):
        yield from make(case, ops)


def _gemms(case: Case, ops: QuantOps) -> Iterator[Asked]:
    plain = gemm_request(case, "int4.g32*bf16")
    requests = [gemm_request(case, name) for name in _ODD]
    requests += [replace(plain, graph=True), replace(plain, k=31, n=1), replace(plain, out=torch.int32)]
    for request in requests:
        w = odd_weight(str(request.w), request.n, request.k).to(ops.device)
        yield request, bound(ops.prepare, w, request)


def _quantizes(case: Case, ops: QuantOps) -> Iterator[Asked]:
    for name in _ODD:
        x = torch.ones(48, 64, dtype=torch.bfloat16, device=ops.device)
        yield QuantizeRequest(x=x.dtype, format=Format.parse(name)), bound(ops.quantize, x, Format.parse(name))
    yield QuantizeRequest(x=torch.int64, format=Format.parse("int8")), None


def _groupeds(case: Case, ops: QuantOps) -> Iterator[Asked]:
    unknown: Any = "no such function"
    odd: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("int3.g48*bf16", "offsets", {}),
        ("int4.g32*bf16", "masked", {"activation": Activation(unknown)}),
        ("int4.g32*bf16", "indexed", {"quantize": Format.parse("q4_k")}),
        ("int4.g32*bf16", "sorted", {}),
    )
    for name, form, changes in odd:
        gemm = gemm_request(case, name)
        request = GroupedRequest(gemm=gemm, experts=2, groups=form, **changes)
        stack = QTensor.stack([odd_weight(name, gemm.n, gemm.k, f"odd{e}") for e in range(2)]).to(ops.device)
        yield request, bound(ops.prepare, stack, request)


def _caches(case: Case, ops: QuantOps) -> Iterator[Asked]:
    for name in ("int8.128x128*fp32", "int3.row*fp32", "lut4.row*fp16", "q4_k"):
        f = Format.parse(name)
        request = KVRequest(kind="mha", k=f, v=f, heads=2, k_dim=64, v_dim=64, page=16)
        yield request, bound(ops.kv_planes, request)
    plain = _attention("bf16")
    for odd in (
        replace(plain, graph=True),
        replace(plain, heads=5),
        replace(plain, tree=True, window=9),
        replace(plain, p=Format.parse("int8")),
        replace(plain, q=Format.parse("int8.128x128*fp32")),
        replace(plain, out=torch.int32),
    ):
        yield odd, bound(ops.attention_batch, odd, Limits(2, 2, 2))


def _hadamards(case: Case, ops: QuantOps) -> Iterator[Asked]:
    x = activation(case, ops)
    for order, n, quantize in ((64, 96, None), (64, 256, "q4_k"), (256, 128, None)):
        chain = [Hadamard(order)]
        q = None if quantize is None else Format.parse(quantize)
        request = HadamardRequest(kinds=kinds(chain), n=n, x=x.dtype, quantize=q)
        yield request, bound(ops.prepare, chain, request)


def _others(case: Case, ops: QuantOps) -> Iterator[Asked]:
    w = codebook_weight(case, ops.device)
    request = VQRequest(w=w.format, n=16, k=64, out=torch.int32)
    yield request, bound(ops.prepare, w, request)
    codec = Codec(Format.parse("int8.g128*fp16"))
    for x in (torch.half, torch.int32):  # a collective needs its ranks: only the answer is looked at
        yield CommRequest(collective="all_reduce", codec=codec, world=8, x=x, numel=7), None


@lru_cache(maxsize=64)
def odd_weight(name: str, n: int, k: int, tag: str = "odd") -> QTensor:
    """A weight of a format that few backends know."""
    return datasets.weight("contract", tag, Format.parse(name), n, k, "normal")


def _attention(subject: str) -> AttentionRequest:
    return attention_check.request_of(Case("attention", subject, ATTENTION_SHAPE, "bf16", "normal"))


def supports_is_total(case: Case, ops: QuantOps) -> int:
    """supports answers every request, the same twice and on the meta device; never raises; refusals have reasons."""
    requests = [request for request, _ in _asked(case, ops)]
    first = [_answer(ops, request) for request in requests]
    with torch.device("meta"):
        again = [_answer(ops, request) for request in reversed(requests)][::-1]
    for request, one, two in zip(requests, first, again, strict=True):
        if one != two:
            raise Fault(FailKind.CLAIM, f"supports({request}) answered {one} and then {two}")
    return len(requests)


def _answer(ops: QuantOps, request: Request) -> Support:
    try:
        answer = ops.supports(request)
    except Exception as error:
        raise Fault(FailKind.CLAIM, f"supports({request}) raised {type(error).__name__}") from error
    if not isinstance(answer, Support):
        raise Fault(FailKind.CLAIM, f"supports({request}) returned {type(answer).__name__}, must be a Support")
    if not answer and not answer.reason:
        raise Fault(FailKind.CLAIM, f"supports refuses {request} without a reason")
    return answer


def claims_both_ways(case: Case, ops: QuantOps) -> int:
    """What supports claims is executed; what it refuses raises UnsupportedError: nothing falls back."""
    checked = 0
    for request, call in _asked(case, ops):
        if call is None:
            continue
        checked += 1
        if not ops.supports(request):
            must_raise(call, UnsupportedError, f"{request} is refused by supports, but the call")
            continue
        try:
            call()
        except Exception as error:
            text = f"{request} is claimed, but the call raised {type(error).__name__}: {first_line(error)}"
            raise Fault(FailKind.CLAIM, text) from error
    return checked


class _ForeignBatch(AttentionBatch):
    """A batch that no backend made."""

    def plan(
        self,
        query_lens: Tensor,
        kv_lens: Tensor,
        page_table: Tensor,
        *,
        kv_lens_device: Tensor | None = None,
        tree: Tensor | None = None,
    ) -> None:
        """Nothing."""


def foreign_objects_refused(case: Case, ops: QuantOps) -> int:
    """A weight, a rotation or a batch that another backend made is refused with one clear error."""
    full, x = Support("full"), activation(case, ops)
    gemm = gemm_request(case, "bf16")
    offsets = Offsets(torch.tensor([0, 4, 16], dtype=torch.int32, device=ops.device))
    w = codebook_weight(case, ops.device)

    def foreign(request: Any) -> Prepared:
        return Prepared("another backend", request, full)

    calls: list[tuple[str, Callable[[], object]]] = [
        ("gemm", bound(ops.gemm, x, foreign(gemm))),
        ("grouped_gemm", bound(ops.grouped_gemm, x, foreign(GroupedRequest(gemm=gemm, experts=2, groups="offsets")),
                               offsets)),
        ("hadamard", bound(ops.hadamard, x, foreign(HadamardRequest(kinds=(), n=256, x=x.dtype)))),
        ("vq_decode", bound(ops.vq_decode, foreign(VQRequest(w=w.format, n=16, k=64, out=x.dtype)))),
        ("restore", bound(ops.restore, foreign(gemm))),
    ]  # fmt: skip
    for what, call in calls:
        must_raise(call, QhalError, f"{what} with an object of another backend")
    request = _attention("bf16")
    if not ops.supports(request):
        return len(calls)
    inner = Case("attention", "bf16", ATTENTION_SHAPE, "bf16", "normal")
    p = attention_check.build(inner)
    cache = attention_check.filled(ops, p, inner)
    q = torch.from_numpy(p.q).bfloat16().to(ops.device)
    must_raise(bound(ops.attention, q, cache, _ForeignBatch()), QhalError, "attention with a batch of another backend")
    return len(calls) + 1


def bad_shapes_refused(case: Case, ops: QuantOps) -> int:
    """x of another width, or an integer x, is an error of every operation that is claimed, not a result."""
    checked = 0
    for call in calls(case, ops):
        if not call.reads_x:
            continue
        name = call.name
        if not name.startswith("quantize"):  # a quantizer takes any width that its blocks divide
            must_raise(bound(call.run, call.x[..., :-1], None), Exception, f"{name} with x of one feature less")
            checked += 1
        must_raise(bound(call.run, call.x.to(torch.int32), None), Exception, f"{name} with integer x")
        checked += 1
    return checked


def limits_hold(case: Case, ops: QuantOps) -> int:
    """A step that exceeds what the batch was made for is an error before anything is written."""
    request = _attention("bf16")
    if not ops.supports(request):
        return 0
    batch = ops.attention_batch(request, Limits(2, 2, 2))
    lens = [torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.int32)]
    table = torch.zeros(3, 2, dtype=torch.int32, device=ops.device)
    must_raise(lambda: batch.plan(lens[0], lens[1], table), QhalError, "planning three sequences with limits for two")
    long = torch.tensor([1, 33], dtype=torch.int32)
    must_raise(lambda: batch.plan(lens[0][:2], long, table[:2]), QhalError, "planning three pages with limits for two")
    return 2


RULES: dict[str, Callable[[Case, QuantOps], int]] = {
    "supports-is-total": supports_is_total,
    "claims-both-ways": claims_both_ways,
    "foreign-objects-refused": foreign_objects_refused,
    "bad-shapes-refused": bad_shapes_refused,
    "limits-hold": limits_hold,
}
