"""The probe explains itself on a machine without a GPU, and the shell refuses honestly."""

from __future__ import annotations

import pytest
import torch

import qhal
from qhal.selection import Unavailable
from qhal_cuda import backend
from qhal_cuda.probe import _visible


def test_probe_says_what_is_missing_and_what_to_do() -> None:
    state = backend().probe()
    if torch.version.cuda is None:
        assert isinstance(state, Unavailable)
        assert state.reason
        assert state.hint


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, [0, 1, 2]), ("", []), ("1", [1]), ("2,0", [2, 0]), ("0,7,1", [0]), ("GPU-b", [1]), ("-1", [])],
)
def test_visible_devices_are_numbered_as_the_runtime_does(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: list[int]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert _visible(3, ["GPU-a", "GPU-b", "GPU-c"]) == expected


def test_offline_operations_refuse_without_falling_back() -> None:
    ops = backend().offline("sm_90")
    request = qhal.GemmRequest(w=qhal.Format.parse("int4_g128"), n=8, k=128, x=(qhal.Format.parse("bf16"),))
    assert ops.supports(request)
    with pytest.raises(qhal.FormatError, match="x is on cpu, must be on meta"):
        ops.quantize(torch.zeros(1, 8), qhal.Format.parse("int8_row"))
    codec = qhal.Codec(qhal.Format.parse("int8_row"))
    moved = qhal.CommRequest(collective="all_reduce", codec=codec, world=2, x=torch.bfloat16, numel=64)
    assert ops.supports(moved).level == "conditional"  # waits for headers
