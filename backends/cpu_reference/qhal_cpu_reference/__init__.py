"""The reference backend: what every operation means, in plain PyTorch. Importing this imports no operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qhal.interface import QuantOps
    from qhal.selection import Available, BackendInfo, Device


def backend() -> BackendInfo:
    """The entry point of the group `qhal.backends`: one device, usable wherever PyTorch is."""
    from qhal.selection import BackendInfo

    return BackendInfo(name="cpu_reference", interface=(1, 0), order=1000, probe=_probe, load=_load, offline=_offline)


def _probe() -> Available:
    import platform

    import torch

    from qhal.selection import Available, Device
    from qhal_cpu_reference.memory import total_memory

    facts = {
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "role": "defines the numbers; right on every machine, fast on none",
    }
    return Available((Device(index=0, arch=platform.machine(), memory=total_memory(), facts=facts),))


def _load(device: Device) -> QuantOps:
    from qhal_cpu_reference.ops import CpuReference

    return CpuReference()


def _offline(arch: str) -> QuantOps:
    from qhal_cpu_reference.ops import CpuReference

    return CpuReference()  # its answers depend on no architecture
