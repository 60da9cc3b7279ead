"""Weights of random codes, for measuring and compiling: values decide no kernel's time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qhal.elements import element, values
from qhal.formats import Format
from qhal.tensors import QTensor


def random_weight(f: Format, shape: tuple[int, ...], generator: torch.Generator, *, index: bool = False) -> QTensor:
    """[..., N, K] of random codes with scales near one, on the generator's device: values decide no kernel's time."""
    assert f.block is not None
    device, k = generator.device, shape[-1]
    order = torch.arange(k, device=device, dtype=torch.int32) // max(f.block.cols, 1) if index else None
    return replace(_random(f, shape, device, generator), group_index=order)


def _random(
    f: Format, shape: tuple[int, ...], device: torch.device, generator: torch.Generator, near_one: bool = False
) -> QTensor:
    """near_one: it is a plane of scales itself."""
    assert f.block is not None
    grid = (*shape[:-2], *f.block.grid(*shape[-2:]))

    def plane(p: Format | None) -> Tensor | QTensor | None:
        if p is None:
            return None
        return _codes(p, grid, device, generator, True) if p.plain else _random(p, grid, device, generator, True)

    codes = _codes(f, shape, device, generator, near_one)
    e = element(f.element)
    own = e.kind == "lut" and values(f.element) is None
    table = torch.linspace(0.5, 1, 1 << e.bits, device=device) if own else None
    return QTensor(f, codes, plane(f.scale), plane(f.zero), plane(f.offset), table=table)


def _codes(
    f: Format, shape: tuple[int, ...], device: torch.device, generator: torch.Generator, near_one: bool = False
) -> Tensor:
    e = element(f.element)
    if e.wide:
        return torch.ones(shape, dtype=e.storage, device=device)
    if e.kind == "exponent":
        return torch.full(shape, 127, dtype=torch.uint8, device=device)
    if e.kind == "float":  # codes of fp8: exponents in the middle, no special ones
        low, high = (0x38, 0x39) if near_one else (0, 0x70)
        return torch.randint(low, high, shape, dtype=torch.uint8, device=device, generator=generator).view(e.storage)
    low, high = (int(e.smallest), int(e.largest)) if e.integer else (0, (1 << e.bits) - 1)
    return torch.randint(low, high + 1, shape, dtype=torch.int16, device=device, generator=generator).to(e.storage)
