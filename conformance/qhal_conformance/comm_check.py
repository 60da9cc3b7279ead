"""comm_quant: what every rank gets, bit for bit or within a computed bound; the same bits on every rank.

Ranks are processes of their own over one group (`comm_ranks.py`). `on_rank` is what each does; `run` compares. The bits
on the wire are seen through decode=False, which leaves codes and scales as they arrived; how a backend frames them
is its own affair.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from qhal.codecs import Codec
from qhal.errors import CommError, UnsupportedError
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import CommRequest, NumericsClass, Support
from qhal.tensors import QTensor, same_bits
from qhal_conformance import comm_ranks, elements, guards
from qhal_conformance.cases import Case
from qhal_conformance.comm_reference import Expected, gathered, reduced, shares
from qhal_conformance.decode import numbers, to_numpy
from qhal_conformance.elements import round_wide
from qhal_conformance.encode import quantize
from qhal_conformance.generator import F32, Stream, fingerprint
from qhal_conformance.outcome import FailKind, Outcome, Status
from qhal_conformance.problem import DTYPES, Fault, claim, outcome, refusal, well_formed
from qhal_conformance.quantize_check import compare_planes
from qhal_conformance.remembering import remembered
from qhal_conformance.tolerance import Verdict, compare

_MOVED = ("all_gather", "all_to_all")


@dataclass(frozen=True)
class Problem:
    """x of every rank [T, K], its splits, and which rows of whom every rank gets."""

    request: CommRequest
    xs: list[F32]
    splits: list[list[int]] | None
    inputs_sha: str

    def parts(self, rank: int) -> list[F32]:
        """The part of every rank that rank `rank` gets, or owns."""
        if self.request.collective == "all_gather":
            return self.xs
        found = []
        for source, x in enumerate(self.xs):
            counts = shares(len(x), len(self.xs)) if self.splits is None else self.splits[source]
            first = sum(counts[:rank])
            found.append(x[first : first + counts[rank]])
        return found

    def expected(self, rank: int, out: str) -> Expected:
        """What rank `rank` gets, in rows."""
        codec, collective = self.request.codec, self.request.collective
        if collective in _MOVED:
            return gathered(self.parts(rank), codec, out)
        if collective == "reduce_scatter":
            return reduced(self.parts(rank), rank, codec, out, back=False)
        owners = range(len(self.xs))
        return Expected.joined([reduced(self.parts(owner), owner, codec, out, back=True) for owner in owners])


def request_of(case: Case) -> CommRequest:
    """What is asked of `supports`."""
    declared = dict(option.split("=", 1) for option in case.options if "=" in option)
    codec = Codec(
        Format.parse(case.subject),
        order="parity" if case.has("parity") else "sequential",
        planes=tuple(int(bits) for bits in declared["planes"].split(",")) if "planes" in declared else (),
        accumulate=declared.get("acc", "fp32"),
        quantize_own=not case.has("own"),
        requantize=not case.has("once"),
    )
    return CommRequest(
        collective=case.options[0],  # type: ignore[arg-type]
        codec=codec,
        world=case.size("w"),
        x=DTYPES[case.out],
        numel=case.size("t") * case.size("k"),
        decode=not case.has("codes"),
    )


@remembered
def build(case: Case) -> Problem:
    """Inputs of every rank; they follow from the case's id."""
    request, world, rows = request_of(case), case.size("w"), case.size("t")
    splits, counts = None, [rows] * world
    if case.has("uneven"):
        if request.collective == "all_gather":
            counts = [rows - r for r in range(world)]
            splits = [counts] * world
        elif request.collective == "reduce_scatter":  # the first part is empty
            splits = [[0, *shares(rows, world - 1)]] * world
        else:
            splits = [[(r + 2 * c + 1) % 4 for c in range(world)] for r in range(world)]
            counts = [sum(row) for row in splits]
    xs = [_rows(case, request, rank, n) for rank, n in enumerate(counts)]
    return Problem(request, xs, splits, fingerprint({f"x{r}": x for r, x in enumerate(xs)}))


