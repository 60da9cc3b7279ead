"""The probe reads the driver's files and the environment; what would mislead the runtime is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qhal
from qhal.selection import Available, Device, Unavailable
from qhal_rocm import _same_chip, aiter_calls, backend, probe
from qhal_rocm.targets import CHIPS, target

VARIABLES = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without GPUs: the driver's folders, empty, and no variable set."""
    monkeypatch.setattr(probe, "TOPOLOGY", tmp_path / "nodes")
    monkeypatch.setattr(probe, "DRM", tmp_path / "drm")
    monkeypatch.setattr(torch.version, "hip", "7.1")
    for name in (*VARIABLES, f"{VARIABLES[-1]}_1", probe.INTERPRET):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def gpus(root: Path, *versions: int) -> None:
    for i, version in enumerate(versions):
        node = root / "nodes" / str(i)
        (node / "mem_banks" / "0").mkdir(parents=True)
        (node / "properties").write_text(
            f"simd_count 1216\nsimd_per_cu 4\ngfx_target_version {version}\nunique_id {160 + i}\n"
            f"drm_render_minor {128 + i}\n"
        )
        (node / "mem_banks" / "0" / "properties").write_text("heap_type 1\nsize_in_bytes 1024\n")


def refusal() -> Unavailable:
    state = probe.probe()
    assert isinstance(state, Unavailable) and state.hint
    return state


def devices() -> list[Device]:
    state = probe.probe()
    assert isinstance(state, Available), state
    return list(state.devices)


@pytest.mark.parametrize(
    ("number", "name"),
    [(90402, "gfx942"), (90500, "gfx950"), (90010, "gfx90a"), (110000, "gfx1100"), (120001, "gfx1201")],
)
def test_architecture_names(number: int, name: str) -> None:
    assert probe.architecture(number) == name


def test_a_machine_without_the_driver_says_so() -> None:
    assert "amdgpu" in refusal().hint


def test_a_device_has_its_facts(machine: Path) -> None:
    gpus(machine, 0, 90402)
    (device,) = devices()
    assert (device.index, device.arch, device.memory, device.evidence) == (0, "gfx942", 1024, "L3")
    assert device.facts == {
        "kind": "CDNA3, fp8 e4m3fnuz",
        "hip": "7.1",
        "torch": torch.__version__,
        "compute units": "304",
        "amd-aiter": f"missing; {aiter_calls.INSTALL}",
    }


def test_a_partition_is_named(machine: Path) -> None:
    gpus(machine, 90402)
    folder = machine / "drm" / "renderD128" / "device"
    folder.mkdir(parents=True)
    (folder / "current_compute_partition").write_text("CPX\n")
    (folder / "current_memory_partition").write_text("NPS4\n")
    assert devices()[0].facts["partition"] == "CPX/NPS4"


def test_unknown_architectures_are_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(machine, 90402, 120500)
    assert "device 1 is gfx1250" in refusal().reason
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    assert [d.arch for d in devices()] == ["gfx942"]


def test_visible_devices_are_numbered_as_the_runtime_does(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(machine, 90402, 90500, 110000)
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "2,1")
    assert [d.arch for d in devices()] == ["gfx1100", "gfx950"]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1,0,7,1")
    assert [(d.index, d.arch) for d in devices()] == [(0, "gfx950"), (1, "gfx1100")]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "GPU-00000000000000a1")
    assert [d.arch for d in devices()] == ["gfx950"]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "-1")
    assert "ROCR, HIP) hide all 3" in refusal().reason


def test_variables_that_disagree_are_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(machine, 90402, 90402)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert "disagree" in refusal().reason


@pytest.mark.parametrize("name", ["HSA_OVERRIDE_GFX_VERSION", "HSA_OVERRIDE_GFX_VERSION_1"])
def test_an_override_of_the_architecture_is_refused(machine: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    gpus(machine, 110001)
    monkeypatch.setenv(name, "11.0.1")
    assert devices()[0].arch == "gfx1101"
    monkeypatch.setenv(name, "11.0.0")
    assert "says gfx1100, the driver says gfx1101" in refusal().reason and refusal().hint == f"unset {name}"
    monkeypatch.setenv(name, "yes")
    assert "says no architecture" in refusal().reason


def test_a_torch_without_hip_is_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    gpus(machine, 90402)
    assert "HIP" in refusal().reason


def test_a_node_that_the_container_hides_is_skipped(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(machine, 90402, 90500)
    read = Path.read_text

    def denied(path: Path) -> str:
        if path == machine / "nodes" / "0" / "properties":
            raise PermissionError(path)
        return read(path)

    monkeypatch.setattr(Path, "read_text", denied)
    assert [(d.index, d.arch) for d in devices()] == [(0, "gfx950")]


def test_the_runtime_must_mean_the_same_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        gcnArchName = "gfx942:sramecc+:xnack-"  # noqa: N815 - torch's name

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    _same_chip(Device(0, "gfx942"))
    with pytest.raises(qhal.BackendError, match="gfx950 for the kernel driver and gfx942 for torch"):
        _same_chip(Device(0, "gfx950"))


def test_the_interpreter_is_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(probe.INTERPRET, "gfx950")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET is not 1" in refusal().reason
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (device,) = devices()
    assert (device.arch, device.evidence) == ("gfx950", "L2")
    ops = backend().load(device)
    assert ops.device.type == "cpu" and ops.memory_stats().total == 0
    ops.synchronize()
    with pytest.raises(qhal.UnsupportedError, match="no graphs"):
        ops.capture(lambda: None)
    monkeypatch.setenv(probe.INTERPRET, "gfx1250")
    assert "no architecture of the table" in refusal().reason


@pytest.mark.parametrize("arch", CHIPS)
def test_targets(arch: str) -> None:
    found = target(arch)
    assert found.kind == "hip" and found.warp == (64 if arch.startswith("gfx9") else 32)
    assert found.shared == (160 if arch == "gfx950" else 64) << 10
    assert not found.mx or found.arch == "gfx950"
    assert ("e4m3fnuz" in found.fp8) == (arch == "gfx942")


def test_a_name_that_only_begins_like_a_known_one_is_refused() -> None:
    with pytest.raises(qhal.UnsupportedError, match="'gfx1250' is not in the table"):
        target("gfx1250")


def test_offline_operations_refuse_without_falling_back() -> None:
    ops = backend().offline("gfx942")
    request = qhal.GemmRequest(w=qhal.Format.parse("int4_g128"), n=8, k=128, x=(qhal.Format.parse("bf16"),))
    assert ops.supports(request)
    with pytest.raises(qhal.FormatError, match="x is on cpu, must be on meta"):
        ops.quantize(torch.zeros(1, 8), qhal.Format.parse("int8_row"))
