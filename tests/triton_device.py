"""The operations over the shared Triton kernels where the tests run: on the GPU, else in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from qhal.interface import MemoryStats
from qhal.tensors import QTensor
from qhal_triton.ops import TritonOps
from qhal_triton.target import Target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = Target(kind="cuda", arch="sm_90", warp=32, shared=227 << 10, fp8=frozenset({"e4m3fn", "e5m2"}))


class Kernels(TritonOps):
    """What the shared kernels take is theirs, the rest is portable."""

    name: ClassVar[str] = "triton"

    def __init__(self) -> None:
        super().__init__(HOPPER, torch.device(DEVICE))

    def synchronize(self) -> None:
        """Wait for the device."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def capture(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Not asked here."""
        raise NotImplementedError

    def memory_stats(self) -> MemoryStats:
        """Not asked here."""
        raise NotImplementedError


def same(got: QTensor, want: QTensor) -> None:
    """Equal planes; any NaN is NaN."""
    ours, theirs = got.planes(), want.planes()
    assert ours.keys() == theirs.keys() and got.format == want.format
    for name, plane in theirs.items():
        mine = ours[name].cpu()
        assert (mine.shape, mine.dtype) == (plane.shape, plane.dtype), name
        wrong = _words(mine) != _words(plane)
        if plane.dtype.is_floating_point:
            wrong &= ~(torch.isnan(mine.float()) & torch.isnan(plane.float()))
        assert not wrong.any(), (name, mine[wrong][:4], plane[wrong][:4])


def _words(plane: Tensor) -> Tensor:
    return plane.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[plane.element_size()])
