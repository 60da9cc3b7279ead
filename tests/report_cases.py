"""Two small reports and their edits, shared by the tests of reports: the reference, and one that fails in every way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import qhal
from qhal.requests import GemmRequest, Request, Support
from qhal_conformance import report
from qhal_conformance.faults_weight import WEIGHT_FAULTS
from qhal_conformance.operations import catalogue
from qhal_conformance.runner import run_cases
from qhal_conformance.wrapping import Wrapped

Report = dict[str, Any]
Key = str | int
HOSTILE = "<script>alert(1)</script> | `x` \x1b[31m \ud800 ]]> & \"'\nsecond line"
ONLY = "int4.g32*bf16"


class Failing(Wrapped):
    """Attention that raises, products of two 8-bit integers refused; hostile texts."""

    name = "cpu_reference"

    def supports(self, request: Request) -> Support:
        if isinstance(request, GemmRequest) and str(request.w) == "int8.row*fp32" and not request.x[0].plain:
            return Support("unsupported", HOSTILE)
        return self._inner.supports(request)

    def prepare(
        self, w: Any, request: Any, *, inputs: Any = (), operand: Any = None, bias: Any = None, into: Any = None
    ) -> Any:
        if not self.supports(request):
            raise qhal.UnsupportedError(self.supports(request))
        return self._inner.prepare(w, request, inputs=inputs, operand=operand, bias=bias, into=into)

    def attention_batch(self, request: Any, limits: Any) -> Any:
        raise RuntimeError(HOSTILE)


def chosen(*texts: str) -> list[Any]:
    return [case for case in catalogue(0) if any(text in case.id for text in texts)]


@cache
def sound() -> Report:
    """The reference on every case of one format: many operations, a second."""
    ops = qhal.select("cpu_reference")
    return report.build(ops, "cpu_reference", run_cases(ops, chosen(ONLY)), 0, ONLY, 9.0)


@cache
def spoiled() -> Report:
    """Failures, errors, refusals and passes; the filter finds short cases of all of them."""
    fault = {name: make for name, _, _, make in WEIGHT_FAULTS}["scale-last-block"]
    ops = Failing(fault(qhal.select("cpu_reference")))
    only = "positive"
    return report.build(ops, "cpu_reference", run_cases(ops, chosen(only)), 0, only, 9.0)


def sealed(found: Report) -> Report:
    return {**found, "digest": report.digest(found)}


def leaves(value: Any, path: tuple[Key, ...] = ()) -> Iterator[tuple[Key, ...]]:
    """The path of everything that is no object and no array."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path
        return
    for key, item in items:
        yield from leaves(item, (*path, key))


def at(found: Any, path: tuple[Key, ...]) -> Any:
    for key in path:
        found = found[key]
    return found


def put(found: Any, path: tuple[Key, ...], value: Any) -> Any:
    """A copy with another value at one place; everything else is shared."""
    if not path:
        return value
    inner = put(found[path[0]], path[1:], value)
    if isinstance(found, dict):
        return {**found, path[0]: inner}
    return [*found[: path[0]], inner, *found[path[0] + 1 :]]


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.01 + 0.001
    if isinstance(value, str):
        return ("0" if value[:1] != "0" else "1") + value[1:]
    return "x"


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.floats(-2, 2).filter(lambda v: not v.is_integer()), st.just("nan")
) | st.one_of(st.text(max_size=5), st.just([]), st.just({}), st.just([1]), st.just({"a": 1}), st.just("0" * 64))
"""Values of every type, most of them wrong in most places."""


def written(folder: Path, *reports: Report) -> list[str]:
    paths = [folder / f"{i}.json" for i in range(len(reports))]
    for path, found in zip(paths, reports, strict=True):
        path.write_text(json.dumps(found))
    return [str(path) for path in paths]
