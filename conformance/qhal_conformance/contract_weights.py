"""Rules about prepared weights: back as they were, independent of each other, inputs by index.

Refits are in `steady_check.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from qhal.codebooks import CodebookTensor
from qhal.formats import Format
from qhal.groups import Indexed
from qhal.interface import QuantOps
from qhal.prepared import Prepared
from qhal.requests import GroupedRequest, QuantizeRequest, VQRequest
from qhal.specs import Operand
from qhal.tensors import QTensor, same_bits
from qhal_conformance import guards
from qhal_conformance.cases import Case
from qhal_conformance.contract_calls import (
    EXPERTS,
    FORMATS,
    activation,
    codebook_weight,
    gemm_request,
    weight,
)
from qhal_conformance.gemm_cases import PAIRS
from qhal_conformance.outcome import FailKind
from qhal_conformance.problem import Fault

Weights = tuple[str, Any, Any, Any, Callable[[Prepared], torch.Tensor]]


def _weights(case: Case, ops: QuantOps) -> Iterator[Weights]:
    """(name, request, two weights of it, a product) for everything that `prepare` may claim."""
    x = activation(case, ops)
    for name in FORMATS:
        request = gemm_request(case, name)
        if ops.supports(request):
            first, second = (weight(case, name, tag).to(ops.device) for tag in ("w", "refit"))
            yield f"gemm of {name}", request, first, second, lambda p: ops.gemm(x, p)
    yield from experts_and_codebooks(case, ops)


def experts_and_codebooks(case: Case, ops: QuantOps) -> Iterator[Weights]:
    """The same for what is no single matrix of codes."""
    x = activation(case, ops)
    grouped = GroupedRequest(gemm=gemm_request(case, FORMATS[0]), experts=EXPERTS, groups="indexed")
    if ops.supports(grouped):
        ids = torch.arange(x.shape[0], dtype=torch.int32, device=ops.device).reshape(-1, 1) % EXPERTS
        stacks = [_stack(case, tag).to(ops.device) for tag in ("w", "refit")]
        yield f"grouped_gemm of {FORMATS[0]}", grouped, *stacks, lambda p: ops.grouped_gemm(x, p, Indexed(ids))  # type: ignore[misc]
    codebooks = [codebook_weight(case, ops.device, tag) for tag in ("w", "refit")]
    vq = VQRequest(w=codebooks[0].format, n=16, k=64, out=torch.bfloat16)
    if ops.supports(vq):
        yield "vq_decode", vq, *codebooks, ops.vq_decode  # type: ignore[misc]


def _stack(case: Case, tag: str) -> QTensor:
    return QTensor.stack([weight(case, FORMATS[0], f"{tag}{e}") for e in range(EXPERTS)])


def weights_are_independent(case: Case, ops: QuantOps) -> int:
    """Two weights of one request, used in turn: each computes its own numbers and restores to itself."""
    checked = 0
    for name, request, first, second, product in _weights(case, ops):
        one = ops.prepare(first, request)
        alone = product(one).clone()
        two = ops.prepare(second, request)
        other = product(two).clone()
        shared = {t.data_ptr() for t in one.tensors().values()} & {t.data_ptr() for t in two.tensors().values()}
        if shared - {0}:
            raise Fault(FailKind.EXACT, f"{name}: two prepared weights share a tensor")
        for _ in range(2):
            for made, wanted, not_this in ((one, alone, other), (two, other, alone)):
                if not agrees(made, product(made).clone(), wanted, not_this):
                    raise Fault(FailKind.EXACT, f"{name}: a weight computes other numbers after another was prepared")
                checked += 1
        if same_bits(alone, other):
            raise Fault(FailKind.EXACT, f"{name}: two weights of different numbers give one result")
        restored(ops, one, first, f"{name}: restore")
    return checked


def restore_gives_back(case: Case, ops: QuantOps) -> int:
    """restore(prepare(w)) is w in every plane, for every weight format of the suite that is claimed."""
    checked = 0
    names = dict.fromkeys([*(pair.w for pair in PAIRS), "nf4.g64*fp32", "uint8-uint8.g64*fp16", "e5m2.row*fp32"])
    for name in names:
        request = gemm_request(case, name)
        if ops.supports(request):
            w = weight(case, name)
            restored(ops, ops.prepare(w.to(ops.device), request), w, f"{name}: restore(prepare(w))")
            checked += 1
    for name, request, w, _, _ in _weights(case, ops):
        restored(ops, ops.prepare(w, request), w, f"{name}: restore(prepare(w))")
        checked += 1
    return checked


def agrees(prepared: Prepared, got: torch.Tensor, wanted: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bits where the backend declares them; else nearer to the wanted result than to another weight's."""
    if prepared.support.deterministic or same_bits(got, wanted):
        return same_bits(got, wanted)
    near, far = (float((got.double() - t.double()).norm()) for t in (wanted, other))
    return near < far


