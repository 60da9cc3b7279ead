"""What every test of this backend starts from: the operations, and random tensors of any format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qhal import Format, QTensor
from qhal.elements import element, values
from qhal_cpu_reference.ops import CpuReference

WEIGHTS = (
    "int4.g32*bf16", "int4.g8*fp16", "int8.row*fp32", "int8.tensor*fp32", "int3.row*fp32", "int2.g16*bf16",
    "int5.g8*fp16", "int4-int4.g16*bf16", "uint4-uint4.g16*fp16", "uint4-fp16.g8*fp16", "uint2-uint2.g8*fp16",
    "int8-int8.tensor*fp32", "int8-fp32.row*fp32", "int8.row*(fp32.tensor/fp32)", "e4m3fn.tensor*fp32",
    "e4m3fn.row*bf16", "e5m2.row*fp32", "e4m3fnuz.row*fp32", "e4m3fn.16x16*fp32", "e4m3fn.16x16*e8m0", "e2m1.g32*e8m0",
    "e3m2.g32*e8m0", "e2m3.g32*e8m0", "e4m3fn.g32*e8m0", "e2m1.g16*(e4m3fn.tensor*fp32)",
    "e2m1.g16*(e4m3fn.tensor/fp32)", "e2m1.g8*(e8m0.g2*fp32)", "int4-int4.row*(bf16.tensor*bf16)", "nf4.flat64*fp32",
    "nf4.flat64*(lut8.flat256*fp32+fp32)", "lut4.flat64*fp32", "uint4.g32*fp16+fp16",
    "uint2.g16*(uint4.g16*fp16)-(uint4.g16*fp16)", "uint4.g8*(uint6.g4*fp16)-(uint6.g4*fp16)",
    "int6.g16*(int8.g16*fp16)", "e4m3fn.row*bf16%2:4", "int1.row*fp32", "bf16", "fp16", "fp32", "e4m3fn",
    "int8.col*fp32",
)  # fmt: skip
"""Every kind of weight that the canonical names have, with blocks that fit small matrices."""


def random_codes(name: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Any code of an element except NaN and Inf."""
    e = element(name)
    if e.wide:
        return torch.randn(shape, generator=g).to(e.storage)
    if e.integer:
        return torch.randint(int(e.smallest), int(e.largest) + 1, shape, generator=g).to(e.storage)
    if e.kind == "exponent":
        return torch.randint(120, 134, shape, generator=g).to(torch.uint8)
    if e.kind == "float":
        bits = torch.randint(0, 256, shape, generator=g).to(torch.uint8).view(e.storage)
        return torch.where(torch.isfinite(bits.float()), bits.float(), 0).to(e.storage)
    return torch.randint(0, 1 << e.bits, shape, generator=g).to(torch.uint8)


def random_tensor(fmt: Format | str, shape: tuple[int, ...], seed: int = 0, *, act_order: bool = False) -> QTensor:
    """A QTensor of `fmt` whose every plane is random; scales of wide types are positive and not all alike."""
    f = Format.parse(fmt) if isinstance(fmt, str) else fmt
    g = torch.Generator().manual_seed(seed)
    return _tensor(f, shape, g, act_order)


def _tensor(f: Format, shape: tuple[int, ...], g: torch.Generator, act_order: bool = False) -> QTensor:
    n, k = shape[-2:]
    lead = shape[:-2]
    grid = (1, 1) if f.block is None else f.block.grid(n, k)
    planes: dict[str, Any] = {}
    for part in ("scale", "zero", "offset"):
        inner: Format | None = getattr(f, part)
        if inner is None:
            continue
        plane = _tensor(inner, (*lead, *grid), g)
        if inner.plain:
            codes = plane.codes
            planes[part] = codes.abs() + 0.25 if part == "scale" and element(inner.element).wide else codes
        else:
            planes[part] = plane
    if element(f.element).kind == "lut" and values(f.element) is None:
        planes["table"] = torch.randn(1 << element(f.element).bits, generator=g)
    if act_order:
        planes["group_index"] = torch.randint(0, grid[1], (k,), generator=g).to(torch.int32)
    return QTensor(f, random_codes(f.element, (*lead, n, k), g), **planes)


@pytest.fixture(scope="session")
def ops() -> CpuReference:
    return CpuReference()


@pytest.fixture(scope="session")
def make() -> Callable[..., QTensor]:
    """random_tensor(format, shape, seed, act_order=False)"""
    return random_tensor


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "weight_format" in metafunc.fixturenames:
        metafunc.parametrize("weight_format", WEIGHTS)
