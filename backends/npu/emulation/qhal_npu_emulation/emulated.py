"""NpuOps under the names of the emulated backends: nothing of it is changed, ranks must only find it again by name."""

from __future__ import annotations

from typing import ClassVar

from qhal_npu.ops import NpuOps


class EmulatedA2(NpuOps):
    """An A2."""

    name: ClassVar[str] = "npu_emulated_a2"
    interface: ClassVar[tuple[int, int]] = (1, 0)


class EmulatedA3(NpuOps):
    """An A3."""

    name: ClassVar[str] = "npu_emulated_a3"
    interface: ClassVar[tuple[int, int]] = (1, 0)


class EmulatedA5(NpuOps):
    """An A5."""

    name: ClassVar[str] = "npu_emulated_a5"
    interface: ClassVar[tuple[int, int]] = (1, 0)


CLASSES: dict[str, type[NpuOps]] = {"A2": EmulatedA2, "A3": EmulatedA3, "A5": EmulatedA5}
