"""gemm against the float64 reference: bound per element, statistics, buffers, inputs, repetition, restore."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.prepared import Prepared
from qhal.requests import GemmRequest, NumericsClass, Support, minimum_class
from qhal.specs import Operand
from qhal.tensors import QTensor, same_bits
from qhal_conformance import datasets, elements, encode, guards
from qhal_conformance.cases import Case
from qhal_conformance.decode import decode, numbers, plain, to_numpy
from qhal_conformance.generator import F32, Stream, fingerprint
from qhal_conformance.outcome import FailKind, Outcome
from qhal_conformance.problem import DTYPES, Fault, claim, outcome, refusal, well_formed
from qhal_conformance.reference import Product, decoding_steps
from qhal_conformance.remembering import remembered
from qhal_conformance.tolerance import Verdict, judge

CLIP = (0.75, 0.625)
"""What is kept of the range of a clipped input, below and above: two numbers, so that neither can stand for both."""


@dataclass(frozen=True)
class Problem:
    """The inputs of one product on the host, and its reference."""

    request: GemmRequest
    w: QTensor
    x: F32 | QTensor
    operands: tuple[Operand, ...]
    bias: F32 | None
    product: Product
    inputs_sha: str


def request_of(case: Case) -> GemmRequest:
    """What an engine would ask before it loads the weight."""
    w_name, _, x_name = case.subject.partition("~")
    coded = _coded(case)
    x = Format.parse(x_name or case.out)
    m = case.size("m")
    return GemmRequest(
        w=Format.parse(w_name),
        n=case.size("n"),
        k=case.size("k"),
        m=(m, m),
        x=(x,),
        static=(True,) if case.has("static") else (),
        clip=case.has("clip"),
        out=DTYPES[case.out] if coded or len(case.id) % 2 else None,
        bias=case.has("bias"),
        group_index=case.has("gidx"),
        numerics=NumericsClass.EXACT if case.has("exact") else None,
    )


def _coded(case: Case) -> bool:
    """Whether x arrives quantized: every code of it occurs."""
    return "~" in case.subject and case.data == "codes" and not case.has("static") and not case.has("clip")


@remembered
def build(case: Case) -> Problem:
    """Inputs and reference; both follow from the case's id."""
    request = request_of(case)
    assert isinstance(request.w, Format)
    x_format, m = request.x[0], case.size("m")
    w = datasets.weight(case.id, "w", request.w, request.n, request.k, case.data, group_index=request.group_index)
    bias = None
    if request.bias:
        bias = Stream(case.id, "bias").normal((request.n,)) * np.float32(0.75)
    x: F32 | QTensor
    operands: tuple[Operand, ...] = ()
    if x_format.plain:
        x = datasets.activation(case.id, m, request.k, case.data, case.out)
        value = plain(x)
    elif _coded(case):
        x = datasets.weight(case.id, "x", x_format, m, request.k, case.data)
        value = decode(x)
    else:
        x = datasets.activation(case.id, m, request.k, case.data, case.out)
        static = _static_scale(x, x_format) if case.has("static") else None
        clip = CLIP if request.clip else (1.0, 1.0)
        operands = (Operand(x_format, None if static is None else torch.from_numpy(static), clip=clip),)
        value = decode(encode.quantize(x, x_format, scale=static, clip=clip))
    steps = decoding_steps(request.w) + (0 if x_format.plain else decoding_steps(x_format))
    product = Product(value, decode(w), bias, steps, x_format.plain, case.out if case.out == "fp16" else "bf16")
    return Problem(request, w, x, operands, bias, product, _fingerprint(w, x, operands, bias))


def _static_scale(x: F32, f: Format) -> F32:
    """One scale that clips the largest twentieth of the values: saturation is part of the question."""
    size = np.sort(np.abs(x).reshape(-1)) if x.size else np.ones(1, np.float32)
    edge = size[int(0.95 * (size.size - 1))]
    top = elements.largest(f.element)
    return np.array([edge / np.float32(top) if edge > 0 else 1.0], dtype=np.float32)


def _fingerprint(w: QTensor, x: F32 | QTensor, operands: tuple[Operand, ...], bias: F32 | None) -> str:
    arrays = {name: to_numpy(t) for name, t in guards.planes(w, "w").items()}
    if isinstance(x, QTensor):
        arrays.update({name: to_numpy(t) for name, t in guards.planes(x, "x").items()})
    else:
        arrays["x"] = x
    for o in operands:
        if o.scale is not None:
            arrays["x.scale"] = to_numpy(o.scale)
        if o.clipped:
            arrays["x.clip"] = np.array(o.clip, np.float32)
    if bias is not None:
        arrays["bias"] = bias
    return fingerprint(arrays)


def run(case: Case, ops: QuantOps) -> Outcome:
    """Ask the backend, and compare."""
    p = build(case)
    device = ops.device
    w = p.w.to(device)
    bias = None if p.bias is None else torch.from_numpy(p.bias).to(device)
    operands = tuple(replace(o, scale=None if o.scale is None else o.scale.to(device)) for o in p.operands)
    granted = claim(ops, p.request)
    if granted is None:
        return refusal(ops, p.request, lambda: ops.prepare(w, p.request, inputs=operands, bias=bias))
    watched = {**guards.planes(w, "w"), **guards.planes(bias, "bias")}
    before = guards.snapshot(watched)
    prepared = ops.prepare(w, p.request, inputs=operands, bias=bias)
    y = _call(case, ops, p, prepared, granted.support)
    changed = guards.differing(before, watched)
    if changed:
        raise Fault(FailKind.INPUT_MUTATED, f"prepare or gemm changed {', '.join(changed)}")
    _restores(ops, prepared, p.w)
    verdict = _judge(case, p, y, granted.numerics)
    return outcome(verdict, granted.numerics, p.product.ref.size, granted.support)


