"""The AMD backend of qhal (distribution qhal-rocm).

Importing this package imports no device library: `backend()` only describes it (`qhal.selection`).
"""

from __future__ import annotations

from qhal.interface import QuantOps
from qhal.selection import BackendInfo, Device


def backend() -> BackendInfo:
    """The light description that the entry point `qhal.backends` gives."""
    from qhal_rocm.probe import ARCHITECTURES, probe

    return BackendInfo("rocm", (1, 0), order=20, probe=probe, load=_load, offline=_offline, archs=tuple(ARCHITECTURES))


def _load(device: Device) -> QuantOps:
    from qhal_rocm.ops import RocmOps

    return RocmOps(device.arch, f"{_TORCH_DEVICE}:{device.index}")


def _offline(arch: str) -> QuantOps:
    from qhal_rocm.ops import RocmOps

    return RocmOps(arch, "meta")


_TORCH_DEVICE = "cuda"
