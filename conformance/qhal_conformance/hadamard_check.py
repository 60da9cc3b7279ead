"""hadamard: impulses and integers exactly, other numbers within a computed bound, H(Hx) = x, quantized in the same
pass.

|y - ref| <= 1/2 ulp_out + log2(n) * u * |x|_1 / sqrt n, with u = 2^-24 for sums in fp32 and 2^-8 for looser classes.
Two transforms return x within the second bound plus what the first leaves behind, 6 sigma of its rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import HadamardRequest, NumericsClass
from qhal.rotations import Hadamard, kinds
from qhal.specs import Operand
from qhal.tensors import QTensor, same_bits
from qhal_conformance import encode, guards
from qhal_conformance.cases import Case
from qhal_conformance.decode import numbers
from qhal_conformance.elements import round_wide
from qhal_conformance.generator import F32, F64, Stream, fingerprint
from qhal_conformance.outcome import FailKind, Outcome
from qhal_conformance.problem import DTYPES, Fault, claim, outcome, refusal, well_formed
from qhal_conformance.quantize_check import compare_planes
from qhal_conformance.remembering import remembered
from qhal_conformance.tolerance import Verdict, compare, ulp

HADAMARD_DATA: dict[str, str] = {
    "impulse": "rows of the identity: every entry of the matrix, its sign and its order, exactly",
    "integers": "small integers where sqrt n is a power of two: the result is exact in every class",
    "normal": "near-normal numbers within the bound, and back by a second transform",
    "outlier": "one feature 64 times larger: what rotations are for, and where a narrow sum loses the rest",
    "quantized": "quantized in the same pass: the bits of the two steps one after the other",
}


@dataclass(frozen=True)
class Problem:
    """x on the host and its transform in float64."""

    request: HadamardRequest
    rotation: Hadamard
    x: F32
    ref: F64
    operand: Operand | None
    inputs_sha: str


def cases(level: int) -> list[Case]:
    """Orders 2 to 1024 (level 1: 8192), whole rows and repeated along a longer axis."""
    found = []
    orders = [(2, 2), (64, 64), (128, 512), (256, 256), (1024, 1024)] + ([(4096, 4096), (8192, 8192)] * (level > 0))
    for number, (order, n) in enumerate(orders):
        for i, data in enumerate(HADAMARD_DATA):
            if data == "integers" and order.bit_length() % 2 == 0:
                continue  # sqrt n is no power of two
            kind = ("bf16", "fp16", "fp32")[(i + number) % 3] if data != "quantized" else "bf16"
            rows = min(n, 256) if data == "impulse" else (5, 33)[i % 2]
            found.append(_case(order, n, rows, kind, data, guards.STORAGES[(i + number) % 3], int(order > 1024)))
    found.append(_case(128, 128, 0, "bf16", "normal", "contiguous", 0))
    return found


def _case(order: int, n: int, rows: int, kind: str, data: str, storage: str, level: int) -> Case:
    required = kind != "fp32" and data != "quantized" and order >= 64
    shape = (("m", rows), ("n", n))
    return Case("hadamard", f"sylvester{order}", shape, kind, data, 0, storage, (), "rotation", level, required)


def request_of(case: Case) -> HadamardRequest:
    """What is asked of `supports`."""
    rotation = Hadamard(int(case.subject.removeprefix("sylvester")))
    quantize = Format.parse("int8.row*fp32") if case.data == "quantized" else None
    return HadamardRequest(kinds=kinds([rotation]), n=case.size("n"), x=DTYPES[case.out], quantize=quantize)


@remembered
def build(case: Case) -> Problem:
    """Inputs and reference; both follow from the case's id."""
    request = request_of(case)
    order = int(case.subject.removeprefix("sylvester"))
    m, n = case.size("m"), case.size("n")
    g = Stream(case.id, "x")
    if case.data == "impulse":
        x = np.zeros((m, n), np.float32)
        x[np.arange(m), g.permutation(n)[np.arange(m) % n]] = np.ldexp(g.signs((m,)), 3)
    elif case.data == "integers":
        x = g.integers(-3, 4, (m, n)).astype(np.float32)
    else:
        x = g.normal((m, n))
        if case.data == "outlier":
            x[:, n // 3] *= 64
    x = round_wide(case.out, x)
    operand = None if request.quantize is None else Operand(request.quantize)
    return Problem(request, Hadamard(order), x, transform(x.astype(np.float64), order), operand, fingerprint({"x": x}))


def transform(x: F64, order: int) -> F64:
    """x [m, n] times the natural-order Sylvester matrix / sqrt(order), on every `order` features; entry (i, j) of the
    matrix is (-1)^popcount(i & j)."""
    i = np.arange(order)
    signs = 1.0 - 2.0 * (np.array([bin(v).count("1") for v in range(order)])[i[:, None] & i[None, :]] % 2)
    return np.asarray((x.reshape(-1, order) @ signs / order**0.5).reshape(x.shape))


def run(case: Case, ops: QuantOps) -> Outcome:
    """By chain and prepared, into `out`, and back again."""
    p = build(case)
    device, dtype = ops.device, DTYPES[case.out]
    guard = guards.place(torch.from_numpy(p.x).to(dtype), case.storage, device)
    granted = claim(ops, p.request)
    if granted is None:
        return refusal(ops, p.request, lambda: ops.hadamard(guard.view, [p.rotation], quantize=p.operand))
    if p.operand is not None:
        return _quantized(case, ops, p, p.operand, guard)
    shape = tuple(guard.view.shape)
    first = well_formed(ops.hadamard(guard.view, [p.rotation]), "hadamard", shape, dtype, device)
    prepared = ops.prepare([p.rotation], p.request)
    target = guards.poisoned(shape, dtype, case.storage, device)
    second = well_formed(ops.hadamard(guard.view, prepared, out=target.view), "hadamard(out=)", shape, dtype, device)
    ops.synchronize()
    if guard.changed():
        raise Fault(FailKind.INPUT_MUTATED, "hadamard changed x, or memory beside it")
    if target.touched_outside():
        raise Fault(FailKind.OOB, "hadamard wrote beside out=")
    if second.data_ptr() != target.view.data_ptr():
        raise Fault(FailKind.OUT_IGNORED, "hadamard must write out= and return it")
    if not same_bits(first.contiguous(), second.contiguous()):
        raise Fault(FailKind.NONDETERMINISTIC, "the chain and the prepared chain differ")
    bound = _bound(case, p, granted.numerics, p.x)
    verdict = compare(numbers(second).astype(np.float64), p.ref, bound, case.out)
    if verdict.kind is None and case.data in ("normal", "outlier"):
        verdict = _involution(case, ops, p, second, bound, granted.numerics)
    return outcome(verdict, granted.numerics, p.ref.size, granted.support)


def _unit(numerics: NumericsClass) -> float:
    return 2.0**-24 if numerics <= NumericsClass.FP32_ACC else 2.0**-8


def _bound(case: Case, p: Problem, numerics: NumericsClass, x: F32) -> F64:
    order = p.rotation.n
    half = 0.5 * ulp(case.out, p.ref) * (1 + 2.0**-7)
    if case.data == "integers" or (case.data == "impulse" and order.bit_length() % 2):
        return np.asarray(half)
    blocks = np.abs(x.astype(np.float64)).reshape(-1, order).sum(axis=1, keepdims=True)
    stages = max(np.log2(order), 1.0) * _unit(numerics) * blocks / order**0.5
    return np.asarray(half + np.broadcast_to(stages, (blocks.shape[0], order)).reshape(x.shape))


def _involution(case: Case, ops: QuantOps, p: Problem, y: torch.Tensor, first: F64, n: NumericsClass) -> Verdict:
    """H(Hx) against x: the error of Hx, spread by the second transform, plus the second transform's own."""
    back = ops.hadamard(y.contiguous(), [p.rotation])
    ops.synchronize()
    order = p.rotation.n
    again = replace(p, ref=p.x.astype(np.float64))
    spread = np.sqrt((first.reshape(-1, order) ** 2).sum(axis=1, keepdims=True) / order)
    spread = np.broadcast_to(6 * 0.58 * spread, (first.size // order, order)).reshape(first.shape)
    bound = _bound(case, again, n, numbers(y)) + spread
    got = well_formed(back, "hadamard", tuple(y.shape), y.dtype, ops.device)
    return compare(numbers(got).astype(np.float64), again.ref, bound, case.out)


def _quantized(case: Case, ops: QuantOps, p: Problem, to: Operand, guard: guards.Guarded) -> Outcome:
    """One pass against the two steps: rotate and round, then quantize by the suite's own rule."""
    y = ops.hadamard(guard.view, [p.rotation])
    q = ops.hadamard(guard.view, [p.rotation], quantize=to)
    ops.synchronize()
    if not isinstance(q, QTensor) or not isinstance(y, torch.Tensor):
        raise Fault(FailKind.RETURN, f"hadamard(quantize=) returned {type(q).__name__}, must be a QTensor")
    back = q if q.layout == "canonical" else ops.restore(q)
    assert isinstance(back, QTensor)
    wrong = compare_planes(back.to("cpu"), encode.quantize(numbers(y), to.format))
    if wrong is not None:
        return wrong
    return outcome(Verdict(None, "", None, 0.0), NumericsClass.EXACT, p.ref.size)
