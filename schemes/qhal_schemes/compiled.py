"""Whether the compiled loops are there. They change how long reading takes, never a bit."""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

from torch import Tensor


def loops(name: str, *tensors: Tensor) -> ModuleType | None:
    """The module `qhal_schemes.loops.<name>`; None without numba, and for tensors of an accelerator.

    QHAL_COMPILED_LOOPS=0 in the environment turns them off.
    """
    if any(t.device.type != "cpu" for t in tensors):
        return None
    return _module(name, os.environ.get("QHAL_COMPILED_LOOPS", "1") != "0")


@cache
def _module(name: str, wanted: bool) -> ModuleType | None:
    if not wanted:
        return None
    try:
        return importlib.import_module(f"qhal_schemes.loops.{name}")  # here: numba takes half a second
    except ModuleNotFoundError as missing:
        if missing.name != "numba":
            raise
        return None
