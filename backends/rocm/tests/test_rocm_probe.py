"""The probe reads the driver's files and nothing else; unknown architectures are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qhal
from qhal.selection import Available, Unavailable
from qhal_rocm import backend, probe


def _machine(root: Path, versions: list[int]) -> None:
    for i, version in enumerate(versions):
        node = root / str(i)
        (node / "mem_banks" / "0").mkdir(parents=True)
        (node / "properties").write_text(f"simd_count 8\ngfx_target_version {version}\n")
        (node / "mem_banks" / "0" / "properties").write_text("heap_type 1\nsize_in_bytes 1024\n")


@pytest.mark.parametrize(
    ("number", "name"),
    [(90402, "gfx942"), (90500, "gfx950"), (90010, "gfx90a"), (110000, "gfx1100"), (120001, "gfx1201")],
)
def test_architecture_names(number: int, name: str) -> None:
    assert probe.architecture(number) == name


def test_a_machine_without_the_driver_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "TOPOLOGY", tmp_path / "nothing")
    state = probe.probe()
    assert isinstance(state, Unavailable)
    assert "amdgpu" in state.hint


def test_devices_are_listed_and_unknown_ones_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    _machine(tmp_path, [0, 90402, 120500])
    state = probe.probe()
    assert isinstance(state, Unavailable)
    assert "gfx1250" in state.reason
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    state = probe.probe()
    assert isinstance(state, Available)
    assert [(d.arch, d.memory) for d in state.devices] == [("gfx942", 1024)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert isinstance(probe.probe(), Unavailable)


def test_a_torch_without_hip_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(torch.version, "hip", None)
    _machine(tmp_path, [90402])
    state = probe.probe()
    assert isinstance(state, Unavailable)
    assert "HIP" in state.reason


def test_offline_operations_refuse_without_falling_back() -> None:
    ops = backend().offline("gfx942")
    request = qhal.GemmRequest(w=qhal.Format.parse("int4_g128"), n=8, k=128, x=(qhal.Format.parse("bf16"),))
    assert ops.supports(request).level == "not_implemented"
    with pytest.raises(qhal.UnsupportedError, match="not_implemented"):
        ops.quantize(torch.zeros(1, 8), qhal.Format.parse("int8_row"))
