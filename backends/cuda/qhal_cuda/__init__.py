"""The NVIDIA backend of qhal (distribution qhal-cuda).

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
    from qhal_cuda.probe import probe

    return BackendInfo(
        "cuda",
        (1, 0),
        order=10,
        probe=probe,
        load=_load,
        offline=_offline,
        archs=("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
        build=_build,
    )


def _load(device: Device) -> QuantOps:
    from qhal_cuda.libraries import usable
    from qhal_cuda.ops import CudaOps
    from qhal_cuda.targets import target
    from qhal_triton import ahead
    from qhal_triton.tuning import fingerprint, load

    ahead.require_cache()
    ahead.used(target(device.arch))
    return CudaOps(device.arch, f"{_TORCH_DEVICE}:{device.index}", usable(), load(fingerprint(device)))


def _offline(arch: str) -> QuantOps:
    from qhal_cuda.ops import CudaOps

    return CudaOps(arch, "meta")


def _build(
    arch: str, requests: Sequence[Request], folder: Path, seen: Callable[[Request], None]
) -> Mapping[str, object]:
    from qhal_cuda.ops import CudaOps
    from qhal_triton import ahead

    return ahead.build(CudaOps(arch, "cpu"), requests, folder, seen)


_TORCH_DEVICE = "cuda"
