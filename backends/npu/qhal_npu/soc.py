"""SoC names and numbers to the generations that operators are documented for.

A2 is Ascend 910B, A3 910_93, A5 950. Numbers are those of `torch_npu.npu.get_soc_version()`, asked as ranges because
lists of torch_npu differ between versions; names are those of `get_device_name`.
"""

from __future__ import annotations

from qhal.errors import BackendError

GENERATIONS = ("A2", "A3", "A5", "310P")
_RANGES = ((200, 205, "310P"), (220, 225, "A2"), (250, 256, "A3"), (260, 299, "A5"))
_NAMES = (("Ascend910_93", "A3"), ("Ascend910B", "A2"), ("Ascend950", "A5"), ("Ascend310P", "310P"))
EXAMPLES = {"A2": "Ascend910B1", "A3": "Ascend910_9391", "A5": "Ascend950PR_9589", "310P": "Ascend310P3"}
"""One name of each generation."""


def generation(name: str, number: int | None = None) -> str:
    """The generation of a device; BackendError for one that no operator here is documented for."""
    for low, high, found in _RANGES:
        if number is not None and low <= number <= high:
            return found
    for prefix, found in _NAMES:
        if name.startswith(prefix):
            return found
    told = f"{name} (SoC {number})" if number is not None else name
    raise BackendError(f"{told}: this backend knows {', '.join(f'{g} ({EXAMPLES[g]})' for g in GENERATIONS)}")
