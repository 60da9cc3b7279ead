"""grouped_gemm: gemm per expert in the three forms of groups, judged row by row like gemm, plus what must be exact.

Exact: an expert without rows, all rows in one expert, a permutation of the rows of an expert permutes its results bit
for bit, whatever stands past a count, past the last offset or behind id -1 does not leak. `grouped_reference.py` has
the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qhal.groups import Groups, Indexed, Masked, Offsets
from qhal.interface import QuantOps
from qhal.prepared import Prepared
from qhal.requests import GroupedRequest, NumericsClass
from qhal.specs import Operand
from qhal.tensors import QTensor
from qhal_conformance import datasets, encode, guards
from qhal_conformance.cases import Case
from qhal_conformance.decode import decode, plain, to_numpy
from qhal_conformance.generator import F32, I64, Stream, fingerprint
from qhal_conformance.grouped_cases import COUNTS, EXPERTS, request_of, top_k
from qhal_conformance.grouped_reference import Rows, activated, judge_quantized, pairs, summed
from qhal_conformance.outcome import FailKind, Outcome
from qhal_conformance.problem import DTYPES, Fault, claim, outcome, refusal, well_formed
from qhal_conformance.reference import Product, decoding_steps
from qhal_conformance.remembering import remembered
from qhal_conformance.tolerance import Verdict, compare

Result = torch.Tensor | QTensor


@dataclass(frozen=True)
class Problem:
    """x in the form's shape, which rows go to which expert, and the reference of every result row.

    experts, rows  of every pair: its expert (-1: nowhere) and its row of x
    weights        [T, top_k] of the sum, None for pairs
    static         [E, 1] scales of x
    """

    request: GroupedRequest
    w: tuple[QTensor, ...]
    x: F32
    experts: I64
    rows: I64
    bias: F32 | None
    weights: F32 | None
    static: F32 | None
    product: tuple[Product, ...]
    inputs_sha: str

    def expected(self, numerics: NumericsClass, out: str) -> Rows:
        """Reference and bound of every result row."""
        y = pairs(self.product, self.experts, self.rows, self.request.gemm.n, numerics, out)
        if self.request.activation is not None:
            y = activated(y, self.request.activation)
        return y if self.weights is None else summed(y, self.weights, self.experts)


@remembered
def build(case: Case) -> Problem:
    """Inputs and reference; both follow from the case's id."""
    request = request_of(case)
    gemm, fmt = request.gemm, request.gemm.x[0]
    ws = tuple(datasets.weight(f"{case.id}#{e}", "w", gemm.w, gemm.n, gemm.k, case.data) for e in range(EXPERTS))  # type: ignore[arg-type]
    experts, rows, tokens = _pairs(case)
    x = datasets.activation(case.id, int(rows.max(initial=-1)) + 1, gemm.k, case.data, case.out)
    bias = Stream(case.id, "bias").normal((EXPERTS, gemm.n)) if gemm.bias else None
    weights = Stream(case.id, "weights").mantissas(23, (tokens, top_k(case))) - np.float32(0.75)
    static = None
    if case.has("static"):
        static = (np.float32(2.5 / 127) * (1 + np.arange(EXPERTS, dtype=np.float32) / 4)).reshape(-1, 1)
    steps = decoding_steps(ws[0].format) + (0 if fmt.plain else decoding_steps(fmt))
    products = []
    for e, w in enumerate(ws):
        scale = None if static is None else static[e]
        value = plain(x) if fmt.plain else decode(encode.quantize(x, fmt, scale=scale))
        products.append(Product(value, decode(w), None if bias is None else bias[e], steps, fmt.plain))
    arrays = {f"w{e}.{n}": to_numpy(t) for e, w in enumerate(ws) for n, t in w.planes().items()}
    arrays.update(x=x, experts=experts)
    given = weights if case.has("weights") else None
    arrays.update({n: v for n, v in (("bias", bias), ("weights", given), ("static", static)) if v is not None})
    return Problem(request, ws, x, experts, rows, bias, given, static, tuple(products), fingerprint(arrays))


