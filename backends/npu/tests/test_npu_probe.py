"""The probe stops at the first thing that is missing and imports nothing before it must."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


class Fails:
    """An import of torch_npu that fails as it does without CANN, or beside another accelerator."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name == "torch_npu":
            raise self.error
        return None


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libhccl.so: cannot open shared object file"),
        RuntimeError("Two accelerators cannot be used at the same time"),
    ],
)
def test_a_package_that_does_not_load_is_told_with_its_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "DEVICES", tmp_path)
    (tmp_path / "davinci0").touch()
    monkeypatch.setattr(probe, "version", lambda name: "2.13.0")
    monkeypatch.setattr(probe, "find_spec", lambda name: object())
    monkeypatch.setenv("ASCEND_HOME_PATH", "/usr/local/Ascend")
    monkeypatch.setattr(sys, "meta_path", [Fails(error), *sys.meta_path])
    state = probe.probe()
    assert isinstance(state, Unavailable)
    assert str(error) in state.reason
    assert "versions" in state.hint


def test_a_package_that_sees_no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "DEVICES", tmp_path)
    (tmp_path / "davinci0").touch()
    monkeypatch.setattr(probe, "version", lambda name: "2.13.0")
    monkeypatch.setattr(probe, "find_spec", lambda name: object())
    monkeypatch.setenv("ASCEND_HOME_PATH", "/usr/local/Ascend")
    package = ModuleType("torch_npu")
    package.npu = SimpleNamespace(device_count=lambda: 0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_npu", package)
    state = probe.probe()
    assert isinstance(state, Unavailable)
    assert "ASCEND_RT_VISIBLE_DEVICES" in state.hint


def test_offline_answers_need_no_library_and_refuse_without_falling_back() -> None:
    ops = backend().offline("A2")
    request = qhal.GemmRequest(w=qhal.Format.parse("int4_g128"), n=8, k=256, x=(qhal.Format.parse("bf16"),))
    assert "npu_weight_quant_batchmatmul" in ops.supports(request).executes
    with pytest.raises(qhal.UnsupportedError, match="no float8 type"):
        ops.quantize(torch.zeros(1, 64), qhal.Format.parse("e4m3fn.row*fp32"))
    assert "torch_npu" not in sys.modules
