"""What the kernels' compiler knows of an NVIDIA GPU, by its compute capability."""

from __future__ import annotations

from qhal.errors import UnsupportedError
from qhal.requests import Support
from qhal_triton.target import Target

_SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99, (12, 1): 99}
"""KiB of shared memory that one block may use (CUDA C++ programming guide, table of technical specifications)."""
_FP8 = (8, 9)
"""Compute capability from which there are matrix instructions for fp8."""


def capability(arch: str) -> tuple[int, int]:
    """(9, 0) of "sm_90", (12, 0) of "sm_120"; UnsupportedError for another word."""
    digits = arch.removeprefix("sm_")
    if not digits.isdigit() or len(digits) < 2:
        raise UnsupportedError(Support("unsupported", f"{arch!r} is no compute capability such as sm_90"))
    return int(digits[:-1]), int(digits[-1])


def target(arch: str) -> Target:
    """The target of a compute capability; one that is not in the table has the shared memory of the smallest."""
    found = capability(arch)
    return Target(
        kind="cuda",
        arch=arch,
        warp=32,
        shared=_SHARED.get(found, 99) << 10,
        fp8=frozenset({"e4m3fn", "e5m2"} if found >= _FP8 else ()),
        mx=found[0] in (10, 12),
    )
