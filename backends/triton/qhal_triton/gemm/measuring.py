"""Measuring tiles of a product: weights of random codes, every candidate in a captured graph, caches kept cold.

Width and parts are measured first, warps and stages then for the best of these: compiling is what takes the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from qhal.elements import element
from qhal.errors import UnsupportedError
from qhal.formats import Format
from qhal.requests import GemmRequest, Support
from qhal.specs import Operand
from qhal_triton.gemm.compiling import Compiler, jobs
from qhal_triton.gemm.config import Config, candidates, problem
from qhal_triton.gemm.launch import Bound, spec_of
from qhal_triton.gemm.paths import by_group, plan
from qhal_triton.gemm.results import finished
from qhal_triton.gemm.weights import random_weight
from qhal_triton.target import Target
from qhal_triton.timing import microseconds
from qhal_triton.tuning import Entry, measure

ROWS = (1, 16, 32, 64, 128, 256)
"""Row counts that are measured: the ends of buckets below the rows from which torch multiplies."""
_COLD = 256 << 20
"""Bytes of weights that a measurement goes round: more than any second-level cache."""
_REPEATS = 9


def tune(
    ops: Any, request: GemmRequest, seen: Callable[[str], None] | None, here: Callable[[Target], Any]
) -> dict[str, Entry]:
    """Entries for the buckets of rows within request.m, for each format of x.

    seen: told before each problem; here: makes operations of a target on the processor, which only compile.

    Takes 256 MiB of memory, and seconds for each problem, or a minute where there is one core: every shape of tile is
    compiled, on a GPU by processes of their own.
    """
    request = by_group(request, ops._target) or request
    made = plan(request, ops._target)
    if made is None or not isinstance(request.w, Format) or request.operand is not None or request.batch_invariant:
        reason = "nothing is chosen by measuring here: no shared kernel with a choice of tiles takes it"
        raise UnsupportedError(Support("unsupported", reason), str(request))
    generator = torch.Generator(device=ops.device).manual_seed(0)
    w = random_weight(request.w, (request.n, request.k), generator, index=request.group_index)
    inputs = [] if all(f.plain for f in request.x) else [Operand(f) for f in request.x]
    bias = torch.zeros(request.n, device=ops.device) if request.bias else None
    asked = replace(request, static=())
    kept = [ops.prepare(w, asked, inputs=inputs, bias=bias)]
    while len(kept) * kept[0].nbytes < _COLD and len(kept) < 32:
        kept.append(ops.prepare(w, asked, inputs=inputs, bias=bias))
    bound = [Bound(p, asked, made, ops._target) for p in kept]
    found = {}
    with Compiler(here, ops._target, asked, jobs() if ops.device.type == "cuda" else 1) as compiler:
        for m in (m for m in ROWS if request.m[0] <= m <= request.m[1] and (m < made.dense or not made.dense)):
            for f in request.x:
                name = problem(request, f, m)
                if seen is not None:
                    seen(name)
                found[name] = _measured(ops, bound, f, m, compiler)
    return found


def _measured(ops: Any, bound: list[Bound], f: Format, m: int, compiler: Compiler) -> Entry:
    first = bound[0]
    request, weight = first.request, first.weight
    x = torch.randn(m, request.k, device=weight.device).to(element(f.element).storage if f.plain else torch.bfloat16)
    q = x if f.plain else ops.quantize(x, f)
    spec = spec_of(first, q, m)
    dtype = request.out or x.dtype

    def time(c: Config) -> float:
        y = torch.empty(c.parts, m, request.n, dtype=torch.float32 if c.parts > 1 else dtype, device=weight.device)

        def call(one: Bound) -> None:
            one.launch(spec, q, y, c, None)
            if c.parts > 1:
                finished(y, m, request.n, dtype)

        return microseconds([partial(call, one) for one in bound], _REPEATS)

    def tried(some: Sequence[Config]) -> Entry:
        compiler((f, m, c) for c in some)
        return measure(some, time)

    steps = -(-request.k // spec.span)
    some = candidates(spec, m, request.n, steps, ops._target)
    usual = some[0]
    shape = tried([c for c in some if (c.warps, c.stages) == (usual.warps, usual.stages)])
    best = Config(*shape.best)
    rest = tried([c for c in some if (c.bn, c.parts) == (best.bn, best.parts)])
    return Entry(rest.best, tuple(dict([*shape.measured, *rest.measured]).items()))
