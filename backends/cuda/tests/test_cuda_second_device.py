"""Operations on device 1 of a process whose current device is 0 run with 1 as the current device (told by a fake)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qhal.requests import Request, Support
from qhal_portable import current_device
from qhal_portable.current_device import with_own_device
from qhal_portable.ops import PortableOps


class Switch:
    """Stands for the runtime's current device."""

    def __init__(self) -> None:
        self.now = 0

    def device_index(self, index: int) -> Any:
        outer = self

        class Inside:
            def __enter__(self) -> None:
                self.before, outer.now = outer.now, index

            def __exit__(self, *_: object) -> None:
                outer.now = self.before

        return Inside()


def ops(switch: Switch, device: str) -> PortableOps:
    class Plain(PortableOps):
        name = "second"
        interface = (1, 0)

        @property
        def device(self) -> torch.device:
            return torch.device(device)

        def supports(self, request: Request) -> Support:
            return super().supports(request)

        def vq_decode(self, w: Any, *, rows: slice | None = None, out: Any = None) -> Any:
            return switch.now

    return with_own_device(Plain)()


def test_the_current_device_is_the_operations_own(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = Switch()
    monkeypatch.setattr(current_device, "_alone", lambda: False)
    monkeypatch.setattr(torch.accelerator, "device_index", switch.device_index)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: switch.now)
    assert ops(switch, "cuda:1").vq_decode(None) == 1
    assert switch.now == 0
    switch.now = 1
    assert ops(switch, "cuda:1").vq_decode(None) == 1
    switch.now = 0
    assert ops(switch, "cpu").vq_decode(None) == 0