def _rows(case: Case, request: CommRequest, rank: int, rows: int) -> F32:
    g = Stream(case.id, f"x{rank}")
    shape = (rows, case.size("k"))
    if case.data == "integers":
        top = int(elements.largest(request.codec.format.element))
        x = g.integers(-min(top, 127), min(top, 127) + 1, shape).astype(np.float32)
        x[:, ::16], x[:, 1::16] = top, -top  # in every block, of either order
        return x
    x = g.normal(shape)
    if case.data == "ranks":
        x = x * np.float32(8.0**rank)
    return round_wide(case.out, np.abs(x) + np.float32(2.0**-4) if case.data == "positive" else x)


def on_rank(case: Case, ops: QuantOps, rank: int, group: Any) -> dict[str, Any]:
    """One rank's calls: by itself, into `out`, and where sums are exact with the next rank's numbers."""
    p = build(case)
    first, kept = _call(case, ops, p, rank, group, p.xs[rank])
    found: dict[str, Any] = {"elements": first.numel() if isinstance(first, torch.Tensor) else 0}
    if isinstance(first, QTensor):
        rows = np.concatenate(p.parts(rank))
        wrong = compare_planes(first.to("cpu"), quantize(rows, p.request.codec.format))
        if wrong is not None and wrong.kind is not None:
            raise Fault(wrong.kind, wrong.reason)
        return {"elements": rows.size, "rows": None}
    found["rows"] = _packed(kept)
    if case.data == "integers" and p.request.collective == "all_reduce":
        moved, _ = _call(case, ops, p, rank, group, p.xs[(rank + 1) % len(p.xs)])
        assert isinstance(moved, torch.Tensor)
        found["moved"] = _packed(moved)
    return found


