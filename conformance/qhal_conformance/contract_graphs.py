"""Rules about captured graphs: a replay reads what lies at the old addresses now, and writes where it wrote before.

Where no operation may stand in a graph, `capture` itself must refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qhal.caches import Limits
from qhal.errors import UnsupportedError
from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import Support
from qhal.specs import Operand
from qhal.tensors import same_bits
from qhal_conformance import attention_check
from qhal_conformance.cases import Case
from qhal_conformance.contract_calls import (
    ATTENTION_SHAPE,
    FORMATS,
    activation,
    answer,
    bound,
    calls,
    gemm_request,
    must_raise,
    parts,
    weight,
)
from qhal_conformance.outcome import FailKind
from qhal_conformance.problem import Fault, first_line

_REPLAYS = 32
_REFITTED = (
    *((name, "bf16") for name in FORMATS),
    ("int8.row*bf16", "int8.row*fp32"),
    ("e4m3fn.row*bf16", "e4m3fn.row*fp32"),
)
"""Weights and inputs. Kernels of two quantized operands take float32 scales: a copy of narrower ones goes stale."""


def graphs_replay(case: Case, ops: QuantOps) -> int:
    """New inputs at the old addresses give their results at the old addresses, with the bits of a plain call."""
    checked = 0
    for call in calls(case, ops, graph=True):
        if not call.support.graph or not call.reads_x:
            continue
        eager = [answer(call, ops, x) for x in (call.x, call.other)]
        x = call.x.clone()
        replay = _captured(ops, call.name, bound(call.run, x, None))
        first = replay()
        addresses = {name: t.data_ptr() for name, t in parts(first).items()}
        for turn in (0, 1, 0):
            x.copy_((call.x, call.other)[turn])
            y = replay()
            ops.synchronize()
            if {name: t.data_ptr() for name, t in parts(y).items()} != addresses:
                raise Fault(FailKind.EXACT, f"{call.name}: a replay returned its result at another address")
            if call.support.deterministic and _differ(eager[turn], parts(y)):
                text = f"{call.name}: a replay gives other bits than a plain call on the numbers that lie there now"
                raise Fault(FailKind.EXACT, text)
            checked += 1
        _allocates_nothing(ops, call.name, replay, parts(first))
    return checked or _no_graphs(ops)


def _allocates_nothing(ops: QuantOps, name: str, replay: Callable[[], object], result: dict[str, Tensor]) -> None:
    replay()
    ops.synchronize()
    before = ops.memory_stats().used
    for _ in range(_REPLAYS):
        replay()
    ops.synchronize()
    grown = ops.memory_stats().used - before
    size = sum(t.numel() * t.element_size() for t in result.values())
    if grown > max(_REPLAYS * size // 2, 1 << 20):
        raise Fault(FailKind.LEAK, f"{name}: {_REPLAYS} replays of a graph left {grown >> 10} KiB more in use")


def graphs_see_refits(case: Case, ops: QuantOps) -> int:
    """After prepare(into=) a live graph computes with the new weight; two graphs replayed in turn do not mix."""
    checked = 0
    for name, kind in _REFITTED:
        f = Format.parse(kind)
        inputs = () if f.plain else (Operand(f),)
        request = gemm_request(case, name, x=(f,), graph=True)
        support = ops.supports(request)
        if not support or not support.graph:
            continue
        x = activation(case, ops)
        made = [ops.prepare(weight(case, name, tag).to(ops.device), request, inputs=inputs) for tag in ("w", "later")]
        replays = [_captured(ops, f"gemm of {name}", bound(ops.gemm, x, p)) for p in made]
        eager = [ops.gemm(x, p).clone() for p in made]
        for _ in range(2):
            for replay, wanted in zip(replays, eager, strict=True):
                _equal(ops, support, replay, wanted, f"gemm of {name}: graphs replayed in turn mix their results")
                checked += 1
        new = weight(case, name, "refit").to(ops.device)
        wanted = ops.gemm(x, ops.prepare(new, request, inputs=inputs)).clone()
        ops.prepare(new, request, inputs=inputs, into=made[0])
        _equal(
            ops, support, replays[0], wanted, f"gemm of {name}: a live graph computes with the weight before a refit"
        )
        _equal(ops, support, replays[1], eager[1], f"gemm of {name}: a refit changed the graph of another weight")
    return checked + _attention_plans(ops) or _no_graphs(ops)


def _attention_plans(ops: QuantOps) -> int:
    """A batch that is planned again: every graph that was captured with it follows the new lengths and pages."""
    case = Case("attention", "bf16", ATTENTION_SHAPE, "bf16", "normal")
    p = attention_check.build(case)
    request = replace(p.request, graph=True)
    support = ops.supports(request)
    if not support or not support.graph:
        return 0
    cache = attention_check.filled(ops, p, case)
    table = torch.from_numpy(p.pages.table).to(ops.device)
    queries, keys = (torch.tensor(n, dtype=torch.int32) for n in (p.query_lens, p.pages.lens))
    shorter = torch.clamp(keys - 1, min=1)
    limits = Limits(len(p.query_lens), sum(p.query_lens), table.shape[1])
    q = torch.from_numpy(p.q).bfloat16().to(ops.device)
    batch = ops.attention_batch(request, limits)
    batch.plan(queries, keys, table)
    replay = _captured(ops, "attention", lambda: ops.attention(q, cache, batch))
    for lens in (keys, shorter, keys):
        other = ops.attention_batch(request, limits)
        other.plan(queries, lens, table)
        wanted = ops.attention(q, cache, other).clone()
        batch.plan(queries, lens, table)
        _equal(ops, support, replay, wanted, "attention: a replay does not follow the lengths that were planned last")
    return 3


def _captured(ops: QuantOps, name: str, fn: Callable[[], object]) -> Callable[[], object]:
    try:
        return ops.capture(fn)
    except Fault:
        raise
    except Exception as error:
        text = f"{name}: graph is claimed, but capture raised {type(error).__name__}: {first_line(error)}"
        raise Fault(FailKind.CLAIM, text) from error


def _equal(ops: QuantOps, support: Support, replay: Callable[[], object], wanted: Tensor, text: str) -> None:
    y = replay()
    ops.synchronize()
    if not isinstance(y, Tensor):
        raise Fault(FailKind.RETURN, f"a replay returned {type(y).__name__}, must be the captured function's result")
    if support.deterministic and not same_bits(y.clone(), wanted):
        raise Fault(FailKind.EXACT, text)


def _no_graphs(ops: QuantOps) -> int:
    """Nothing may stand in a graph: then capture refuses."""
    must_raise(bound(ops.capture, lambda: None), UnsupportedError, "capture, where no operation claims graph,")
    return 1


def _differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not same_bits(t, b[name].clone()) for name, t in a.items())


RULES: dict[str, Callable[[Case, QuantOps], int]] = {
    "graphs-replay": graphs_replay,
    "graphs-see-refits": graphs_see_refits,
}
