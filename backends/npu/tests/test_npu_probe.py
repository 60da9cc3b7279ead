"""The probe stops at the first thing that is missing and imports nothing before it must."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import qhal
from qhal.selection import Unavailable
from qhal_npu import backend, probe


def test_without_a_device_nothing_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "DEVICES", tmp_path)
    (tmp_path / "davinci_manager").touch()  # the driver's control node is no device
    state = probe.probe()
    assert isinstance(state, Unavailable)
    assert "davinci" in state.reason
    assert "torch_npu" not in sys.modules


def test_a_device_without_the_package_or_the_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "DEVICES", tmp_path)
    (tmp_path / "davinci0").touch()
    state = probe.probe()
    assert isinstance(state, Unavailable)
    assert "torch_npu is not installed" in state.reason
    monkeypatch.setattr(probe, "version", lambda name: "2.13.0")
    for name in probe._CANN_HOMES:
        monkeypatch.delenv(name, raising=False)
    state = probe.probe()
    assert isinstance(state, Unavailable)
    assert "set_env.sh" in state.hint


def test_offline_answers_need_no_library_and_refuse_without_falling_back() -> None:
    ops = backend().offline("A2")
    request = qhal.GemmRequest(w=qhal.Format.parse("int4_g128"), n=8, k=256, x=(qhal.Format.parse("bf16"),))
    assert "npu_weight_quant_batchmatmul" in ops.supports(request).executes
    with pytest.raises(qhal.UnsupportedError, match="no float8 type"):
        ops.quantize(torch.zeros(1, 64), qhal.Format.parse("e4m3fn.row*fp32"))
    assert "torch_npu" not in sys.modules