def restored(ops: QuantOps, prepared: Prepared, w: QTensor | CodebookTensor, what: str) -> None:
    """Bit for bit; a float code for -0 may come back as +0."""
    back = ops.restore(prepared)
    if isinstance(w, CodebookTensor):
        same = isinstance(back, CodebookTensor) and same_bits(back.dequantize(), w.dequantize())
        if not same or back.format != w.format:  # type: ignore[union-attr]
            raise Fault(FailKind.EXACT, f"{what} differs from what was prepared")
        return
    if not isinstance(back, QTensor):
        raise Fault(FailKind.RETURN, f"{what} is a {type(back).__name__}, must be a QTensor")
    ours, theirs = guards.planes(w.to("cpu"), "w"), guards.planes(back.to("cpu"), "w")
    if ours.keys() != theirs.keys() or back.format.storage != w.format.storage:
        raise Fault(FailKind.EXACT, f"{what} gave {back.format} with {sorted(theirs)}, prepared was {w.format}")
    for name, plane in ours.items():
        shaped = plane.shape == theirs[name].shape and plane.dtype == theirs[name].dtype
        if shaped and same_bits(plane, theirs[name]):
            continue
        if shaped and name == "w.codes" and bool((w.to("cpu").dequantize() == back.to("cpu").dequantize()).all()):
            continue  # only zeros differ in sign
        raise Fault(FailKind.EXACT, f"{what} differs from what was prepared in the plane {name}")


def experts_by_their_index(case: Case, ops: QuantOps) -> int:
    """Experts stacked in another order, ids renamed: the same bits."""
    request = GroupedRequest(gemm=gemm_request(case, FORMATS[0]), experts=EXPERTS, groups="indexed")
    support = ops.supports(request)
    if not support:
        return 0
    order = [2, 0, 1]
    x = activation(case, ops)
    ids = torch.arange(x.shape[0], dtype=torch.int32) % EXPERTS
    weights = [weight(case, FORMATS[0], f"w{e}") for e in range(EXPERTS)]
    where = torch.tensor([order.index(e) for e in range(EXPERTS)], dtype=torch.int32)
    results = []
    for stack, names in ((weights, ids), ([weights[e] for e in order], where[ids.long()])):
        prepared = ops.prepare(QTensor.stack(stack).to(ops.device), request)
        y = ops.grouped_gemm(x, prepared, Indexed(names.reshape(-1, 1).to(ops.device)))
        assert isinstance(y, torch.Tensor)
        results.append(y.clone())
    if support.deterministic and not same_bits(*results):
        raise Fault(FailKind.EXACT, "grouped_gemm: the place of an expert in the stack changes its results")
    return results[0].numel()


def inputs_by_index(case: Case, ops: QuantOps) -> int:
    """A weight prepared for two inputs quantizes x by the one that `input=` names, with the bits of `quantize`."""
    eight, sixteen = Format.parse("int8.row*fp32"), Format.parse("int8.tensor*fp32")
    request = gemm_request(case, "int8.row*fp32", x=(eight, sixteen), out=torch.bfloat16)
    if not ops.supports(request) or not all(ops.supports(_quantize(f)) for f in (eight, sixteen)):
        return 0
    prepared = ops.prepare(
        weight(case, "int8.row*fp32").to(ops.device), request, inputs=(Operand(eight), Operand(sixteen))
    )
    x = activation(case, ops)
    results = [ops.gemm(x, prepared, input=index).clone() for index in (0, 1)]
    for index, f in enumerate((eight, sixteen)):
        coded = ops.gemm(ops.quantize(x, f, for_=prepared), prepared).clone()
        if not agrees(prepared, coded, results[index], results[1 - index]):
            raise Fault(FailKind.EXACT, f"gemm(x, input={index}) differs from gemm(quantize(x, {f}))")
    return 2 * x.numel()


def _quantize(f: Format) -> QuantizeRequest:
    return QuantizeRequest(x=torch.bfloat16, format=f)


RULES: dict[str, Callable[[Case, QuantOps], int]] = {
    "weights-are-independent": weights_are_independent,
    "restore-gives-back": restore_gives_back,
    "experts-by-their-index": experts_by_their_index,
    "inputs-by-index": inputs_by_index,
}
