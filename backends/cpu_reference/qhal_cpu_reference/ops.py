"""CpuReference: the portable operations on the processor, where they define the numbers."""

from __future__ import annotations

from typing import ClassVar

import torch

from qhal.interface import MemoryStats
from qhal_cpu_reference import memory
from qhal_portable.ops import PortableOps

CPU = torch.device("cpu")


class CpuReference(PortableOps):
    """The meaning of every operation; the numerics stand in `qhal_portable`, file by file."""

    name: ClassVar[str] = "cpu_reference"
    interface: ClassVar[tuple[int, int]] = (1, 0)

    @property
    def device(self) -> torch.device:
        """The processor."""
        return CPU

    def memory_stats(self) -> MemoryStats:
        """Resident bytes of this process."""
        return memory.stats()
