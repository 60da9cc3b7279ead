"""Calling kernels for a chip that is not here: Triton compiles what a launch needs, and the launch itself does nothing.

Triton specializes a kernel by the arguments of a launch: types, alignment, sizes that are 1 or multiples of 16, tiles.
So the binaries that a program will ask for are known exactly only by making its calls. `Absent` is a Triton driver that
names the chip, and keeps each launch instead of making it. Results of operations are then undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from qhal.errors import BackendError
from qhal_triton.bits import INTERPRETED
from qhal_triton.offline import gpu
from qhal_triton.target import Target


@dataclass(frozen=True)
class Launch:
    """One launch that was not made. arguments: by position, tensors as they were given; binary: the code."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    source: Any
    metadata: Any
    binary: bytes


class Absent:
    """What Triton asks of a driver, answered from the table of chips."""

    def __init__(self, target: Target) -> None:
        self.launches: list[Launch] = []
        self.utils = self
        self._target = target
        self._binaries: dict[str, bytes] = {}

    def get_current_target(self) -> GPUTarget:
        """The chip."""
        return gpu(self._target)

    def get_current_device(self) -> str:
        """The key by which Triton keeps compiled kernels: one set for each chip."""
        return self._target.arch

    def get_current_stream(self, device: object) -> int:
        """Any."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors live."""
        return torch.device("cpu")

    def get_device_properties(self, device: object) -> dict[str, int]:
        """What Triton checks before a launch."""
        return {"max_shared_mem": self._target.shared, "warpSize": self._target.warp}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: object
    ) -> tuple[object, object, int, int, int]:
        """Kept for `Launch`; handles, registers, spills, threads."""
        self._binaries[name] = binary
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Nothing was loaded."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls for each launch: grid, stream, function, two records, two hooks, the arguments."""

        def launch(x: int, y: int, z: int, *given: Any) -> None:
            binary = self._binaries[metadata.name]
            self.launches.append(Launch(metadata.name, (x, y, z), tuple(given[6:]), source, metadata, binary))

        return launch


@contextmanager
def absent(target: Target, cache: Path) -> Iterator[Absent]:
    """Kernels that are launched inside are compiled for `target` into the folder `cache`, and not run.

    BackendError where TRITON_INTERPRET=1 has replaced the compiler.
    """
    if INTERPRETED:
        raise BackendError("TRITON_INTERPRET=1 has replaced Triton's compiler in this process; unset it")
    before, folder, made = driver._active, triton.knobs.cache.dir, Absent(target)
    driver.set_active(made)
    triton.knobs.cache.dir = str(cache)
    try:
        yield made
    finally:
        triton.knobs.cache.dir = folder
        driver._active = before


def names(launches: Sequence[Launch]) -> list[str]:
    """The kernels' names, each once, in the order of their first launch."""
    return list(dict.fromkeys(launch.kernel for launch in launches))