def _pairs(case: Case) -> tuple[I64, I64, int]:
    """(expert of every pair, row of x of every pair, tokens)"""
    form, counts, k = case.options[0], COUNTS[case.options[-1]], top_k(case)
    tokens = sum(counts)
    experts = np.repeat(np.arange(EXPERTS), counts)
    if form in ("offsets", "masked"):
        return experts, np.arange(tokens), tokens
    experts = experts[Stream(case.id, "order").permutation(tokens)]
    if k == 1:
        experts = np.where(np.arange(tokens) % 7 == 3, -1, experts)[:, None]
    else:
        second = np.where(np.arange(tokens) % 3 == 1, -1, (experts + 1) % EXPERTS)
        experts = np.stack([experts, second, experts, (experts + 2) % EXPERTS], 1)[:, :k]
    if case.has("nowhere"):
        experts = np.full_like(experts, -1)
    flat = experts.reshape(-1)
    return flat, np.arange(flat.size) if form == "pairs" else np.repeat(np.arange(tokens), k), tokens


def run(case: Case, ops: QuantOps) -> Outcome:
    """Prepare the stacked experts, ask with rows as they come and with rows permuted, compare."""
    p = build(case)
    stacked = QTensor.stack(p.w).to(ops.device)
    bias = None if p.bias is None else torch.from_numpy(p.bias).to(ops.device)
    fmt = p.request.gemm.x[0]
    static = None if p.static is None else torch.from_numpy(p.static).to(ops.device)
    inputs = () if fmt.plain or case.has("coded") else (Operand(fmt, static, per_expert=static is not None),)
    granted = claim(ops, p.request)
    if granted is None:
        return refusal(ops, p.request, lambda: ops.prepare(stacked, p.request, inputs=inputs, bias=bias))
    prepared = ops.prepare(stacked, p.request, inputs=inputs, bias=bias)
    back = ops.restore(prepared)
    if not isinstance(back, QTensor) or not back.equal(stacked):
        raise Fault(FailKind.EXACT, "restore(prepare(experts)) differs from what was prepared")
    tokens = len(p.experts) // top_k(case)
    got = _call(case, ops, p, prepared, np.arange(tokens))
    expected = p.expected(granted.numerics, case.out)
    verdict = _judge(case, got, expected)
    if verdict.kind is None and tokens > 1:
        order = _permutation(case, p, tokens)
        again = _call(case, ops, p, prepared, order)
        place = torch.from_numpy(_result_rows(case, p, order))
        for one, other in zip(_planes(again), _planes(got), strict=True):
            if not torch.equal(one, other[place]):
                raise Fault(FailKind.EXACT, "the order of the rows of an expert changes their results")
    return outcome(verdict, granted.numerics, expected.ref.size, granted.support)


def _judge(case: Case, got: Result, expected: Rows) -> Verdict:
    if isinstance(got, QTensor):
        return judge_quantized(got, expected, case.out)
    y = got.float().numpy().astype(np.float64)
    return compare(y, expected.ref, expected.bound(case.out), case.out)


def _planes(y: Result) -> list[torch.Tensor]:
    """Bits, row by row."""
    if isinstance(y, QTensor):
        assert isinstance(y.scale, torch.Tensor)
        return [y.codes.view(torch.uint8), y.scale]
    return [y.contiguous().view(torch.int16)]


def _permutation(case: Case, p: Problem, tokens: int) -> I64:
    """Tokens in another order; within their expert where rows are sorted by expert."""
    shuffled = Stream(case.id, "permute").permutation(tokens)
    if case.options[0] in ("indexed", "pairs"):
        return shuffled
    return shuffled[np.argsort(p.experts[shuffled], kind="stable")]


def _result_rows(case: Case, p: Problem, order: I64) -> I64:
    """Which rows of the first result the rows of a permuted call must equal."""
    k = top_k(case)
    return order if p.weights is not None else np.asarray((order[:, None] * k + np.arange(k)).reshape(-1))


