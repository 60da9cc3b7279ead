"""vq_decode, and gemm with codebook weights: every index, every book, every step of the definition.

|y - ref| <= 1/2 ulp_out(ref) (1 + 2^-7) + (r - 1) * 2^-24 * sum |terms|, with r the float32 roundings of the definition
(a division by a residual's divisor, a sum of two books, a scale, a bias). The last of them is the result's own, so one
codebook without or with a scale is within half a unit in the last place, and exact where the result's type holds it.
Products are judged as those of other weights (`tolerance.py`), with r for d.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from qhal.codebooks import CodebookFormat, CodebookTensor
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.prepared import Prepared
from qhal.requests import GemmRequest, NumericsClass, VQRequest
from qhal.tensors import same_bits
from qhal_conformance import datasets, guards, vq_kinds
from qhal_conformance.cases import Case
from qhal_conformance.decode import numbers, plain, to_numpy
from qhal_conformance.generator import F32, F64, Stream, fingerprint
from qhal_conformance.outcome import FailKind, Outcome
from qhal_conformance.problem import DTYPES, Fault, claim, outcome, refusal, well_formed
from qhal_conformance.reference import Product
from qhal_conformance.remembering import remembered
from qhal_conformance.tolerance import compare, judge, ulp
from qhal_conformance.vq_kinds import VQ_DATA, Dense


@dataclass(frozen=True)
class Problem:
    """A codebook weight, its value, and for products x and bias."""

    w: CodebookTensor
    dense: Dense
    x: F32
    bias: F32 | None
    inputs_sha: str


def _data(case: Case) -> str:
    """The data set of x that goes with a data set of the weight."""
    return case.data if case.data in datasets.DATASETS else "normal"


@remembered
def build(case: Case) -> Problem:
    """Inputs and reference; both follow from the case's id."""
    w = vq_kinds.build(case)
    arrays = {name: to_numpy(t) for name, t in w.planes().items()}
    x, bias = np.zeros((0, case.size("k")), np.float32), None
    if case.operation == "vq_gemm":
        x = datasets.activation(case.id, case.size("m"), case.size("k"), _data(case), case.out)
        arrays["x"] = x
        if case.has("bias"):
            bias = arrays["bias"] = Stream(case.id, "bias").normal((case.size("n"),))
    return Problem(w, vq_kinds.dense(w), x, bias, fingerprint(arrays))


def decode_request(case: Case) -> VQRequest:
    """What is asked of `supports` to decode."""
    return VQRequest(w=_format(case), n=case.size("n"), k=case.size("k"), out=DTYPES[case.out])


def gemm_request(case: Case) -> GemmRequest:
    """What is asked of `supports` to multiply."""
    return GemmRequest(
        w=_format(case), n=case.size("n"), k=case.size("k"), m=(case.size("m"),) * 2, x=(Format(case.out),),
        bias=case.has("bias"), numerics=NumericsClass.EXACT if case.has("exact") else None,
    )  # fmt: skip


def _format(case: Case) -> CodebookFormat:
    return build(case).w.format


