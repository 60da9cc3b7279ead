"""RocmOps: what this backend executes, said honestly.

What the shared kernels take (`qhal_triton`) is theirs; everything else is the portable operation on the GPU: exact, and
far from fast.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from qhal_rocm.targets import target
from qhal_triton.gpu import GpuOps


class RocmOps(GpuOps):
    """QuantOps for AMD GPUs.

    arch    exact name of the instruction set: "gfx942"
    device  the torch device: "cuda:0" (torch's word for AMD's too), "meta" offline, "cpu" for Triton's interpreter
    """

    name: ClassVar[str] = "rocm"
    interface: ClassVar[tuple[int, int]] = (1, 0)

    def __init__(self, arch: str, device: str) -> None:
        super().__init__(target(arch), torch.device(device))
