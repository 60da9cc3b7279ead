"""hadamard: impulses and integers exactly, other numbers within a computed bound, there and back, quantized in the same
pass; for every rotation that `rotation_chains` names.

|y - ref| <= 1/2 ulp_out + gamma * u * (|x| |M1| |M2| ...), with u = 2^-24 for sums in fp32 and 2^-8 for looser classes;
gamma is log2(n) for butterflies, min(2 sqrt k, k) for a table, a block or a factor of order k, 1 for a diagonal.
Two transforms return x within the second bound plus what the first leaves behind, 6 sigma of its rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import HadamardRequest, NumericsClass
from qhal.rotations import Hadamard, Permutation, Rotation, kinds
from qhal.specs import Operand
from qhal.tensors import QTensor, same_bits
from qhal_conformance import encode, guards, rotation_chains
from qhal_conformance.cases import Case
from qhal_conformance.decode import numbers
from qhal_conformance.elements import round_wide
from qhal_conformance.generator import F32, F64, Stream, fingerprint
from qhal_conformance.outcome import FailKind, Outcome
from qhal_conformance.problem import DTYPES, Fault, claim, outcome, refusal, well_formed
from qhal_conformance.quantize_check import compare_planes
from qhal_conformance.remembering import remembered
from qhal_conformance.rotation_chains import Turn
from qhal_conformance.tolerance import Verdict, compare, ulp

HADAMARD_DATA: dict[str, str] = {
    "impulse": "rows of the identity: every entry of the matrix, its sign and its order, exactly",
    "integers": "small integers where no factor is irrational: the result is exact in every class",
    "normal": "near-normal numbers within the bound, and back by the transposed transform",
    "outlier": "one feature 64 times larger: what rotations are for, and where a narrow sum loses the rest",
    "quantized": "quantized in the same pass: the bits of the two steps one after the other",
    "limits": "rows over the range of their type, with results that overflow: a detour through a narrower type, an "
    "overflow that saturates",
    "special": "NaN and Inf in some blocks: they reach their block and no other",
}


CHAINS: tuple[tuple[str, int, bool], ...] = (
    ("quarot-12x4", 96, True),
    ("quarot-28x4^T", 112, True),
    ("quarot-12x16^T", 192, True),
    ("signs+sylvester64", 128, True),
    ("quarot-20x2+signs", 40, False),
    ("quarot-52x2^T", 104, False),
    ("kronecker8x16", 128, False),
    ("kronecker4x-", 36, False),
    ("kronecker-x24", 72, False),
    ("dense32+permutation", 96, False),
    ("permutation+diagonal", 61, False),
    ("dense32", 96, False),
    ("permutation", 61, False),
    ("diagonal", 61, False),
)
"""(name, features, whether a backend that has the profile must have it)"""
_LARGER: tuple[tuple[str, int, bool], ...] = tuple(
    (name, n, False)
    for name, n in (
        ("quarot-36x8", 576),
        ("quarot-40x4^T", 160),
        ("spinquant-44x2", 176),
        ("quarot-60x2^T", 120),
        ("quarot-108x2", 216),
        ("quarot-140x2^T", 560),
        ("quarot-156", 312),
        ("quarot-172x2^T", 344),
        ("quip-12x64", 768),
        ("quip-28x8^T", 224),
        ("diagonal+quarot-28x2+permutation+dense16", 112),
    )
)


@dataclass(frozen=True)
class Problem:
    """x on the host, its transform in float64, and the sum that the transform's error is relative to."""

    request: HadamardRequest
    turns: list[Turn]
    x: F32
    ref: F64
    operand: Operand | None
    inputs_sha: str

    @property
    def chain(self) -> list[Rotation]:
        """What the backend is asked to apply."""
        return [t.rotation for t in self.turns]

    @property
    def orthogonal(self) -> bool:
        """Whether the transpose undoes it."""
        return all(isinstance(r, Hadamard | Permutation) for r in self.chain)


