"""Which devices are usable here. A probe imports little, opens no context, and has a reason for every no."""

from __future__ import annotations

import os

import torch

from qhal.selection import Available, Device, Unavailable

VARIABLE = "ACME_DEVICE"
"""Overrides what is found: `cpu` runs the same code on the processor, `TYPE:INDEX` takes one device."""


def probe() -> Available | Unavailable:
    """What torch finds. A real backend asks its driver for names, memory and versions: they end up in reports."""
    wanted = os.environ.get(VARIABLE, "").strip()
    found = torch.accelerator.current_accelerator(check_available=True)
    here = [] if found is None else [_device(found.type, i) for i in range(torch.accelerator.device_count())]
    if not wanted:
        hint = f"install its driver and a torch that knows it, or set {VARIABLE}=cpu to run on the processor"
        return Available(tuple(here)) if here else Unavailable(f"torch {torch.__version__} finds no accelerator", hint)
    if wanted == "cpu":
        return Available((_device("cpu", 0),))
    kind, _, index = wanted.partition(":")
    chosen = tuple(d for d in here if d.arch == kind and index in ("", str(d.index)))
    known = ", ".join(["cpu", *(f"{d.arch}:{d.index}" for d in here)])
    return Available(chosen) if chosen else Unavailable(f"{VARIABLE}={wanted!r} is not here", f"choose one of: {known}")


def _device(kind: str, index: int) -> Device:
    """On the processor the same code is only emulated, and reports say so: L2, never L3."""
    return Device(index, arch=kind, facts={"torch": torch.__version__}, evidence="L2" if kind == "cpu" else "L3")
