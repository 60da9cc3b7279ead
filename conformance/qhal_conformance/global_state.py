"""Settings that every caller of a process shares: a backend must leave them, and the suite looks after each case.

Read before a case, compared and put back after it, so that one backend's habit never spoils the next case.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Setting:
    """One setting: its name in reports, how it is read, how it is put back (None: it cannot be)."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object] | None


def settings(device: torch.device) -> tuple[Setting, ...]:
    """Every setting that is watched, those of the device's own type included."""
    kind = device.type
    found = [
        Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Setting("default device", torch.get_default_device, _set_default_device),
        Setting("threads", torch.get_num_threads, torch.set_num_threads),
        Setting("gradient mode", torch.is_grad_enabled, torch.set_grad_enabled),
        Setting("inference mode", torch.is_inference_mode_enabled, None),
        Setting("deterministic algorithms", _deterministic, _set_deterministic),
        Setting("float32 matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        Setting("flushed subnormals", _flushes, torch.set_flush_denormal),
        Setting("random state of torch", _bytes_of(torch.get_rng_state), _to_state(torch.set_rng_state)),
        Setting("random state of numpy", _numpy_state, _set_numpy_state),
        Setting("random state of Python", random.getstate, random.setstate),
    ]
    if torch.amp.is_autocast_available(kind):
        on = partial(torch.is_autocast_enabled, kind)
        found.append(Setting("autocast", on, partial(torch.set_autocast_enabled, kind)))
    module: Any = getattr(torch, kind, None)
    if kind != "cpu" and hasattr(module, "get_rng_state"):
        found.append(
            Setting("random state of the device", _bytes_of(module.get_rng_state), _to_state(module.set_rng_state))
        )
    return tuple(found)


class Watch:
    """The settings of now; `changes()` says which differ later and puts them back."""

    def __init__(self, device: torch.device) -> None:
        self._before = [(setting, setting.read()) for setting in settings(device)]

    def changes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(names of settings that differ, those among them that could not be put back)."""
        changed = [(s, value) for s, value in self._before if s.read() != value]
        for setting, value in changed:
            if setting.write is not None:
                setting.write(value)
        stuck = tuple(s.name for s, value in changed if s.read() != value)
        return tuple(s.name for s, _ in changed), stuck


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)  # None: no mode on the stack, as at start


def _deterministic() -> tuple[bool, bool]:
    on = torch.are_deterministic_algorithms_enabled()
    return on, on and torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


_TINY = 2.0**-1060
"""A subnormal number."""


def _flushes() -> bool:
    """torch has a switch for it, of the processor's thread, and no question: what a product with a subnormal is."""
    return _TINY * 1.0 == 0.0


def _bytes_of(read: Callable[[], torch.Tensor]) -> Callable[[], bytes]:
    return lambda: read().cpu().numpy().tobytes()


def _to_state(write: Callable[[torch.Tensor], object]) -> Callable[[bytes], object]:
    return lambda value: write(torch.frombuffer(bytearray(value), dtype=torch.uint8))


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return (name, np.asarray(keys).tobytes(), *rest)


def _set_numpy_state(value: tuple[Any, ...]) -> None:
    np.random.set_state((value[0], np.frombuffer(value[1], np.uint32), *value[2:]))
