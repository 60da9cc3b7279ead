"""Ascend NPUs that compute on the processor: torch_npu's operators by their documented formulas.

Level L2. The backend runs unchanged: every call goes through the dispatcher with the wheel's own schema (L1 schema),
and where the wheel is installed its own Meta kernel is asked too (L1 meta). `qhal conformance run --backend
npu_emulated_a2` (or a3, a5) works where this distribution is installed; it is in no other requirements file.
"""

from __future__ import annotations

from functools import partial

from qhal.interface import QuantOps
from qhal.selection import Available, BackendInfo, Device

ARCHS = ("A2", "A3", "A5")


def name(arch: str) -> str:
    """The backend that emulates a generation."""
    return f"npu_emulated_{arch.lower()}"


def info(arch: str) -> BackendInfo:
    """The description of one generation, for an entry point of `qhal.backends`."""
    facts = {"emulated": "documented formulas of torch_npu's operators on the processor"}
    state = Available((Device(0, arch, 0, facts, "L2"),))
    load = partial(ops, arch)
    return BackendInfo(name(arch), (1, 0), 9000, lambda: state, lambda device: load(), lambda _: load(), (arch,))


def ops(arch: str) -> QuantOps:
    """The NPU's operations on the processor."""
    from qhal_npu_emulation import library
    from qhal_npu_emulation.emulated import CLASSES

    library.install()
    return CLASSES[arch](arch, "cpu")


def a2() -> BackendInfo:
    """The entry point of A2."""
    return info("A2")


def a3() -> BackendInfo:
    """The entry point of A3."""
    return info("A3")


def a5() -> BackendInfo:
    """The entry point of A5."""
    return info("A5")
