"""qhal-acme: what `qhal.select` reads first. Importing this imports no device library and no operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qhal.interface import QuantOps
    from qhal.selection import BackendInfo, Device

INTERFACE = (1, 0)
"""The interface version that this backend was written against: another qhal says so instead of failing in a call."""


def backend() -> BackendInfo:
    """The entry point of the group `qhal.backends`. order: below 100 for accelerators, smaller is earlier in "auto"."""
    from qhal.selection import BackendInfo
    from qhal_acme.probe import probe

    return BackendInfo("acme", interface=INTERFACE, order=90, probe=probe, load=_load, offline=_offline)


def _load(device: Device) -> QuantOps:
    import torch

    from qhal_acme.ops import AcmeOps

    return AcmeOps(torch.device(device.arch if device.arch == "cpu" else f"{device.arch}:{device.index}"))


def _offline(arch: str) -> QuantOps:
    """`supports` with no device present: plans are made on machines that have none."""
    import torch

    from qhal_acme.ops import AcmeOps

    return AcmeOps(torch.device("meta"))
