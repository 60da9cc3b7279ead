"""Which cases show that a request of an engine is executed rightly: those of the catalogue, and some made for it.

A case covers a request if `supports` is asked the same for both, sizes aside (`form`). So a new operation or format of
the catalogue covers requests by itself; what has no case is said, never assumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from qhal.elements import dtype_name
from qhal.errors import FormatError, QhalError
from qhal.formats import Format
from qhal.requests import (
    AttentionRequest,
    GemmRequest,
    GroupedRequest,
    HadamardRequest,
    KVRequest,
    QuantizeRequest,
    Request,
)
from qhal_conformance.cases import Case, find
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.problem import DTYPES

MULTIPLY_ADDS = 1 << 24
"""The most that a case may cost; n is cut to it, K never: the sum is what is tested."""
_WEIGHT = 1 << 21
_DATA = ("onehot", "codes", "outlier", "normal")
_ROWS = (16, 1, 17, 64)
PROFILE = "selftest"


def form(request: Request) -> Request:
    """The request with every size, and every number that is only an argument, replaced by one value.

    Requests of one form are executed by the same kernels.
    """
    if isinstance(request, GemmRequest):
        w = request.w.storage if isinstance(request.w, Format) else request.w
        return replace(
            request, w=w, n=1, k=1, m=(1, 1), out=None, bias=False, graph=False, batch_invariant=False, numerics=None
        )
    if isinstance(request, GroupedRequest):
        gemm = form(request.gemm)
        assert isinstance(gemm, GemmRequest)
        return replace(request, gemm=gemm, experts=1, top_k=1)
    if isinstance(request, KVRequest):
        same = request.k_dim == request.v_dim
        dims = (1, 1) if same else (request.k_dim, request.v_dim)
        return replace(request, heads=1, k_dim=dims[0], v_dim=dims[1], page=1)
    if isinstance(request, AttentionRequest):
        kv = form(request.kv)
        assert isinstance(kv, KVRequest)
        window, cap = (None if v is None else 1 for v in (request.window, request.softcap))
        found = replace(request, kv=kv, heads=1, scale=1.0, window=window, softcap=cap)
        return replace(found, lse=False, graph=False, batch_invariant=False)
    if isinstance(request, HadamardRequest):
        return replace(request, n=1)
    return request


def cases_for(need: Request) -> list[Case]:
    """Cases that cover a request, the most telling first: made for its sizes and of the catalogue in turns."""
    listed = [case for case in catalogue(0) if case.required and covers(case, need)]
    known = {case.id for case in listed}
    made = [case for case in _made(need) if case.id not in known and covers(case, need)]
    listed.sort(key=lambda case: _DATA.index(case.data) if case.data in _DATA else len(_DATA))
    return [case for i in range(max(len(made), len(listed))) for case in made[i : i + 1] + listed[i : i + 1]]


def covers(case: Case, need: Request) -> bool:
    """Whether a case asks for the same kernels."""
    try:
        asked = OPERATIONS[case.operation].request(case)
    except (QhalError, ValueError):  # the suite has no word for such a format
        return False
    return asked is not None and form(asked) == form(need)


def named(wanted: str) -> Case:
    """The case with this id: of the catalogue, or one made for a request, whose sizes and formats the id spells.

    FormatError for every other id: a word that nobody knows would be a question that nobody asked.
    """
    try:
        return find(catalogue(1), wanted)
    except FormatError:
        case = _spelled(wanted)
        if case is None or wanted not in _ids(case):
            raise
        return case


def _spelled(wanted: str) -> Case | None:
    """What an id says, if it has the form of one (`Case.id`); nothing of it is known to make sense yet."""
    operation, _, rest = wanted.partition("/")
    subject, *last = rest.rsplit("/", 4)
    if operation not in OPERATIONS or len(last) != 4 or not last[3].isdecimal():
        return None
    sizes = [re.fullmatch(r"([a-z])(\d+)", size) for size in last[0].split("_")]
    shape = tuple((size[1], int(size[2])) for size in sizes if size is not None)
    data, *options = last[2].split("+")
    return _case(operation, subject, shape, last[1], data, tuple(options), int(last[3]))


def _ids(case: Case) -> set[str]:
    """The cases that are made for the request of this one."""
    try:
        request = OPERATIONS[case.operation].request(case)
        if isinstance(request, GemmRequest):
            request = replace(request, out=DTYPES[case.out])
        return set() if request is None else {made.reseeded(case.seed).id for made in _made(request)}
    except (QhalError, ValueError, KeyError, AssertionError):
        return set()


def _made(request: Request) -> Iterator[Case]:
    """Cases for this very request at its own sizes; `covers` judges whether they are what was asked."""
    if isinstance(request, GemmRequest):
        yield from _gemm(request)
    elif isinstance(request, GroupedRequest):
        yield from _grouped(request)
    elif isinstance(request, QuantizeRequest):
        options = ("static",) * request.static
        for data in ("grid", "codes", "zero", "ties"):
            shape = (("m", 17), ("k", 256))
            yield _case("quantize", str(request.format), shape, dtype_name(request.x), data, options)
    elif isinstance(request, HadamardRequest) and request.kinds and isinstance(request.kinds[0][1], int):
        for data in ("normal", "impulse", "outlier"):
            yield _case(
                "hadamard", f"sylvester{request.kinds[0][1]}", (("m", 5), ("n", request.n)), dtype_name(request.x), data
            )
    elif isinstance(request, KVRequest) and _paged(request):
        subject = str(request.k) if request.k == request.v else f"{request.k}~{request.v}"
        sizes = (("t", 37), ("g", request.heads), ("d", request.k_dim), ("p", request.page))
        for data in ("scattered", "positive"):
            yield _case("quant_kv", subject, sizes, "bf16", data)
    elif isinstance(request, AttentionRequest) and _paged(request.kv):
        yield from _attention(request)


def _gemm(r: GemmRequest) -> Iterator[Case]:
    x = r.x[0]
    subject = str(r.w) if x.plain else f"{r.w}~{x}"
    out = x.element if x.plain else "bf16" if r.out is None else dtype_name(r.out)
    options = ("gidx",) * r.group_index + ("static",) * any(r.static) + ("clip",) * r.clip + ("bias",) * r.bias
    for data, rows in zip(_DATA, _ROWS, strict=True):
        shape = (("m", rows), ("n", _rows_of(r.n, r.k, rows)), ("k", r.k))
        yield _case("gemm", subject, shape, out, data, options)


def _grouped(r: GroupedRequest) -> Iterator[Case]:
    gemm = r.gemm
    x = gemm.x[0]
    subject = str(gemm.w) if x.plain else f"{gemm.w}~{x}"
    out = x.element if x.plain else "bf16"
    acted = ("silu",) if r.activation is not None else ()
    shape = (("e", 5), ("n", _rows_of(gemm.n, gemm.k, 66)), ("k", gemm.k))
    for data, counts in (("onehot", "uneven"), ("codes", "one"), ("normal", "uneven")):
        options = (r.groups, *("static",) * any(gemm.static), *("bias",) * gemm.bias, *acted, counts)
        yield _case("grouped_gemm", subject, shape, out, data, options)


def _attention(r: AttentionRequest) -> Iterator[Case]:
    out = dtype_name(r.out)
    plain = Format(out)
    batch = {"decode": 0, "prefill": 1, "mixed": 2}[r.phase]
    options = tuple(
        word
        for word, wanted in (
            ("full", not r.causal),
            ("window", r.window is not None),
            ("softcap", r.softcap is not None),
            ("sinks", r.sinks),
            ("tree", r.tree),
            (f"q={r.q}", r.q != plain),
            (f"p={r.p}", r.p != plain),
        )
        if wanted
    )
    sizes = (("l", batch), ("h", r.heads), ("g", r.kv.heads), ("d", r.kv.k_dim), ("p", r.kv.page))
    for data in ("uniform", "normal", "positive"):
        yield _case("attention", str(r.kv.k), sizes, out, data, options)


def _paged(r: KVRequest) -> bool:
    """Whether the suite can fill such a cache: plain scales, computed per row or group or one for all; no zero points.

    Where it does not know how a scale is given, its expectation would be the one that is wrong.
    """
    kinds = {f.block.kind for f in (r.k, r.v) if f.block is not None}
    plain = all(f.zero is None and f.offset is None and (f.scale is None or f.scale.plain) for f in (r.k, r.v))
    return plain and kinds <= {"tensor", "row", "group"}


def _case(
    operation: str,
    subject: str,
    shape: tuple[tuple[str, int], ...],
    out: str,
    data: str,
    options: tuple[str, ...] = (),
    seed: int = 0,
) -> Case:
    # level 1: its inputs are not kept beside those of the small cases
    return Case(operation, subject, shape, out, data, seed, "contiguous", options, PROFILE, 1, False)


def _rows_of(n: int, k: int, rows: int) -> int:
    """n, or the largest part of it in steps of 16 that stays within the cost of a case."""
    most = max(min(MULTIPLY_ADDS // (rows * k), _WEIGHT // k), 16)
    return n if n <= most else most // 16 * 16
