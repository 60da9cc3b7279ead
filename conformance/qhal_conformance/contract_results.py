"""Rules about results: their form, `out=`, how long they live, and that nothing around a call changes their bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qhal.interface import QuantOps
from qhal.tensors import QTensor, same_bits
from qhal_conformance import guards
from qhal_conformance.cases import Case
from qhal_conformance.contract_calls import (
    ROWS,
    Call,
    answer,
    bound,
    calls,
    copied,
    gemm_request,
    must_raise,
    parts,
    weight,
)
from qhal_conformance.outcome import FailKind
from qhal_conformance.problem import Fault, well_formed

_ROUNDS = 3
"""In which memory must grow to be called lost."""


def results_well_formed(case: Case, ops: QuantOps) -> int:
    """Every result has its shape, dtype, device and strides, is no input's memory, and no input changed."""
    checked = 0
    for call in calls(case, ops):
        guard = guards.place(call.x, "strided" if call.x.dim() == 2 else "contiguous", ops.device)
        fixed = guards.snapshot(call.fixed)
        y = call.run(guard.view, None)
        ops.synchronize()
        _formed(call, y, ops)
        for name, plane in {"x": guard.view, **call.fixed}.items():
            if any(_same_memory(t, plane) for t in parts(y).values()):
                raise Fault(FailKind.RETURN, f"{call.name}: the result lies in the memory of {name}")
        if guard.changed():
            raise Fault(FailKind.INPUT_MUTATED, f"{call.name} changed x, or memory beside it")
        if changed := guards.differing(fixed, call.fixed):
            raise Fault(FailKind.INPUT_MUTATED, f"{call.name} changed {', '.join(changed)}")
        checked += 1
    return checked


def _formed(call: Call, y: Any, ops: QuantOps) -> None:
    if call.format is None:
        well_formed(y, call.name, call.shape, call.dtype, ops.device)
        return
    if not isinstance(y, QTensor) or y.format.storage != call.format.storage:
        found = str(y.format) if isinstance(y, QTensor) else type(y).__name__
        raise Fault(FailKind.RETURN, f"{call.name} gave {found}, must be {call.format}")
    well_formed(y.codes, f"{call.name}: codes", call.shape, y.codes.dtype, ops.device)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return bool(a.numel() and b.numel()) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def out_is_written(case: Case, ops: QuantOps) -> int:
    """`out=` is written in its own strides, nothing beside it, and returned; a wrong one is refused."""
    checked = 0
    for call in calls(case, ops):
        y = call.run(call.x, None)
        ops.synchronize()
        if isinstance(y, QTensor):
            if y.layout != "canonical":
                continue
            target: Any = guards.poisoned_like(y)
        else:
            guard = guards.poisoned(call.shape, call.dtype, "strided", ops.device)
            target = guard.view
        back = call.run(call.x, target)
        ops.synchronize()
        returned, given = parts(back), parts(target)
        if any(returned[n].data_ptr() != t.data_ptr() or returned[n].stride() != t.stride() for n, t in given.items()):
            raise Fault(FailKind.OUT_IGNORED, f"{call.name} must write out= and return it")
        if not isinstance(y, QTensor) and guard.touched_outside():
            raise Fault(FailKind.OOB, f"{call.name} wrote beside out=")
        if not isinstance(y, QTensor) and bool(torch.isnan(target).any()) and not bool(torch.isnan(y).any()):
            raise Fault(FailKind.OUT_IGNORED, f"{call.name} left elements of out= unwritten")
        _same(call, copied(y), given, "with out=", FailKind.NONDETERMINISTIC)
        if not isinstance(y, QTensor):
            short = torch.empty((call.shape[0] - 1, *call.shape[1:]), dtype=call.dtype, device=ops.device)
            must_raise(bound(call.run, call.x, short), Exception, f"{call.name} with out= of another shape")
        checked += 1
    return checked


def results_are_kept(case: Case, ops: QuantOps) -> int:
    """A result stays as it is when other inputs are asked and other weights prepared: it is no shared buffer."""
    checked = 0
    for call in calls(case, ops):
        y = call.run(call.x, None)
        ops.synchronize()
        kept = copied(y)
        later = call.run(call.other, None)
        call.prepare()
        ops.synchronize()
        if _differ(kept, parts(y)):
            raise Fault(FailKind.INPUT_MUTATED, f"a later call changed the result of an earlier {call.name}")
        if any(_same_memory(t, parts(later)[name]) and t.data_ptr() == parts(later)[name].data_ptr()
               for name, t in parts(y).items()):  # fmt: skip
            raise Fault(FailKind.INPUT_MUTATED, f"two results of {call.name} share their memory")
        _same(call, kept, answer(call, ops, call.x), "after other weights were prepared", FailKind.EXACT)
        checked += 1
    return checked