def _judge(case: Case, p: Problem, y: torch.Tensor, numerics: NumericsClass) -> Verdict:
    got = numbers(y).astype(np.float64)
    return judge(got, p.product.expected(numerics), numerics, case.out, statistics=datasets.has_statistics(case.data))


def _call(case: Case, ops: QuantOps, p: Problem, prepared: Prepared, support: Support) -> torch.Tensor:
    """Four calls: as it comes, with other numbers, again, and into a poisoned `out`. All but the second must agree."""
    device, dtype = ops.device, DTYPES[case.out]
    shape = (case.size("m"), case.size("n"))
    guard = None
    if isinstance(p.x, QTensor):
        x: torch.Tensor | QTensor = p.x.to(device)
        other: torch.Tensor | QTensor = _turned(p.x).to(device)
    else:
        host = torch.from_numpy(p.x).to(dtype)
        guard = guards.place(host, case.storage, device)
        x, other = guard.view, host.flip(0).neg().contiguous().to(device)
    watched = guards.planes(x, "x")
    before = guards.snapshot(watched)
    opening = well_formed(ops.gemm(x, prepared), "gemm", shape, dtype, device)
    ops.synchronize()
    start = opening.clone()
    turned = ops.gemm(other, prepared)
    if isinstance(p.x, QTensor):  # the same rows in reverse order
        _holds(case, p, well_formed(turned, "gemm", shape, dtype, device).flip(0), support, "after another x")
    first = well_formed(ops.gemm(x, prepared), "gemm", shape, dtype, device)
    ops.synchronize()
    kept = first.clone()
    target = guards.poisoned(shape, dtype, case.storage, device)
    second = well_formed(ops.gemm(x, prepared, out=target.view), "gemm(out=)", shape, dtype, device)
    ops.synchronize()
    if guards.differing(before, watched) or (guard is not None and guard.changed()):
        raise Fault(FailKind.INPUT_MUTATED, "gemm changed x, or memory beside it")
    if target.touched_outside():
        raise Fault(FailKind.OOB, "gemm wrote beside out=")
    untouched = bool(torch.isnan(target.view).all()) and not np.isnan(p.product.ref).all()
    if second.data_ptr() != target.view.data_ptr() or untouched:
        raise Fault(FailKind.OUT_IGNORED, "gemm must write out= and return it")
    if not same_bits(first, kept) or not same_bits(opening, start):
        raise Fault(FailKind.INPUT_MUTATED, "a later call changed the result of an earlier one")
    for what, y in (("the first call", start), ("without out=", kept)):
        if same_bits(y, target.view.clone()):
            continue
        if support.deterministic:
            raise Fault(FailKind.NONDETERMINISTIC, f"two calls differ ({what}), but supports declares deterministic")
        _holds(case, p, y, support, what)
    return target.view


def _holds(case: Case, p: Problem, y: torch.Tensor, support: Support, what: str) -> None:
    verdict = _judge(case, p, y, support.numerics if support.numerics is not None else minimum_class(p.request))
    if verdict.kind is not None:
        raise Fault(verdict.kind, f"{what}: {verdict.detail}")


def _turned(x: QTensor) -> QTensor:
    """The rows in reverse order, their scales with them."""

    def flipped(plane: torch.Tensor | QTensor | None) -> torch.Tensor | QTensor | None:
        if isinstance(plane, QTensor):
            return replace(plane, codes=plane.codes.flip(0).contiguous(), scale=flipped(plane.scale))
        return plane.flip(0).contiguous() if plane is not None and plane.shape[0] == x.codes.shape[0] else plane

    return replace(x, codes=x.codes.flip(0).contiguous(), scale=flipped(x.scale))


def _restores(ops: QuantOps, prepared: Prepared, w: QTensor) -> None:
    """restore(prepare(w)) is w, bit for bit; a float code for -0 may come back as +0."""
    back = ops.restore(prepared)
    if not isinstance(back, QTensor):
        raise Fault(FailKind.RETURN, f"restore returned {type(back).__name__}, must be a QTensor")
    ours, theirs = guards.planes(w, "w"), guards.planes(back.to("cpu"), "w")
    if ours.keys() != theirs.keys() or back.format.storage != w.format.storage:
        raise Fault(FailKind.EXACT, f"restore gave {back.format} with {sorted(theirs)}, prepared was {w.format}")
    for name, plane in ours.items():
        if same_bits(plane, theirs[name]):
            continue
        same_value = plane.shape == theirs[name].shape and plane.dtype == theirs[name].dtype
        if name == "w.codes" and same_value and np.array_equal(decode(w).value, decode(back.to("cpu")).value):
            continue  # only zeros differ in sign
        raise Fault(FailKind.EXACT, f"restore(prepare(w)) differs from w in the plane {name}")
