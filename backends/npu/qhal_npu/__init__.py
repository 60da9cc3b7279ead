"""The Ascend NPU backend of qhal (distribution qhal-npu).

Importing this package imports no device library: `backend()` only describes it (`qhal.selection`).
"""

from __future__ import annotations

from qhal.interface import QuantOps
from qhal.selection import BackendInfo, Device


def backend() -> BackendInfo:
    """The light description that the entry point `qhal.backends` gives."""
    from qhal_npu.probe import probe

    return BackendInfo(
        "npu", (1, 0), order=30, probe=probe, load=_load, offline=_offline, archs=("A2", "A3", "A5", "310P")
    )


def _load(device: Device) -> QuantOps:
    """The only place that asks a device who it is: this takes it (aclInit)."""
    import torch_npu

    from qhal_npu.ops import NpuOps
    from qhal_npu.soc import generation

    npu = torch_npu.npu
    arch = generation(str(npu.get_device_name(device.index)), int(npu.utils.get_soc_version()))
    return NpuOps(arch, f"{_TORCH_DEVICE}:{device.index}")


def _offline(arch: str) -> QuantOps:
    from qhal_npu.ops import NpuOps

    return NpuOps(arch, "meta")


_TORCH_DEVICE = "npu"
