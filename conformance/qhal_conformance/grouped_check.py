"""grouped_gemm: gemm per expert in the three forms of groups, judged row by row like gemm, plus what must be exact.

Exact: an expert without rows, all rows in one expert, a permutation of the rows of an expert permutes its results bit
for bit, whatever stands past a count or behind id -1 does not leak. With act(gate) * up the product's bound is passed
through: |act'| <= 1.13 for silu, the factor's own bound times the other factor, and 2^-20 for the function itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qhal.formats import Format
from qhal.groups import Groups, Indexed, Masked, Offsets
from qhal.interface import QuantOps
from qhal.layer_formats import Activation
from qhal.prepared import Prepared
from qhal.requests import GemmRequest, GroupedRequest, NumericsClass
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance import datasets, encode, guards
from qhal_conformance.cases import Case
from qhal_conformance.decode import decode, numbers, plain, to_numpy
from qhal_conformance.generator import F32, F64, I64, Stream, fingerprint
from qhal_conformance.outcome import FailKind, Outcome
from qhal_conformance.problem import DTYPES, Fault, claim, outcome, refusal, well_formed
from qhal_conformance.reference import Product, decoding_steps
from qhal_conformance.remembering import remembered
from qhal_conformance.tolerance import compare, error_bound, ulp

EXPERTS = 5
COUNTS: dict[str, tuple[int, ...]] = {
    "uneven": (7, 0, 17, 1, 8),
    "one": (0, 0, 33, 0, 0),
    "none": (0, 0, 0, 0, 0),
}
"""Rows per expert: an empty one between full ones, all rows in one, no row at all."""
FORMATS = (
    ("int4.g32*bf16", ""),
    ("int8.row*fp32", "int8.row*fp32"),
    ("e4m3fn.row*fp32", "e4m3fn.row*fp32"),
    ("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32"),
    ("e2m1.g32*e8m0", ""),
)
_FORMS = ("offsets", "masked", "indexed", "pairs")


@dataclass(frozen=True)
class Problem:
    """x in the form's shape, which rows go to which expert, and the reference of every result row."""

    request: GroupedRequest
    weights: tuple[QTensor, ...]
    x: F32
    rows: I64
    experts: I64
    bias: F32 | None
    product: tuple[Product, ...]
    inputs_sha: str


def cases(level: int) -> list[Case]:
    """Every format with every form of groups; data sets, counts and the activation rotate."""
    found = []
    data = ("normal", "codes", "onehot", "outlier", "tiny_columns", "positive")
    for number, (w, x) in enumerate(FORMATS):
        for i, form in enumerate(_FORMS):
            for j in range(2 + 3 * level):
                turn = 2 * i + j + number
                options = (form,) + (("bias",) if turn % 3 == 0 else ()) + (("silu",) if j == 1 else ())
                counts = ("uneven", "uneven", "one", "uneven", "none")[(turn + j) % 5]
                found.append(_case(w, x, data[turn % 6], counts, options, turn, int(j > 1)))
    return list({case.id: case for case in found}.values())


def _case(w: str, x: str, data: str, counts: str, options: tuple[str, ...], turn: int, level: int) -> Case:
    k = 256 if level == 0 else 512
    shape = (("e", EXPERTS), ("n", (64, 96, 128)[turn % 3]), ("k", k))
    storage = guards.STORAGES[turn % 3]
    subject = f"{w}~{x}" if x else w
    required = "silu" not in options and options[0] in ("offsets", "indexed")
    return Case("grouped_gemm", subject, shape, "bf16", data, 0, storage, (*options, counts), "moe", level, required)


def request_of(case: Case) -> GroupedRequest:
    """What is asked of `supports`."""
    w, _, x = case.subject.partition("~")
    gemm = GemmRequest(
        w=Format.parse(w),
        n=case.size("n"),
        k=case.size("k"),
        x=(Format.parse(x or case.out),),
        m=(0, 64),
        bias=case.has("bias"),
        numerics=None,
    )
    form = case.options[0]
    return GroupedRequest(
        gemm=gemm,
        experts=EXPERTS,
        groups="indexed" if form == "pairs" else form,  # type: ignore[arg-type]
        top_k=2 if form == "indexed" else 1,
        activation=Activation("silu") if case.has("silu") else None,
    )