def surroundings(case: Case, ops: QuantOps) -> int:
    """Engines call under inference mode, with another default device or dtype: the same bits."""
    checked = 0
    settings: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("under inference mode", torch.inference_mode),
        ("with meta as the default device", lambda: torch.device("meta")),
        ("with float64 as the default dtype", _Float64),
    )
    for call in calls(case, ops):
        kept = answer(call, ops, call.x)
        for what, enter in settings:
            with enter():
                y = call.run(call.x, None)
            ops.synchronize()
            _formed(call, y, ops)
            _same(call, kept, copied(y), what, FailKind.EXACT)
            checked += 1
    return checked


class _Float64:
    """A default dtype for the length of a block."""

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self._before)


def other_threads(case: Case, ops: QuantOps) -> int:
    """A call from another thread gives the same bits; where `concurrent` is claimed, four at once do."""
    checked = 0
    for call in calls(case, ops):
        inputs = (call.x, call.other)
        kept = [answer(call, ops, x) for x in inputs]
        for number in (1, 4) if call.support.concurrent else (1,):
            for i, got in enumerate(_from_threads(call, ops, inputs, number)):
                what = "from another thread" if number == 1 else "from four threads at once"
                _same(call, kept[i % 2], got, what, FailKind.EXACT)
                checked += 1
    return checked


def _from_threads(call: Call, ops: QuantOps, inputs: tuple[Tensor, Tensor], number: int) -> list[dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    raised: list[BaseException] = []
    start = threading.Barrier(number)

    def work(i: int) -> None:
        try:
            start.wait(30)
            for _ in range(3):
                y = call.run(inputs[i % 2], None)
            ops.synchronize()
            found[i] = copied(y)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    return [found[i] for i in range(number)]


def in_order(case: Case, ops: QuantOps) -> int:
    """Torch reads a result, and writes over an input, right after the call and without waiting: the order holds."""
    checked = 0
    for call in calls(case, ops):
        kept = answer(call, ops, call.x)
        x = call.x.clone() if call.reads_x else call.x
        y = call.run(x, None)
        read = copied(y)
        if call.reads_x:
            x.fill_(3.0)
        ops.synchronize()
        _same(call, kept, read, "read without waiting", FailKind.EXACT)
        _same(call, kept, copied(y), "after x was overwritten", FailKind.EXACT)
        checked += 1
    return checked


def batch_invariance(case: Case, ops: QuantOps) -> int:
    """Where it is declared, a row alone gives the bits that it gives in a batch."""
    checked = 0
    for call in calls(case, ops, batch_invariant=True):
        if not call.support.batch_invariant or not call.row:
            continue
        whole = answer(call, ops, call.x)
        for row in (0, 7, ROWS - 1):
            alone = answer(call, ops, call.x[row : row + 1])
            if _differ({name: t[row : row + 1] for name, t in whole.items() if t.shape[:1] == (ROWS,)}, alone):
                raise Fault(FailKind.EXACT, f"{call.name}: row {row} alone has other bits than in a batch of {ROWS}")
            checked += 1
    return checked


def memory_comes_back(case: Case, ops: QuantOps) -> int:
    """Results that nobody holds are freed: the device's memory does not grow by them."""
    request = gemm_request(case, "bf16", m=(0, 4096))
    if ops.memory_stats().used == 0 or not ops.supports(request):
        return 0
    prepared = ops.prepare(weight(case, "bf16").to(ops.device), request)
    x = torch.zeros(4096, case.size("k"), dtype=torch.bfloat16, device=ops.device)
    size, times = 2 * 4096 * case.size("n"), 64
    start, held = ops.memory_stats().used, [ops.gemm(x, prepared) for _ in range(8)]
    while ops.memory_stats().used - start < 8 * size and len(held) < 8 * times:
        held += [ops.gemm(x, prepared) for _ in range(8)]  # until nothing is left that the allocator had kept
    for _ in range(_ROUNDS):  # what is kept grows in every round; a library's workspace, or pages touched again, in one
        ops.synchronize()
        before = ops.memory_stats().used
        for _ in range(times):
            ops.gemm(x, prepared)
        ops.synchronize()
        grown = ops.memory_stats().used - before
        if 2 * grown <= times * size:
            return times
    raise Fault(FailKind.LEAK, f"{times} results of gemm, none of them held, left {grown >> 20} MiB in use")


def _differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not same_bits(t.contiguous(), b[name].contiguous()) for name, t in a.items())


def _same(call: Call, kept: dict[str, Tensor], got: dict[str, Tensor], what: str, kind: FailKind) -> None:
    """Equal bits where the backend declares them; the numeric cases judge the others."""
    if call.support.deterministic and _differ(kept, got):
        raise Fault(kind, f"{call.name} {what} has other bits, though deterministic is declared")


RULES: dict[str, Callable[[Case, QuantOps], int]] = {
    "results-well-formed": results_well_formed,
    "out-is-written": out_is_written,
    "results-are-kept": results_are_kept,
    "surroundings": surroundings,
    "other-threads": other_threads,
    "in-order": in_order,
    "batch-invariance": batch_invariance,
    "memory-comes-back": memory_comes_back,
}
