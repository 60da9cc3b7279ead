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

from qhal.errors import BackendError
from qhal.interface import QuantOps
from qhal.layer_formats import LayerFormat
from qhal.layers import requests
from qhal.requests import GemmRequest, GroupedRequest, HadamardRequest, QuantizeRequest, Request
from qhal_conformance.asking import Apart, Asked, Here
from qhal_conformance.cases import Case
from qhal_conformance.covering import cases_for
from qhal_conformance.covering import form as form_of
from qhal_conformance.isolated import NotLoadedError
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.problem import first_line
from qhal_conformance.report import repro
from qhal_conformance.runner import NO_INPUTS, Record

BUDGET = 60.0
"""Seconds."""
Need = tuple[str, Request]
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
    in_process: bool = False,
    seen: Seen = lambda record, planned: None,
) -> Selftest:
    """Run what matters, in order of importance, until the budget is used up.

    backend     the operations as `qhal.select` gave them, or what it takes
    formats     of the layers that will run (`Checkpoint.layer_formats()`)
    also        (layer name, request) of what an engine asks beyond the layers themselves, such as attention; with
                neither: a little of everything that is claimed
    dtype       of the activations
    budget      seconds, the start of the worker included; a case may take a third of it
    in_process  ask this very object, in this process: for debuggers, and where a second process cannot have the device.
                A crash or a hang of the backend is then the caller's, and a case that has begun is finished
    seen        called after every case with its record and how many are planned

    Otherwise a process of its own loads the backend again, with its own share of the device's memory, and is ended
    before this returns. BackendError where there is no such backend, or an object was not made by `qhal.select`.
    """
    start = time.monotonic()
    beside = list(also)
    needs = None if formats is None and not beside else [*_needs(formats or (), dtype), *beside]
    asked: Asked
    try:
        asked = Here(backend, start + budget) if in_process else Apart(backend, start + budget, budget / 3)
    except NotLoadedError as error:
        name = backend if isinstance(backend, str) else backend.name
        return Selftest(name, (str(error),), (), (), (), (), time.monotonic() - start)
    with asked:
        found = _judged(asked, needs, dtype, seen)
    if found.unreached and not asked.gone:
        first = found.unreached[0].id
        planned = len(found.records) + len(found.unreached)
        text = f"not reached in {budget:g} s: {len(found.unreached)} of {planned} cases, {first} first"
        found = replace(found, uncovered=(*found.uncovered, text))
    return replace(found, seconds=time.monotonic() - start)


def _judged(asked: Asked, needs: list[Need] | None, dtype: torch.dtype, seen: Seen) -> Selftest:
    wrong: list[str] = []
    uncovered: list[str] = []
    try:
        forms = _claimed() if needs is None else _needed(asked, needs, dtype, wrong, uncovered)
    except BackendError as error:
        return Selftest(asked.name, (first_line(error),), (), (), (), (), 0.0)
    plan = _in_turns([_contract(), *(form.cases for form in forms)])
    records: list[Record] = []
    for case in plan:
        record = asked.run(case)
        if record is None:
            break
        records.append(record)
        seen(record, len(plan))
    unreached = tuple(plan[len(records) :])
    wrong += [_wrong(r, asked.spec) for r in records if r.outcome.status in (Status.FAIL, Status.ERROR)]
    wrong += [asked.gone] if asked.gone else []
    skipped = [r for r in records if r.outcome.reason.startswith(NO_INPUTS)]
    uncovered += [f"not covered by the suite: {r.case.id}: {r.outcome.reason}" for r in skipped]
    done = {record.case.id: record for record in records}
    for form in forms:
        _account(form, done)
        if needs is not None and form.cases and not form.passed and not wrong and not unreached:
            uncovered.append(f"{form.name}: no case of it could be run ({form.refused or 'no inputs'})")
    if needs is None and not any(form.passed for form in forms) and not wrong and not unreached:
        wrong.append(f"{asked.name} executes nothing that the suite asks for")
    shown = tuple(form for form in forms if form.passed or needs is not None)
    return Selftest(asked.name, tuple(wrong), tuple(uncovered), shown, tuple(records), unreached, 0.0)


def _needed(asked: Asked, needs: list[Need], dtype: torch.dtype, wrong: list[str], uncovered: list[str]) -> list[Form]:
    """The forms of everything that will be asked; what is refused or has no case is said at once."""
    layers: dict[Request, list[str]] = {}
    for name, need in needs:
        layers.setdefault(need, []).append(name)
    inner = [quantization for need in layers for quantization in _quantizations(need, dtype)]
    reasons, fusions = asked.refusals(list(dict.fromkeys([*layers, *inner])))
    forms: dict[Request, Form] = {}
    for need, names in layers.items():
        if (reason := reasons[need]) is not None:
            wrong.append(f"{_shown(names)}: {need}: {reason}")
            continue
        found = forms.setdefault(form_of(need), Form(str(need)))
        found.layers += names
        found.cases += [case for case in cases_for(need) if case not in found.cases]
    for found in forms.values():
        if not found.cases:
            uncovered.append(f"not covered by the suite: {found.name} ({_shown(found.layers)})")
    for need in list(forms):  # a product quantizes its x with the bits of `quantize`, where that is claimed too
        for quantization in _quantizations(need, dtype):
            if quantization not in forms and reasons.get(quantization, "not asked") is None:
                forms[quantization] = Form(str(quantization), list(forms[need].layers), cases_for(quantization))
    uncovered += [f"not covered by the suite: the fused `{name}` of {asked.name}" for name in fusions]
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


def _account(form: Form, done: dict[str, Record]) -> None:
    for case in form.cases:
        outcome = done[case.id].outcome if case.id in done else None
        if outcome is not None and outcome.status == Status.PASS:
            form.passed += 1
        elif outcome is not None and outcome.status in (Status.UNSUPPORTED, Status.SKIP):
            form.refused = outcome.reason


def _wrong(record: Record, spec: str) -> str:
    return f"{record.case.id}: {record.outcome.reason}; {repro(record.case.id, spec)}"


def _shown(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