@remembered
def build(case: Case) -> Problem:
    """Inputs and reference; both follow from the case's id."""
    request = request_of(case)
    gemm = request.gemm
    assert isinstance(gemm.w, Format)
    weights = tuple(datasets.weight(f"{case.id}#{e}", "w", gemm.w, gemm.n, gemm.k, case.data) for e in range(EXPERTS))
    counts = COUNTS[case.options[-1]]
    total = sum(counts)
    x = datasets.activation(case.id, total, gemm.k, case.data, case.out)
    rows = np.arange(total)
    experts = np.repeat(np.arange(EXPERTS), counts)
    if case.options[0] in ("indexed", "pairs"):
        experts = experts[Stream(case.id, "order").permutation(total)]
    if case.options[0] == "indexed":
        second = np.where(np.arange(total) % 3 == 1, -1, (experts + 1) % EXPERTS)
        experts, rows = np.stack([experts, second], 1).reshape(-1), np.repeat(rows, 2)
    elif case.options[0] == "pairs":
        experts = np.where(np.arange(total) % 7 == 3, -1, experts)
    bias = Stream(case.id, "bias").normal((EXPERTS, gemm.n)) if gemm.bias else None
    products = []
    fmt = gemm.x[0]
    value = plain(x) if fmt.plain else decode(encode.quantize(x, fmt))
    steps = decoding_steps(gemm.w) + (0 if fmt.plain else decoding_steps(fmt))
    for e, w in enumerate(weights):
        products.append(Product(value, decode(w), None if bias is None else bias[e], steps, fmt.plain))
    arrays = {f"w{e}.{n}": to_numpy(t) for e, w in enumerate(weights) for n, t in w.planes().items()}
    arrays.update(x=x, experts=experts, **({} if bias is None else {"bias": bias}))
    return Problem(request, weights, x, rows, experts, bias, tuple(products), fingerprint(arrays))


def run(case: Case, ops: QuantOps) -> Outcome:
    """Prepare the stacked experts, ask with rows as they come and with rows permuted, compare."""
    p = build(case)
    stacked = QTensor.stack(p.weights).to(ops.device)
    bias = None if p.bias is None else torch.from_numpy(p.bias).to(ops.device)
    fmt = p.request.gemm.x[0]
    inputs = () if fmt.plain else (Operand(fmt),)
    granted = claim(ops, p.request)
    if granted is None:
        return refusal(ops, p.request, lambda: ops.prepare(stacked, p.request, inputs=inputs, bias=bias))
    prepared = ops.prepare(stacked, p.request, inputs=inputs, bias=bias)
    back = ops.restore(prepared)
    if not isinstance(back, QTensor) or not back.equal(stacked):
        raise Fault(FailKind.EXACT, "restore(prepare(experts)) differs from what was prepared")
    order = np.arange(len(p.x))
    got = _call(case, ops, p, prepared, order)
    ref, bound = _expected(case, p, granted.numerics)
    verdict = compare(got, ref, bound, case.out)
    if verdict.kind is None and len(p.x) > 1:
        order = _permutation(case, p)
        again = _call(case, ops, p, prepared, order)
        if not np.array_equal(again, got[_result_rows(case, order)], equal_nan=True):
            raise Fault(FailKind.EXACT, "the order of the rows of an expert changes their results")
    return outcome(verdict, granted.numerics, ref.size, granted.support)


def _permutation(case: Case, p: Problem) -> I64:
    """Rows in another order; within their expert where rows are sorted by expert."""
    shuffled = Stream(case.id, "permute").permutation(len(p.x))
    if case.options[0] in ("indexed", "pairs"):
        return shuffled
    return shuffled[np.argsort(p.experts[shuffled], kind="stable")]


def _result_rows(case: Case, order: I64) -> I64:
    return np.stack([2 * order, 2 * order + 1], 1).reshape(-1) if case.options[0] == "indexed" else order


