"""What only shows after the first calls: other weights and inputs between, refits, planes of any strides.

An engine calls the same weights for days. A result that depends on how often, from where or after what it was asked
passes every case that asks once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from qhal.codebooks import CodebookTensor
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.prepared import Prepared
from qhal.requests import GemmRequest, GroupedRequest, VQRequest
from qhal.tensors import QTensor, same_bits
from qhal_conformance import datasets
from qhal_conformance.cases import Case
from qhal_conformance.contract_weights import agrees, experts_and_codebooks, restored
from qhal_conformance.decode import decode, numbers, plain
from qhal_conformance.generator import F32, Stream
from qhal_conformance.outcome import FailKind
from qhal_conformance.problem import Fault, claim
from qhal_conformance.reference import Product, decoding_steps
from qhal_conformance.tolerance import judge

_FORMATS = ("int4.g32*bf16", "int8.row*fp32", "e4m3fn.row*fp32", "e2m1.g32*e8m0", "bf16")
_ROUNDS = 26
"""Two weights and two inputs each: a kernel is called 104 times."""


def _request(case: Case, name: str, *, bias: bool = False) -> GemmRequest:
    n, k = case.size("n"), case.size("k")
    return GemmRequest(w=Format.parse(name), n=n, k=k, x=(Format.parse("bf16"),), m=(0, 64), bias=bias)


def _weight(case: Case, name: str, tag: str) -> QTensor:
    return datasets.weight(case.id, f"{name}.{tag}", Format.parse(name), case.size("n"), case.size("k"), "normal")


def _x(case: Case, tag: str) -> F32:
    return datasets.activation(f"{case.id}#{tag}", 16, case.size("k"), "normal", "bf16")


def _bias(case: Case, tag: str) -> torch.Tensor:
    return torch.from_numpy(Stream(case.id, f"bias.{tag}").normal((case.size("n"),)))


def _claimed(case: Case, ops: QuantOps, *, bias: bool = False) -> list[tuple[str, GemmRequest]]:
    requests = [(name, _request(case, name, bias=bias)) for name in _FORMATS]
    return [(name, request) for name, request in requests if ops.supports(request)]


def _product(x: F32, w: QTensor, bias: torch.Tensor | None = None) -> Product:
    steps = decoding_steps(w.format)
    return Product(plain(x), decode(w), None if bias is None else bias.cpu().numpy(), steps)


def _within(y: torch.Tensor, product: Product, ops: QuantOps, request: GemmRequest, what: str) -> None:
    granted = claim(ops, request)
    assert granted is not None
    verdict = judge(numbers(y).astype("float64"), product.expected(granted.numerics), granted.numerics, "bf16")
    if verdict.kind is not None:
        raise Fault(verdict.kind, f"{request.w}: {what}: {verdict.detail}")


def _same(
    y: torch.Tensor, first: torch.Tensor, product: Product, ops: QuantOps, request: GemmRequest, what: str
) -> None:
    """The bits of an earlier result where determinism is declared; within the bound in any case."""
    if same_bits(y, first):
        return
    if ops.supports(request).deterministic:
        raise Fault(FailKind.NONDETERMINISTIC, f"{request.w}: {what} changes the result, deterministic is declared")
    _within(y, product, ops, request, what)


def many_calls(case: Case, ops: QuantOps) -> int:
    """A hundred calls of two weights with two inputs through one buffer: every result is the first of its kind."""
    checked = 0
    for name, request in _claimed(case, ops):
        weights = [_weight(case, name, tag) for tag in ("w", "other")]
        prepared = [ops.prepare(w.to(ops.device), request) for w in weights]
        inputs = [_x(case, tag) for tag in ("x", "y")]
        buffer = torch.empty(inputs[0].shape, dtype=torch.bfloat16, device=ops.device)
        first: dict[tuple[int, int], torch.Tensor] = {}
        products = [[_product(x, w) for w in weights] for x in inputs]
        for call in range(4 * _ROUNDS):
            i, j = (call // 2 + call // 8) % 2, call % 2
            buffer.copy_(torch.from_numpy(inputs[i]))
            y = ops.gemm(buffer, prepared[j])
            ops.synchronize()
            what = f"call {call + 1}, weight {j}, input {i}"
            if (i, j) in first:
                _same(y.clone(), first[i, j], products[i][j], ops, request, what)
            else:
                first[i, j] = y.clone()
                _within(first[i, j], products[i][j], ops, request, what)
            checked += 1
    return checked


def refits(case: Case, ops: QuantOps) -> int:
    """Two refits, bias included, at the old addresses: the old object computes, and restores to, the newest values."""
    checked = 0
    for name, request in _claimed(case, ops, bias=True):
        host = _x(case, "x")
        x = torch.from_numpy(host).bfloat16().to(ops.device)
        tags = ("w", "second", "third")
        biases = [_bias(case, tag).to(ops.device) for tag in tags]
        weights = [_weight(case, name, tag) for tag in tags]
        prepared = ops.prepare(weights[0].to(ops.device), request, bias=biases[0])
        for tag, w, bias in zip(tags[1:], weights[1:], biases[1:], strict=True):
            _refit(ops, prepared, w.to(ops.device), f"gemm of {name}", bias)
            wanted = ops.gemm(x, ops.prepare(w.to(ops.device), request, bias=bias)).clone()
            what = f"refitting instead of preparing the {tag} weight"
            _same(ops.gemm(x, prepared).clone(), wanted, _product(host, w, bias), ops, request, what)
            checked += 1
    for name, request, old, new, product in experts_and_codebooks(case, ops):
        prepared = ops.prepare(old, request)
        before = product(prepared).clone()
        _refit(ops, prepared, new, name)
        wanted = product(ops.prepare(new, request)).clone()
        if not agrees(prepared, product(prepared).clone(), wanted, before):
            raise Fault(FailKind.EXACT, f"{name}: after prepare(into=) the old object does not compute the new values")
        checked += 1
    return checked


def _refit(
    ops: QuantOps, prepared: Prepared, w: QTensor | CodebookTensor, name: str, bias: torch.Tensor | None = None
) -> None:
    """New values in a prepared weight; a captured graph reads them where the old ones were."""
    request = prepared.request
    assert isinstance(request, GemmRequest | GroupedRequest | VQRequest)
    addresses = {key: t.data_ptr() for key, t in prepared.tensors().items()}
    again = ops.prepare(w, request, bias=bias, into=prepared)
    if {key: t.data_ptr() for key, t in again.tensors().items()} != addresses:
        raise Fault(FailKind.EXACT, f"{name}: prepare(into=) moved a tensor; a captured graph would read the old one")
    restored(ops, prepared, w, f"{name}: after prepare(into=), restore")


def any_strides(case: Case, ops: QuantOps) -> int:
    """Weights whose planes are views with other strides, as cuts of fused layers are, mean the same numbers."""
    checked = 0
    for name, request in _claimed(case, ops):
        w = _weight(case, name, "w").to(ops.device)
        scale = w.scale.mT.contiguous().mT if isinstance(w.scale, torch.Tensor) else w.scale
        turned = replace(w, codes=_wide_rows(w.codes), scale=scale)
        host = _x(case, "x")
        x = torch.from_numpy(host).bfloat16().to(ops.device)
        usual, other = (ops.gemm(x, ops.prepare(v, request)).clone() for v in (w, turned))
        _same(other, usual, _product(host, w), ops, request, "preparing planes with other strides")
        checked += 1
    return checked


def _wide_rows(codes: torch.Tensor) -> torch.Tensor:
    """The same codes as the left half of a wider matrix."""
    raw = codes.view(torch.uint8) if codes.element_size() == 1 else codes
    return torch.cat([raw, torch.zeros_like(raw)], -1)[..., : raw.shape[-1]].view(codes.dtype)


STEADY_RULES: dict[str, Callable[[Case, QuantOps], int]] = {
    "many-calls": many_calls,
    "refits": refits,
    "any-strides": any_strides,
}