def on(device: torch.device, w: CodebookTensor) -> CodebookTensor:
    """The weight on a device."""

    def move(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.to(device)

    segments = tuple(
        replace(s, codes=s.codes.to(device), tables=tuple(t if isinstance(t, str) else t.to(device) for t in s.tables))
        for s in w.segments
    )
    return CodebookTensor(
        w.shape, segments, move(w.scale), move(w.permutation), move(w.column_scale), move(w.column_bias)
    )


def run_decode(case: Case, ops: QuantOps) -> Outcome:
    """All rows, some rows, into `out`; restore."""
    p, request = build(case), decode_request(case)
    device, dtype = ops.device, DTYPES[case.out]
    w = on(device, p.w)
    granted = claim(ops, request)
    if granted is None:
        return refusal(ops, request, lambda: ops.prepare(w, request))
    before = guards.snapshot(w.planes())
    prepared = ops.prepare(w, request)
    (n, k), first, last = p.w.shape, p.w.shape[0] // 3, p.w.shape[0] - 1
    whole = well_formed(ops.vq_decode(prepared), "vq_decode", (n, k), dtype, device).clone()
    some = ops.vq_decode(prepared, rows=slice(first, last))
    some = well_formed(some, "vq_decode(rows=)", (last - first, k), dtype, device)
    target = guards.poisoned((n, k), dtype, case.storage, device)
    second = well_formed(ops.vq_decode(prepared, out=target.view), "vq_decode(out=)", (n, k), dtype, device)
    ops.synchronize()
    if guards.differing(before, w.planes()):
        raise Fault(FailKind.INPUT_MUTATED, "prepare or vq_decode changed the weight")
    if target.touched_outside():
        raise Fault(FailKind.OOB, "vq_decode wrote beside out=")
    if second.data_ptr() != target.view.data_ptr():
        raise Fault(FailKind.OUT_IGNORED, "vq_decode must write out= and return it")
    if not same_bits(some.contiguous(), whole[first:last].contiguous()):
        raise Fault(FailKind.EXACT, f"vq_decode(rows={first}:{last}) differs from those rows of the whole")
    if granted.support.deterministic and not same_bits(whole, target.view.clone()):
        raise Fault(FailKind.NONDETERMINISTIC, "two calls differ, but supports declares deterministic")
    _restores(ops, prepared, p.w)
    bound = error_bound(case, p.dense, granted.numerics)
    for y in (numbers(whole), numbers(target.view)):
        verdict = compare(y.astype(np.float64), p.dense.exact, bound, case.out)
        if verdict.kind is not None:
            break
    return outcome(verdict, granted.numerics, n * k, granted.support)


def error_bound(case: Case, d: Dense, numerics: NumericsClass) -> F64:
    """How far a decoded element may be from the exact one; 0 where every term is 0."""
    steps = 0 if numerics == NumericsClass.EXACT else max(d.steps - 1, 0)
    bound = 0.5 * ulp(case.out, d.exact) * (1 + 2.0**-7) + steps * 2.0**-24 * d.magnitude
    return np.where(d.magnitude == 0, 0.0, bound)


def run_gemm(case: Case, ops: QuantOps) -> Outcome:
    """Prepare for products, multiply twice, the second time into `out`; restore."""
    p, request = build(case), gemm_request(case)
    device, dtype = ops.device, DTYPES[case.out]
    w = on(device, p.w)
    bias = None if p.bias is None else torch.from_numpy(p.bias).to(device)
    granted = claim(ops, request)
    if granted is None:
        return refusal(ops, request, lambda: ops.prepare(w, request, bias=bias))
    before = guards.snapshot(w.planes())
    prepared = ops.prepare(w, request, bias=bias)
    guard = guards.place(torch.from_numpy(p.x).to(dtype), case.storage, device)
    shape = (case.size("m"), case.size("n"))
    target = guards.poisoned(shape, dtype, case.storage, device)
    first = well_formed(ops.gemm(guard.view, prepared), "gemm", shape, dtype, device).clone()
    second = well_formed(ops.gemm(guard.view, prepared, out=target.view), "gemm(out=)", shape, dtype, device)
    ops.synchronize()
    if guard.changed() or guards.differing(before, w.planes()):
        raise Fault(FailKind.INPUT_MUTATED, "gemm changed x, the weight, or memory beside x")
    if target.touched_outside():
        raise Fault(FailKind.OOB, "gemm wrote beside out=")
    if second.data_ptr() != target.view.data_ptr():
        raise Fault(FailKind.OUT_IGNORED, "gemm must write out= and return it")
    if granted.support.deterministic and not same_bits(first, target.view.clone()):
        raise Fault(FailKind.NONDETERMINISTIC, "two calls differ, but supports declares deterministic")
    _restores(ops, prepared, p.w)
    statistics = case.data in VQ_DATA and _data(case) not in ("onehot", "zero")
    product = Product(
        plain(p.x), p.dense.decoded, p.bias, p.dense.steps, True, "fp16" if case.out == "fp16" else "bf16"
    )
    got: F64 = numbers(target.view).astype(np.float64)
    verdict = judge(got, product.expected(granted.numerics), granted.numerics, case.out, statistics=statistics)
    return outcome(verdict, granted.numerics, product.ref.size, granted.support)


def _restores(ops: QuantOps, prepared: Prepared, w: CodebookTensor) -> None:
    """restore(prepare(w)) is w: shape, names, divisors, and every plane bit for bit."""
    back = ops.restore(prepared)
    if not isinstance(back, CodebookTensor):
        raise Fault(FailKind.RETURN, f"restore returned {type(back).__name__}, must be a CodebookTensor")
    if back.shape != w.shape or back.format != w.format:
        raise Fault(FailKind.EXACT, f"restore gave {back.shape} {back.format}, prepared was {w.shape} {w.format}")
    ours, theirs = w.planes(), on(torch.device("cpu"), back).planes()
    wrong = [name for name, plane in ours.items() if not same_bits(plane, theirs[name])]
    if wrong:
        raise Fault(FailKind.EXACT, f"restore(prepare(w)) differs from w in {', '.join(wrong)}")