def _expected(case: Case, p: Problem, numerics: NumericsClass) -> tuple[F64, F64]:
    """Reference and bound of every result row; zero for rows that go nowhere."""
    n = p.request.gemm.n
    ref, bound, inner = (np.zeros((len(p.experts), n)) for _ in range(3))
    for e, product in enumerate(p.product):
        mine = np.flatnonzero(p.experts == e)
        expected = product.expected(numerics)
        ref[mine] = expected.ref[p.rows[mine]]
        bound[mine] = error_bound(expected, numerics, case.out)[p.rows[mine]]
        half = 0.5 * ulp(case.out, expected.ref) * (1 + 2.0**-7)
        inner[mine] = np.maximum(error_bound(expected, numerics, case.out) - half, 0.0)[p.rows[mine]]
    if p.request.activation is None:
        return ref, bound
    gate, up = ref[:, : n // 2], ref[:, n // 2 :]
    d_gate, d_up = inner[:, : n // 2], inner[:, n // 2 :]
    with np.errstate(over="ignore"):
        acted = gate / (1.0 + np.exp(-gate))
    result = acted * up
    spread = 1.13 * d_gate * np.abs(up) + np.abs(acted) * d_up + 1.13 * d_gate * d_up + 2.0**-20 * np.abs(result)
    half = 0.5 * ulp(case.out, result) * (1 + 2.0**-7)
    return result, np.where((p.experts < 0)[:, None], 0.0, half + spread)


def _call(case: Case, ops: QuantOps, p: Problem, prepared: Prepared, order: I64) -> F64:
    """One call with the rows in `order`, the second into a poisoned `out`; results per pair, as float64."""
    device, dtype, form = ops.device, DTYPES[case.out], case.options[0]
    x, groups = _arrange(p, form, order, dtype, device)
    guard = guards.place(x, "contiguous" if form == "masked" else case.storage, device)
    width = p.request.gemm.n // (2 if p.request.activation is not None else 1)
    lead = tuple(x.shape[:-1]) if form != "indexed" else (2 * x.shape[0],)
    shape = (*lead, width)
    first = well_formed(ops.grouped_gemm(guard.view, prepared, groups), "grouped_gemm", shape, dtype, device).clone()
    target = guards.poisoned(shape, dtype, "contiguous", device)
    second = ops.grouped_gemm(guard.view, prepared, groups, out=target.view)
    ops.synchronize()
    second = well_formed(second, "grouped_gemm(out=)", shape, dtype, device)
    if guard.changed():
        raise Fault(FailKind.INPUT_MUTATED, "grouped_gemm changed x, or memory beside it")
    if target.touched_outside():
        raise Fault(FailKind.OOB, "grouped_gemm wrote beside out=")
    if second.data_ptr() != target.view.data_ptr():
        raise Fault(FailKind.OUT_IGNORED, "grouped_gemm must write out= and return it")
    y = numbers(target.view).astype(np.float64)
    if form == "masked":
        y, other = (np.concatenate([t[e, :c] for e, c in enumerate(_counts(p))]) for t in (y, numbers(first)))
    else:
        other = numbers(first)
    if not np.array_equal(y, other.astype(np.float64), equal_nan=True) and ops.supports(p.request).deterministic:
        raise Fault(FailKind.NONDETERMINISTIC, "two calls differ, but supports declares deterministic")
    return y


def _counts(p: Problem) -> list[int]:
    return [int((p.experts == e).sum()) for e in range(EXPERTS)]


def _arrange(
    p: Problem, form: str, order: I64, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, Groups]:
    rows = torch.from_numpy(p.x[order]).to(dtype)
    if form == "offsets":
        ends = np.concatenate([[0], np.cumsum(_counts(p))]).astype(np.int32)
        return rows, Offsets(torch.from_numpy(ends).to(device))
    if form == "masked":
        counts = _counts(p)
        x = torch.full((EXPERTS, max(*counts, 1) + 2, rows.shape[1]), float("nan"), dtype=dtype)
        at = 0
        for e, count in enumerate(counts):
            x[e, :count] = rows[at : at + count]
            at += count
        return x, Masked(torch.tensor(counts, dtype=torch.int32, device=device))
    ids = p.experts.reshape(len(p.x), 2 if form == "indexed" else 1)[order].astype(np.int32)
    return rows, Indexed(torch.from_numpy(ids).to(device), None, form == "pairs")