def cases(level: int) -> list[Case]:
    """Orders 2 to 1024 (level 1: 8192), whole rows and repeated along a longer axis; tables, signs and matrices."""
    found = []
    orders = [(2, 2), (64, 64), (128, 512), (256, 256), (1024, 1024)] + ([(4096, 4096), (8192, 8192)] * (level > 0))
    for number, (order, n) in enumerate(orders):
        for i, data in enumerate(HADAMARD_DATA):
            if data == "integers" and order.bit_length() % 2 == 0:
                continue  # sqrt n is no power of two
            kind = ("bf16", "fp16", "fp32")[(i + number) % 3] if data != "quantized" else "bf16"
            if data == "limits":
                kind = ("fp16", "bf16")[number % 2]
            rows = min(n, 256) if data == "impulse" else 300 if data == "outlier" and n <= 128 else (5, 33)[i % 2]
            required = kind != "fp32" and data != "quantized" and order >= 64
            turn = i + number
            found.append(_case(f"sylvester{order}", n, rows, kind, data, turn, int(order > 1024), required))
    found.append(_case("sylvester128", 128, 0, "bf16", "normal", 0, 0, True))
    found.append(replace(_case("sylvester256", 256, 9, "bf16", "quantized", 0, 0, False), options=("static",)))
    for number, (subject, n, required) in enumerate(CHAINS):
        kind = ("bf16", "fp16")[number % 2]
        found.append(_case(subject, n, min(n, 256), kind, "impulse", number, 0, required))
        if number % 4 == 0:
            found.append(_case(subject, n, (1, 17)[number % 2], "bf16", "normal", number + 1, 0, required))
    for number, (subject, n, required) in enumerate((*CHAINS, *_LARGER) if level else ()):
        for i, data in enumerate(("integers", "normal", "outlier", "impulse")):
            if data != "integers" or all(t.exact for t in rotation_chains.chain(subject, "", n)):
                kind = ("bf16", "fp16", "fp32")[(number + i) % 3]
                found.append(_case(subject, n, 31, kind, data, number + i, 1, required and kind != "fp32"))
    return list({case.id: case for case in found}.values())


def _case(subject: str, n: int, rows: int, kind: str, data: str, turn: int, level: int, required: bool) -> Case:
    storage = guards.STORAGES[turn % 3]
    return Case("hadamard", subject, (("m", rows), ("n", n)), kind, data, 0, storage, (), "rotation", level, required)


def request_of(case: Case) -> HadamardRequest:
    """What is asked of `supports`."""
    chain = [t.rotation for t in rotation_chains.chain(case.subject, case.id, case.size("n"))]
    held = "int8.tensor*fp32" if case.has("static") else "int8.row*fp32"
    quantize = Format.parse(held) if case.data == "quantized" else None
    return HadamardRequest(kinds=kinds(chain), n=case.size("n"), x=DTYPES[case.out], quantize=quantize)


