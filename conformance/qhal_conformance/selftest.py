"""selftest: may an engine use this backend for this checkpoint? The cases that its formats need, within a minute.

Three answers. `usable`: everything that will be asked is claimed, and every form of it passed. `unusable`: something is
refused, a downgrade, or wrong. `unproven`: nothing is wrong, but the suite has no case for something, or the time was
over. It is no verdict of conformance: that takes a whole run (`qhal conformance run`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

import qhal
from qhal.interface import QuantOps
from qhal.layer_formats import LayerFormat
from qhal.layers import requests
from qhal.requests import Arithmetic, GemmRequest, GroupedRequest, HadamardRequest, QuantizeRequest, Request, Support
from qhal_conformance.cases import Case
from qhal_conformance.covering import PROFILE, cases_for
from qhal_conformance.covering import form as form_of
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.problem import first_line
from qhal_conformance.runner import Record, run_cases

BUDGET = 60.0
"""Seconds."""
Seen = Callable[[Record, int], None]
_PER_SUBJECT = 2


@dataclass
class Form:
    """Needs that the same kernels execute: which layers have them, which cases show them, how those ended."""

    name: str
    layers: list[str] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    passed: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Selftest:
    """What was found. wrong: why not to use it. uncovered: what nothing here shows. Each is one line for a log."""

    backend: str
    wrong: tuple[str, ...]
    uncovered: tuple[str, ...]
    forms: tuple[Form, ...]
    records: tuple[Record, ...]
    unreached: tuple[Case, ...]
    seconds: float

    @property
    def verdict(self) -> Literal["usable", "unusable", "unproven"]:
        """What an engine acts on."""
        return "unusable" if self.wrong else "unproven" if self.uncovered else "usable"

    def __bool__(self) -> bool:
        """Whether it is usable."""
        return self.verdict == "usable"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {
            "backend": self.backend,
            "verdict": self.verdict,
            "wrong": list(self.wrong),
            "uncovered": list(self.uncovered),
            "forms": [
                {"form": f.name, "layers": f.layers, "cases": [c.id for c in f.cases], "passed": f.passed}
                for f in self.forms
            ],
            "cases": [
                {"id": r.case.id, "status": r.outcome.status.value, "headroom": r.outcome.headroom}
                for r in self.records
            ],
            "unreached": [case.id for case in self.unreached],
            "seconds": round(self.seconds, 3),
        }


def selftest(
    backend: QuantOps | str,
    formats: Iterable[LayerFormat] | None = None,
    *,
    also: Iterable[tuple[str, Request]] = (),
    dtype: torch.dtype = torch.bfloat16,
    budget: float = BUDGET,
    seen: Seen = lambda record, planned: None,
) -> Selftest:
    """Run what matters, in order of importance, until the budget is used up.

    backend  the operations, or what `qhal.select` takes
    formats  of the layers that will run (`Checkpoint.layer_formats()`)
    also     (layer name, request) of what an engine asks beyond the layers themselves, such as attention; with neither:
             a little of everything that is claimed
    dtype    of the activations
    budget   seconds; a case that has begun is finished
    seen     called after every case with its record and how many are planned
    """
    start = time.perf_counter()
    ops = qhal.select(backend) if isinstance(backend, str) else backend
    wrong: list[str] = []
    uncovered: list[str] = []
    beside = list(also)
    whole = formats is None and not beside
    forms = _claimed() if whole else _needed(ops, formats or (), beside, dtype, wrong, uncovered)
    plan = _in_turns([_contract(), *(form.cases for form in forms)])
    records: list[Record] = []
    reached = 0

    def within() -> Iterator[Case]:
        nonlocal reached
        for case in plan:
            if time.perf_counter() - start > budget:
                return
            reached += 1
            if case.profile != PROFILE or _inputs(case, uncovered):
                yield case

    def noted(record: Record) -> None:
        records.append(record)
        seen(record, len(plan))

    _run(ops, within(), noted)
    done = {record.case.id: record for record in records}
    unreached = tuple(plan[reached:])
    wrong += [_wrong(r, ops.name) for r in records if r.outcome.status in (Status.FAIL, Status.ERROR)]
    if unreached:
        uncovered.append(f"not reached in {budget:g} s: {len(unreached)} of {len(plan)} cases, {unreached[0].id} first")
    for form in forms:
        _account(form, done)
        if not whole and form.cases and not form.passed and not wrong and not unreached:
            uncovered.append(f"{form.name}: no case of it could be run ({form.refused or 'no inputs'})")
    if whole and not any(form.passed for form in forms) and not wrong:
        wrong.append(f"{ops.name} executes nothing that the suite asks for")
    seconds = time.perf_counter() - start
    found = tuple(form for form in forms if form.passed or not whole)
    return Selftest(ops.name, tuple(wrong), tuple(uncovered), found, tuple(records), unreached, seconds)


def _run(ops: QuantOps, cases: Iterable[Case], seen: Callable[[Record], None]) -> None:
    """One case after the other, in this process. `cases` ends when the time is over."""
    run_cases(ops, cases, seen)


def _needed(
    ops: QuantOps,
    formats: Iterable[LayerFormat],
    also: Iterable[tuple[str, Request]],
    dtype: torch.dtype,
    wrong: list[str],
    uncovered: list[str],
) -> list[Form]:
    """The forms of everything that will be asked; what is refused or has no case is said at once."""
    layers: dict[Request, list[str]] = {}
    for name, need in [*_needs(formats, dtype), *also]:
        layers.setdefault(need, []).append(name)
    forms: dict[Request, Form] = {}
    for need, names in layers.items():
        if (reason := _refused(ops, need)) is not None:
            wrong.append(f"{_shown(names)}: {need}: {reason}")
            continue
        found = forms.setdefault(form_of(need), Form(str(need)))
        found.layers += names
        found.cases += [case for case in cases_for(need) if case not in found.cases]
    for found in forms.values():
        if not found.cases:
            uncovered.append(f"not covered by the suite: {found.name} ({_shown(found.layers)})")
    for need in list(forms):  # a product quantizes its x with the bits of `quantize`, where that is claimed too
        for inner in _quantizations(need, dtype):
            if inner not in forms and _refused(ops, inner) is None:
                forms[inner] = Form(str(inner), list(forms[need].layers), cases_for(inner))
    uncovered += [f"not covered by the suite: the fused `{name}` of {ops.name}" for name in sorted(ops.fusions)]
    return list(forms.values())


def _needs(formats: Iterable[LayerFormat], dtype: torch.dtype) -> Iterator[tuple[str, Request]]:
    """(layer, request): a weight that meets two inputs is asked once for each."""
    for f in formats:
        for request in requests(f, dtype):
            if isinstance(request, GemmRequest):
                yield from ((f.name, _one_input(request, i)) for i in range(len(request.x)))
            elif isinstance(request, GroupedRequest):
                yield from (
                    (f.name, replace(request, gemm=_one_input(request.gemm, i))) for i in range(len(request.gemm.x))
                )
            else:
                yield f.name, request


def _one_input(r: GemmRequest, index: int) -> GemmRequest:
    return replace(r, x=(r.x[index],), static=(True,) if any(r.static[index : index + 1]) else ())


def _quantizations(need: Request, dtype: torch.dtype) -> Iterator[QuantizeRequest]:
    gemm = need.gemm if isinstance(need, GroupedRequest) else need
    if isinstance(gemm, GemmRequest):
        yield from (QuantizeRequest(x=dtype, format=x, static=any(gemm.static)) for x in gemm.x if not x.plain)
    elif isinstance(gemm, HadamardRequest) and gemm.quantize is not None:
        yield QuantizeRequest(x=gemm.x, format=gemm.quantize)


def _refused(ops: QuantOps, request: Request) -> str | None:
    """Why a request will not be executed as it is asked, or None."""
    try:
        support = ops.supports(request)
    except Exception as error:
        return f"supports must never raise; it raised {type(error).__name__}: {first_line(error)}"
    if not isinstance(support, Support):
        return f"supports returned {type(support).__name__}, must be a Support"
    if not support:
        return f"refused, {support.level}: {support.reason}"
    asked, runs = Arithmetic.of(request), support.arithmetic
    if asked is not None and runs is not None and (asked.x, asked.w) != (runs.x, runs.w):
        return f"a downgrade: asked is {asked}, would run {runs}"
    return None


def _claimed() -> list[Form]:
    """A short subset of every operation: the most telling required cases of every subject; refusals are no fault."""
    forms: dict[tuple[str, str], Form] = {}
    for case in sorted((c for c in catalogue(0) if c.required and c.operation != "contract"), key=_telling):
        form = forms.setdefault((case.operation, case.subject), Form(f"{case.operation} {case.subject}"))
        if len(form.cases) < _PER_SUBJECT:
            form.cases.append(case)
    return list(forms.values())


def _telling(case: Case) -> int:
    """Data sets in the order in which they show most faults."""
    order = ("onehot", "grid", "impulse", "scattered", "uniform", "codes", "ties", "normal", "dominant")
    return order.index(case.data) if case.data in order else len(order)


def _contract() -> list[Case]:
    return [case for case in catalogue(0) if case.operation == "contract"]


def _in_turns(lists: list[list[Case]]) -> list[Case]:
    """The contract's rules, then the first case of every form, then the second of every form, ..."""
    first, *rest = lists
    longest = max((len(cases) for cases in rest), default=0)
    turns = [cases[i] for i in range(longest) for cases in rest if i < len(cases)]
    return list({case.id: case for case in [*first, *turns]}.values())


def _inputs(case: Case, uncovered: list[str]) -> bool:
    """Whether the suite can make the inputs of a case made for a form; if not, that is no fault of a backend."""
    try:
        OPERATIONS[case.operation].sha(case)
    except Exception as error:
        uncovered.append(f"not covered by the suite: {case.id}: {type(error).__name__}: {first_line(error)}")
        return False
    return True


def _account(form: Form, done: dict[str, Record]) -> None:
    for case in form.cases:
        outcome = done[case.id].outcome if case.id in done else None
        if outcome is not None and outcome.status == Status.PASS:
            form.passed += 1
        elif outcome is not None and outcome.status in (Status.UNSUPPORTED, Status.SKIP):
            form.refused = outcome.reason


def _wrong(record: Record, backend: str) -> str:
    again = "" if record.case.profile == PROFILE else f"; qhal conformance repro '{record.case.id}' --backend {backend}"
    return f"{record.case.id}: {record.outcome.reason}{again}"


def _shown(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
