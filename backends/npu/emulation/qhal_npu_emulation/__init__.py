"""An Ascend NPU that computes on the processor: torch_npu's operators by their documented formulas.

Level L2. The backend runs unchanged: every call goes through the dispatcher with the wheel's own schema (L1 schema),
and where the wheel is installed its own Meta kernel is asked too (L1 meta). `qhal conformance run --backend
npu_emulated:0` (A2; 1: A3, 2: A5) works where this distribution is installed; it is in no other requirements file.
"""

from __future__ import annotations

from qhal.interface import QuantOps
from qhal.selection import Available, BackendInfo, Device

ARCHS = ("A2", "A3", "A5")
NAME = "npu_emulated"


def backend() -> BackendInfo:
    """The description that the entry point `qhal.backends` gives."""
    return BackendInfo(NAME, (1, 0), order=9000, probe=_probe, load=_load, offline=_offline, archs=ARCHS)


def _probe() -> Available:
    facts = {"emulated": "documented formulas on the processor"}
    return Available(tuple(Device(i, arch, 0, facts, "L2") for i, arch in enumerate(ARCHS)))


def _load(device: Device) -> QuantOps:
    return _offline(device.arch)


def _offline(arch: str) -> QuantOps:
    from qhal_npu.ops import NpuOps
    from qhal_npu_emulation import library

    library.install()
    return NpuOps(arch, "cpu")