@remembered
def build(case: Case) -> Problem:
    """Inputs and reference; both follow from the case's id."""
    request, turns = request_of(case), rotation_chains.chain(case.subject, case.id, case.size("n"))
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
        elif case.data == "limits":
            low, high = (-20, 14) if case.out == "fp16" else (-60, 61)
            x = np.ldexp(x, g.integers(low, high, (m, 1)).astype(np.int32))
            x[:1] = np.float32(2.0**15 if case.out == "fp16" else 2.0**40)  # a sum of equal numbers: it overflows fp16
        elif case.data == "special":
            x[np.arange(m) % 3 == 1, n // 2] = np.nan
            x[np.arange(m) % 3 == 2, n - 1] = -np.inf
    x = round_wide(case.out, x)
    ref = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        for t in turns:
            ref = t.apply(ref)
    operand = None
    if request.quantize is not None:
        operand = Operand(request.quantize, torch.tensor([2.0 / 127]) if case.has("static") else None)
    return Problem(request, turns, x, ref, operand, fingerprint({"x": x}))


def run(case: Case, ops: QuantOps) -> Outcome:
    """By chain and prepared, into `out`, and back again."""
    p = build(case)
    device, dtype = ops.device, DTYPES[case.out]
    guard = guards.place(torch.from_numpy(p.x).to(dtype), case.storage, device)
    granted = claim(ops, p.request)
    if granted is None:
        return refusal(ops, p.request, lambda: ops.hadamard(guard.view, p.chain, quantize=p.operand))
    if p.operand is not None:
        return _quantized(case, ops, p, p.operand, guard)
    shape = tuple(guard.view.shape)
    first = well_formed(ops.hadamard(guard.view, p.chain), "hadamard", shape, dtype, device)
    prepared = ops.prepare(p.chain, p.request)
    target = guards.poisoned(shape, dtype, case.storage, device)
    second = well_formed(ops.hadamard(guard.view, prepared, out=target.view), "hadamard(out=)", shape, dtype, device)
    ops.synchronize()
    if guard.changed():
        raise Fault(FailKind.INPUT_MUTATED, "hadamard changed x, or memory beside it")
    if target.touched_outside():
        raise Fault(FailKind.OOB, "hadamard wrote beside out=")
    if second.data_ptr() != target.view.data_ptr():
        raise Fault(FailKind.OUT_IGNORED, "hadamard must write out= and return it")
    if granted.support.deterministic and not same_bits(first.contiguous(), second.contiguous()):
        raise Fault(FailKind.NONDETERMINISTIC, "the chain and the prepared chain differ")
    bound = bound_of(case, p, granted.numerics, p.x)
    verdict = compare(numbers(second).astype(np.float64), p.ref, bound, case.out)
    if verdict.kind is None and case.data in ("normal", "outlier") and p.orthogonal:
        back = _there_and_back(case, ops, p, second, bound, granted.numerics)
        verdict = back if back.worst is not None else verdict
    return outcome(verdict, granted.numerics, p.ref.size, granted.support)


def _unit(numerics: NumericsClass) -> float:
    return 2.0**-24 if numerics <= NumericsClass.FP32_ACC else 2.0**-8


def bound_of(case: Case, p: Problem, numerics: NumericsClass, x: F32) -> F64:
    """How far a transform of x may be from p.ref under a class."""
    half = 0.5 * ulp(case.out, p.ref) * (1 + 2.0**-7)
    exact = all(t.exact for t in p.turns)
    if case.data == "integers" or (case.data == "impulse" and exact and len(p.turns) == 1):
        return np.asarray(half)
    size, gamma = np.abs(x.astype(np.float64)), 0.0
    for t in p.turns:
        size, gamma = t.apply(size, np.abs), gamma + t.gamma
    return np.asarray(half + gamma * _unit(numerics) * np.where(np.isinf(size), 0.0, size))  # Inf asks for Inf


def _there_and_back(case: Case, ops: QuantOps, p: Problem, y: torch.Tensor, first: F64, n: NumericsClass) -> Verdict:
    """x M M^T against x: the error of x M, spread by the second transform, plus the second transform's own."""
    inverse = [r.inverse() for r in reversed(p.chain)]
    if not ops.supports(replace(p.request, kinds=kinds(inverse))):
        return Verdict(None, "", None, 0.0)
    back = ops.hadamard(y.contiguous(), inverse)
    ops.synchronize()
    turns = [t.transposed() for t in reversed(p.turns)]
    again = replace(p, turns=turns, ref=p.x.astype(np.float64))
    spread = first**2
    for t in turns:
        spread = t.apply(spread, np.square)
    bound = bound_of(case, again, n, numbers(y)) + 6 * 0.58 * np.sqrt(spread)
    got = well_formed(back, "hadamard", tuple(y.shape), y.dtype, ops.device)
    return compare(numbers(got).astype(np.float64), again.ref, bound, case.out)


def _quantized(case: Case, ops: QuantOps, p: Problem, to: Operand, guard: guards.Guarded) -> Outcome:
    """One pass against the two steps: rotate and round, then quantize by the suite's own rule."""
    y = ops.hadamard(guard.view, p.chain)
    static = None if to.scale is None else to.scale.numpy()
    to = replace(to, scale=None if to.scale is None else to.scale.to(ops.device))
    q = ops.hadamard(guard.view, p.chain, quantize=to)
    ops.synchronize()
    if not isinstance(q, QTensor) or not isinstance(y, torch.Tensor):
        raise Fault(FailKind.RETURN, f"hadamard(quantize=) returned {type(q).__name__}, must be a QTensor")
    back = q if q.layout == "canonical" else ops.restore(q)
    assert isinstance(back, QTensor)
    wrong = compare_planes(back.to("cpu"), encode.quantize(numbers(y), to.format, scale=static))
    if wrong is not None:
        return wrong
    return outcome(Verdict(None, "", None, 0.0), NumericsClass.EXACT, p.ref.size)