def _call(case: Case, ops: QuantOps, p: Problem, prepared: Prepared, order: I64) -> Result:
    """Two calls with the tokens in `order`, the second into a poisoned `out`; the rows that count, on the host."""
    device, dtype, form = ops.device, DTYPES[case.out], case.options[0]
    rows, groups = _arrange(case, p, order, dtype, device)
    guard = guards.place(rows, "contiguous" if form == "masked" else case.storage, device)
    x: Result = guard.view
    if case.has("coded"):
        x = ops.quantize(torch.nan_to_num(guard.view), p.request.gemm.x[0])
    a = p.request.activation
    width = p.request.gemm.n // (2 if a is not None and a.gated else 1)
    lead = tuple(rows.shape[:-1])
    if form in ("indexed", "pairs"):
        lead = (len(order) * (1 if p.weights is not None else top_k(case)),)
    shape = (*lead, width)
    if p.request.quantize is not None:
        return _quantized(ops, p, prepared, x, groups, shape, guard)
    first = well_formed(ops.grouped_gemm(x, prepared, groups), "grouped_gemm", shape, dtype, device).clone()
    target = guards.poisoned(shape, dtype, "contiguous", device)
    second = ops.grouped_gemm(x, prepared, groups, out=target.view)
    ops.synchronize()
    second = well_formed(second, "grouped_gemm(out=)", shape, dtype, device)
    if guard.changed():
        raise Fault(FailKind.INPUT_MUTATED, "grouped_gemm changed x, or memory beside it")
    if target.touched_outside():
        raise Fault(FailKind.OOB, "grouped_gemm wrote beside out=")
    if second.data_ptr() != target.view.data_ptr():
        raise Fault(FailKind.OUT_IGNORED, "grouped_gemm must write out= and return it")
    kept, other = (_counted(case, p, y.cpu()) for y in (target.view, first))
    if ops.supports(p.request).deterministic and not torch.equal(
        *(y.contiguous().view(torch.int16) for y in (kept, other))
    ):
        raise Fault(FailKind.NONDETERMINISTIC, "two calls differ, but supports declares deterministic")
    return kept


def _quantized(
    ops: QuantOps,
    p: Problem,
    prepared: Prepared,
    x: Result,
    groups: Groups,
    shape: tuple[int, ...],
    guard: guards.Guarded,
) -> QTensor:
    """The same for a result that is quantized."""
    first = ops.grouped_gemm(x, prepared, groups)
    if not isinstance(first, QTensor):
        raise Fault(FailKind.RETURN, f"grouped_gemm returned {type(first).__name__}, the request quantizes: a QTensor")
    if first.layout == "canonical":
        target = guards.poisoned_like(first)
        again = ops.grouped_gemm(x, prepared, groups, out=target)
        if not isinstance(again, QTensor) or again.codes.data_ptr() != target.codes.data_ptr():
            raise Fault(FailKind.OUT_IGNORED, "grouped_gemm must write out= and return it")
        first = target
    ops.synchronize()
    if guard.changed():
        raise Fault(FailKind.INPUT_MUTATED, "grouped_gemm changed x, or memory beside it")
    back = first if first.layout == "canonical" else ops.restore(first)
    assert isinstance(back, QTensor) and p.request.quantize is not None
    if tuple(back.codes.shape) != shape or back.format.storage != p.request.quantize.storage:
        raise Fault(FailKind.SHAPE, f"a quantized result is {back.format} {tuple(back.codes.shape)}, must be {shape}")
    return back.to("cpu")


def _counted(case: Case, p: Problem, y: torch.Tensor) -> torch.Tensor:
    """The rows of a result that mean something."""
    if case.options[0] == "masked":
        return torch.cat([y[e, :count] for e, count in enumerate(_counts(p))])
    return y[: len(p.experts)] if case.has("spare") else y


def _counts(p: Problem) -> list[int]:
    return [int((p.experts == e).sum()) for e in range(EXPERTS)]


def _arrange(
    case: Case, p: Problem, order: I64, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, Groups]:
    form, k = case.options[0], top_k(case)
    chosen = (order[:, None] * k + np.arange(k)).reshape(-1) if form == "pairs" else order
    rows = torch.from_numpy(p.x[chosen]).to(dtype)
    if form == "offsets":
        ends = np.concatenate([[0], np.cumsum(_counts(p))]).astype(np.int32)
        if case.has("spare"):
            rows = torch.cat([rows, torch.full_like(rows[:3], float("nan"))])
        return rows, Offsets(torch.from_numpy(ends).to(device))
    if form == "masked":
        counts = _counts(p)
        most = max(*counts, 1) + (0 if case.has("full") else 2)
        x = torch.full((EXPERTS, most, rows.shape[1]), float("nan"), dtype=dtype)
        at = 0
        for e, count in enumerate(counts):
            x[e, :count] = rows[at : at + count]
            at += count
        return x, Masked(torch.tensor(counts, dtype=torch.int32, device=device))
    ids = torch.from_numpy(p.experts.reshape(-1, k)[order].astype(np.int32)).to(device)
    weights = None if p.weights is None else torch.from_numpy(p.weights[order]).to(device)
    return rows, Indexed(ids, weights, form == "pairs")
