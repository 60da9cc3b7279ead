"""Launcher: a kernel with the arguments that stay, so that a launch looks only at those that change.

`kernel[grid](...)` binds, classifies and hashes every argument in every call, constants too: tens of microseconds for a
kernel with eighty. What Triton's choice of a binary depends on is the types of arguments, whether addresses and whole
numbers are multiples of 16, and which numbers are 1. So where the numbers are those of an earlier launch, and tensors
have its types and alignments, its binary is started again. Everything else is Triton's own launch, also a first one:
the interpreter, the driver of `absent.py`, tensors that are not on a GPU of CUDA, and launches that a profiler watches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from qhal_triton.bits import INTERPRETED

MOST = 64
"""Launches that a Launcher remembers; they start anew beyond."""


class Launcher:
    """`launcher(grid, tensors, numbers)` starts `kernel` with the arguments of these names, and with `fixed`.

    tensors  names of tensors, which may be None
    numbers  names of whole numbers and floats
    fixed    the other arguments, the compile-time ones among them. Tensors keep their addresses as long as this lives
    options  num_warps and so on, as Triton takes them
    """

    def __init__(
        self, kernel: Any, tensors: Sequence[str], numbers: Sequence[str], fixed: Mapping[str, Any], **options: Any
    ) -> None:
        names = list(kernel.arg_names)
        if sorted(names) != sorted([*tensors, *numbers, *fixed]):
            raise TypeError(f"{kernel} takes {names}, not {[*tensors, *numbers, *fixed]}")
        self._kernel, self._fixed, self._options = kernel, dict(fixed), options
        self._tensors, self._numbers = tuple(tensors), tuple(numbers)
        self._places = [names.index(name) for name in tensors]
        self._found: dict[tuple[Any, ...], tuple[CompiledKernel, list[Any]]] = {}
        kept = [value for value in fixed.values() if isinstance(value, Tensor)]
        self._direct = not INTERPRETED and torch.version.hip is None and all(value.is_cuda for value in kept)

    def __call__(
        self, grid: tuple[int, int, int], tensors: Sequence[Tensor | None], numbers: tuple[int | float, ...]
    ) -> None:
        """Starts the kernel on the current stream of the current device."""
        if not self._direct or _watched(self._kernel):
            self.ordinary(grid, tensors, numbers)
            return
        active = driver.active
        device = active.get_current_device()
        types: list[torch.dtype | None] = []
        addresses: list[int | None] = []
        low = 0
        for t in tensors:
            if t is None:
                types.append(None)
                addresses.append(None)
            elif t.is_cuda:
                address = t.data_ptr()
                low |= address
                types.append(t.dtype)
                addresses.append(address)
            else:
                self.ordinary(grid, tensors, numbers)
                return
        odd = tuple(bool(a and a & 15) for a in addresses) if low & 15 else ()
        key = (device, numbers, odd, *types)
        found = self._found.get(key)
        if found is None:
            self._keep(key, self.arguments(tensors, numbers), self.ordinary(grid, tensors, numbers))
            return
        binary, values = found
        values = values.copy()
        for place, where in zip(self._places, addresses, strict=True):
            values[place] = where
        stream = active.get_current_stream(device)
        binary.run(*grid, stream, binary.function, binary.packed_metadata, None, None, None, *values)

    def ordinary(self, grid: tuple[int, int, int], tensors: Sequence[Tensor | None], numbers: Sequence[Any]) -> Any:
        """Triton's own launch; the binary, where there is one."""
        return self._kernel[grid](**self.arguments(tensors, numbers), **self._options)

    def arguments(self, tensors: Sequence[Tensor | None], numbers: Sequence[Any]) -> dict[str, Any]:
        """All of the kernel's arguments, in its order."""
        open = zip((*self._tensors, *self._numbers), (*tensors, *numbers), strict=True)
        given = self._fixed | dict(open)
        return {name: given[name] for name in self._kernel.arg_names}

    def __deepcopy__(self, memo: dict[int, Any]) -> Launcher:
        """With tensors of its own, and without the addresses of these."""
        fixed = {
            name: deepcopy(value, memo) if isinstance(value, Tensor) else value for name, value in self._fixed.items()
        }
        return Launcher(self._kernel, self._tensors, self._numbers, fixed, **self._options)

    def _keep(self, key: tuple[Any, ...], arguments: Mapping[str, Any], binary: Any) -> None:
        if not isinstance(binary, CompiledKernel):  # the promise of one
            return
        if len(self._found) >= MOST:
            self._found.clear()
        self._found[key] = binary, [v.data_ptr() if isinstance(v, Tensor) else v for v in arguments.values()]


def _watched(kernel: Any) -> bool:
    """Whether somebody asked to be told of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
