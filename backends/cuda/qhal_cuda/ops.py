"""CudaOps: what this backend executes today, said honestly."""

from __future__ import annotations

import torch

from qhal.interface import QuantOps
from qhal.requests import Request, Support


class CudaOps(QuantOps):
    """QuantOps for NVIDIA GPUs. No operation is written yet: `supports` says so, and every call raises.

    arch    compute capability: "sm_90"
    device  the torch device, "meta" offline
    """

    name = "cuda"
    interface = (1, 0)

    def __init__(self, arch: str, device: str) -> None:
        self._arch = arch
        self._device = device

    @property
    def device(self) -> torch.device:
        """The torch device of the results."""
        return torch.device(self._device)

    def supports(self, request: Request) -> Support:
        """`not_implemented` for everything, with what to do meanwhile."""
        reason = f"no kernel is connected for {self._arch} in this version; use cpu_reference meanwhile"
        return Support("not_implemented", reason)