def _call(
    case: Case, ops: QuantOps, p: Problem, rank: int, group: Any, x: F32
) -> tuple[torch.Tensor | QTensor, torch.Tensor]:
    r, device, dtype = p.request, ops.device, DTYPES[case.out]
    splits = None if p.splits is None else p.splits[rank]
    host = torch.from_numpy(x).to(dtype)
    shape: tuple[int, ...] = tuple(host.shape)
    if case.has("deep"):
        shape = (2, shape[0] // 2, shape[1])
    guard = guards.place(host.reshape(shape), case.storage if len(shape) == 2 else "offset", device)

    def ask(out: torch.Tensor | None) -> Any:
        asynchronous = case.has("async")
        y = ops.comm_quant(
            guard.view, r.collective, r.codec, group, splits=splits, decode=r.decode, out=out, async_op=asynchronous
        )
        if not asynchronous:
            return y
        if not callable(getattr(y, "wait", None)):
            raise Fault(FailKind.RETURN, f"comm_quant(async_op=True) returned {type(y).__name__}, must have wait()")
        return y.wait()

    first = ask(None)
    ops.synchronize()
    if not r.decode:
        if not isinstance(first, QTensor):
            raise Fault(FailKind.RETURN, f"comm_quant(decode=False) returned {type(first).__name__}, must be a QTensor")
        if guard.changed():
            raise Fault(FailKind.INPUT_MUTATED, "comm_quant changed x, or memory beside it")
        return first if first.layout == "canonical" else _canonical(ops, first), torch.empty(0)
    wanted = shape if r.collective == "all_reduce" else (sum(len(part) for part in p.parts(rank)), shape[-1])
    if r.collective == "reduce_scatter":
        wanted = (len(p.parts(rank)[0]), shape[-1])
    kept = well_formed(first, "comm_quant", wanted, dtype, device).clone()
    target = guards.poisoned(wanted, dtype, "contiguous", device)
    second = well_formed(ask(target.view), "comm_quant(out=)", wanted, dtype, device)
    ops.synchronize()
    if guard.changed():
        raise Fault(FailKind.INPUT_MUTATED, "comm_quant changed x, or memory beside it")
    if target.touched_outside():
        raise Fault(FailKind.OOB, "comm_quant wrote beside out=")
    if second.data_ptr() != target.view.data_ptr():
        raise Fault(FailKind.OUT_IGNORED, "comm_quant must write out= and return it")
    if not same_bits(kept, target.view.clone()) and ops.supports(r).deterministic:
        raise Fault(FailKind.NONDETERMINISTIC, "two calls differ, but supports declares deterministic")
    return kept, target.view.clone()


def _canonical(ops: QuantOps, q: QTensor) -> QTensor:
    back = ops.restore(q)
    if not isinstance(back, QTensor):
        raise Fault(FailKind.RETURN, f"restore returned {type(back).__name__}, must be a QTensor")
    return back


def _packed(y: torch.Tensor) -> dict[str, str]:
    """A result for the way between processes: its numbers as float32, and the hash of its bits."""
    values = np.ascontiguousarray(numbers(y), dtype="<f4")
    return {"values": base64.b64encode(values.tobytes()).decode(), "bits": sha256(to_numpy(y).tobytes()).hexdigest()}


def _unpacked(packed: dict[str, str], like: F32) -> F32:
    return np.frombuffer(base64.b64decode(packed["values"]), dtype="<f4").reshape(like.shape)


def run(case: Case, ops: QuantOps) -> Outcome:
    """Ask the ranks, and compare what each got."""
    p = build(case)
    granted = claim(ops, p.request)
    if granted is None:
        return refusal(ops, p.request, lambda: _refused(case, ops, p))
    answers = comm_ranks.ask(ops, case)
    if isinstance(answers, Outcome):
        return answers
    for rank, answer in enumerate(answers):
        if "unsupported" in answer:
            raise Fault(FailKind.CLAIM, f"supports claims it, rank {rank} refuses: {answer['unsupported']}")
        if "fault" in answer:
            kind, reason = answer["fault"]
            raise Fault(FailKind(kind), f"rank {rank} of {len(answers)}: {reason}")
        if "error" in answer:
            return Outcome(Status.ERROR, reason=f"rank {rank} of {len(answers)}: {answer['error']}")
    verdict = Verdict(None, "", None, 0.0)
    if p.request.decode:
        verdict = _compared(case, p, answers, granted.numerics)
    total = sum(answer["elements"] for answer in answers)
    return outcome(verdict, granted.numerics, total, granted.support)


def _refused(case: Case, ops: QuantOps, p: Problem) -> None:
    """A refused call, at first without a group: most backends refuse before they look at it. Raises what it raised."""
    r, splits = p.request, None if p.splits is None else p.splits[0]
    x = torch.from_numpy(p.xs[0]).to(DTYPES[case.out]).to(ops.device)
    try:
        ops.comm_quant(x, r.collective, r.codec, None, splits=splits, decode=r.decode)
    except CommError:
        answers = comm_ranks.ask(ops, case)
        if isinstance(answers, Outcome):
            if answers.status is Status.SKIP:  # too few devices for the ranks: the refusal stands, untried
                raise UnsupportedError(Support("unsupported", f"not tried: {answers.reason}")) from None
            raise RuntimeError(answers.reason) from None
        for answer in answers:
            if "unsupported" in answer:
                raise UnsupportedError(Support("unsupported", answer["unsupported"])) from None
            if "error" in answer or "fault" in answer:
                raise RuntimeError(answer.get("error") or answer["fault"][1]) from None


def _compared(case: Case, p: Problem, answers: list[dict[str, Any]], numerics: NumericsClass) -> Verdict:
    """Every rank's numbers, then that ranks agree, then that the order of the ranks has no influence on exact sums."""
    exact = p.request.collective in _MOVED or case.data == "integers"
    worst = Verdict(None, "", None, 0.0)
    for rank, answer in enumerate(answers):
        e = p.expected(rank, case.out)
        ref, bound = (e.value.astype(np.float64), np.zeros(e.ref.shape)) if exact else (e.ref, e.bound)
        for name in ("rows", "moved"):
            if name in answer:
                verdict = compare(_unpacked(answer[name], e.value).astype(np.float64), ref, bound, case.out)
                if verdict.kind is not None:
                    what = "" if name == "rows" else ", the ranks' numbers exchanged"
                    return replace(verdict, detail=f"rank {rank} of {len(answers)}{what}: {verdict.detail}")
                worst = verdict if verdict.headroom >= worst.headroom else worst
    if p.request.collective in ("all_reduce", "all_gather") and len({a["rows"]["bits"] for a in answers}) > 1:
        return Verdict(FailKind.EXACT, "the ranks have different bits", None, 0.0)
    return worst
