"""AITER, AMD's library of kernels: the calls that are made, as they were read, and whether what is installed is that.

Source: ROCm/aiter, snapshot of 2026-08-22: `aiter/ops/gemm_op_a8w8.py`, `aiter/ops/triton/gemm_afp4wfp4.py`. The name
`aiter` on the package index is another project; AMD's distribution is `amd-aiter`. Its import initialises HIP, so it is
tried when operations are loaded and never by the probe. What is missing, another version whose functions have other
arguments, or an import that fails leaves a poorer table of paths and a warning that says so.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGE = "amd-aiter"
INSTALL = "pip install amd-aiter, or build https://github.com/ROCm/aiter for your ROCm"


@dataclass(frozen=True)
class Call:
    """A function of the library. arguments: the names that we pass, positional ones first, in the function's order."""

    module: str
    name: str
    positional: tuple[str, ...]
    named: tuple[str, ...]

    def function(self) -> Callable[..., Any]:
        """The function itself; imports the library."""
        return getattr(import_module(self.module), self.name)  # type: ignore[no-any-return]


ROWS = Call("aiter", "gemm_a8w8", ("XQ", "WQ", "x_scale", "w_scale"), ("bias", "dtype", "splitK"))
"""[M, K] x [N, K] of int8 or fp8, scales float32 [M, 1] and [1, N]; bf16 or fp16 result."""
BLOCKS = Call("aiter", "gemm_a8w8_blockscale", ("XQ", "WQ", "x_scale", "w_scale"), ("dtype",))
"""fp8 with scales float32 [M, K / 128] and [N / 128, K / 128]."""
MXFP4 = Call("aiter.ops.triton.gemm_afp4wfp4", "gemm_afp4wfp4", ("x", "w", "x_scales", "w_scales"), ("dtype",))
"""Two codes to a byte, uint8 [M, K / 2] and [N, K / 2], scales e8m0 as uint8 [M, K / 32] and [N, K / 32]."""
CALLS = (ROWS, BLOCKS, MXFP4)


def installed() -> str | None:
    """The version of AMD's distribution; None where there is none. Imports nothing."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def usable() -> frozenset[str]:
    """Names of the calls that can be made here; a warning for each that cannot though the library is installed."""
    found = installed()
    if found is None:
        return frozenset()
    names = set()
    for call in CALLS:
        why = _problem(call)
        if why is None:
            names.add(call.name)
        else:
            text = f"{PACKAGE} {found}: {call.module}.{call.name} is not used: {why}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    return frozenset(names)


def _problem(call: Call) -> str | None:
    try:
        function = call.function()
        parameters = list(inspect.signature(function).parameters)
    except Exception as error:  # whatever its import raises: the backend works without it
        return f"its import failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    count = len(call.positional)
    if tuple(parameters[:count]) != call.positional or not set(call.named) <= set(parameters[count:]):
        return f"its arguments are {', '.join(parameters)}; read was {', '.join(call.positional + call.named)}"
    return None
