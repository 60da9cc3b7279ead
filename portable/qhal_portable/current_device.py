"""Operations on the second accelerator of a process that works on the first.

torch switches devices by itself for most of its kernels, not for all: in 2.11 `torch.ldexp` of a tensor on GPU 1 gives
zeros while 0 is the current one. Kernels from outside of torch go to the current device always. So every operation runs
with its own device as the current one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, TypeVar

import torch

from qhal.interface import QuantOps

_OPERATIONS = (
    "quantize", "prepare", "restore", "gemm", "grouped_gemm", "quant_kv", "attention", "hadamard", "vq_decode",
    "comm_quant", "attention_batch",
)  # fmt: skip
_Ops = TypeVar("_Ops", bound=type[QuantOps])


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, `device` is the one that kernels are launched on; nothing to do for a processor."""
    if device.type in ("cpu", "meta") or device.index is None:
        return nullcontext()
    return torch.accelerator.device_index(device.index)


@lru_cache(maxsize=1)
def _alone() -> bool:
    """Whether this process sees one accelerator, which is then the current one."""
    return torch.accelerator.device_count() == 1


def with_own_device(cls: _Ops) -> _Ops:
    """A class of operations, each run with `self.device` as the current device: one call of the runtime more."""
    for name in _OPERATIONS:
        operation = getattr(cls, name)
        if not getattr(operation, "on_own_device", False):
            setattr(cls, name, _guarded(operation))
    return cls


def _guarded(operation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def call(self: QuantOps, *args: Any, **kwargs: Any) -> Any:
        device = self.device
        if device.type in ("cpu", "meta") or _alone() or torch.accelerator.current_device_index() == device.index:
            return operation(self, *args, **kwargs)
        with current(device):
            return operation(self, *args, **kwargs)

    call.on_own_device = True  # type: ignore[attr-defined]
    return call
