"""The AMD backend of qhal (distribution qhal-rocm).

Importing this package imports no device library: `backend()` only describes it (`qhal.selection`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qhal.interface import QuantOps
from qhal.requests import Request
from qhal.selection import BackendInfo, Device


def backend() -> BackendInfo:
    """The light description that the entry point `qhal.backends` gives."""
    from qhal_rocm.probe import probe
    from qhal_rocm.targets import CHIPS

    return BackendInfo(
        "rocm", (1, 0), order=20, probe=probe, load=_load, offline=_offline, archs=tuple(CHIPS), build=_build
    )


def _load(device: Device) -> QuantOps:
    from qhal_rocm.ops import RocmOps

    if device.evidence == "L2":
        return RocmOps(device.arch, "cpu")
    from qhal_rocm.aiter_calls import usable
    from qhal_rocm.targets import target
    from qhal_triton import ahead
    from qhal_triton.tuning import fingerprint, load

    _same_chip(device)
    ahead.require_cache()
    ahead.used(target(device.arch))
    return RocmOps(device.arch, f"{_TORCH_DEVICE}:{device.index}", usable(), load(fingerprint(device)))


def _same_chip(device: Device) -> None:
    """The probe reads the driver's list, torch numbers what the runtime shows: they must mean the same GPU."""
    import torch

    from qhal.errors import BackendError

    name = str(getattr(torch.cuda.get_device_properties(device.index), "gcnArchName", "")).partition(":")[0]
    if name != device.arch:
        raise BackendError(
            f"rocm:{device.index} is {device.arch} for the kernel driver and {name or 'no AMD GPU'} for torch; "
            "check the visible-devices variables, or name another device"
        )


def _offline(arch: str) -> QuantOps:
    from qhal_rocm.ops import RocmOps

    return RocmOps(arch, "meta")


def _build(
    arch: str, requests: Sequence[Request], folder: Path, seen: Callable[[Request], None]
) -> Mapping[str, object]:
    from qhal_rocm.ops import RocmOps
    from qhal_triton import ahead

    return ahead.build(RocmOps(arch, "cpu"), requests, folder, seen)


_TORCH_DEVICE = "cuda"
"""torch's word for AMD's GPUs too."""
