"""Records that cannot be are refused, and guards see what a kernel did beside its result."""

from __future__ import annotations

import pytest
import torch

from qhal_conformance import guards
from qhal_conformance.outcome import FailKind, Outcome, Status, Worst

CPU = torch.device("cpu")
WORST = Worst((0,), 1.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"status": Status.FAIL, "reason": "no kind"},
        {"status": Status.PASS, "kind": FailKind.NUMERIC, "elements": 1},
        {"status": Status.FAIL, "kind": FailKind.NUMERIC},
        {"status": Status.ERROR},
        {"status": Status.UNSUPPORTED},
        {"status": Status.PASS},
        {"status": Status.PASS, "elements": 4, "headroom": 1.01},
        {"status": Status.PASS, "elements": 4, "headroom": float("nan")},
        {"status": Status.UNSUPPORTED, "reason": "no", "elements": 4},
        {"status": Status.SKIP, "reason": "memory", "worst": WORST},
        {"status": Status.PASS, "elements": 4, "histogram": (2, 2)},
        {"status": Status.PASS, "elements": 4, "histogram": (5,) + (0,) * 11},
        {"status": Status.PASS, "elements": 4, "histogram": (0,) * 11 + (4,)},
    ],
)
def test_impossible_outcomes(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Outcome(**fields)  # type: ignore[arg-type]


def test_possible_outcomes() -> None:
    assert Outcome(Status.PASS, elements=4, headroom=1.0).executed
    assert Outcome(Status.PASS, notes=("empty",)).executed
    assert not Outcome(Status.UNSUPPORTED, reason="not here").executed


@pytest.mark.parametrize("storage", guards.STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 8), (0, 6)])
def test_inputs_are_watched(storage: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    t = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).to(dtype)
    guard = guards.place(t, storage, CPU)
    assert torch.equal(guard.view.float(), t.float()) and guard.view.stride(-1) == 1
    assert not guard.changed() and not guard.touched_outside()
    if t.numel():
        guard.view[0].zero_()
        guard.view[-1].fill_(3)
        assert guard.changed() and not guard.touched_outside()
    guard = guards.place(t, storage, CPU)
    guard.canvas.view(torch.uint8)[3] += 1
    assert guard.changed() and guard.touched_outside()


@pytest.mark.parametrize("storage", guards.STORAGES)
def test_results_start_as_nan_between_canaries(storage: str) -> None:
    guard = guards.poisoned((4, 6), torch.bfloat16, storage, CPU)
    assert bool(torch.isnan(guard.view).all())
    guard.view.fill_(1)
    assert not guard.touched_outside()
    after = guard.view.storage_offset() + 3 * guard.view.stride(0) + 6
    guard.canvas[after] = 0
    assert guard.touched_outside()


def test_storage_kinds() -> None:
    t = torch.zeros(4, 6, dtype=torch.bfloat16)
    assert guards.place(t, "offset", CPU).view.data_ptr() % 16 == 2
    assert guards.place(t, "strided", CPU).view.stride() == (9, 1)
    assert guards.place(t, "contiguous", CPU).view.is_contiguous()
