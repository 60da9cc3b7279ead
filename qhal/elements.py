"""The numbers that one code can stand for: every element type, its width, its storage and its table of values.

Integers are two's complement (`int`) or plain (`uint`). Small floats follow the OCP 8-bit and Microscaling (MX)
specifications: e4m3fn has no infinity and one NaN per sign, the `fnuz` flavours have one NaN (0x80) and no -0, e5m2 is
IEEE-like, e3m2, e2m3 and e2m1 are finite only, e8m0 is a power of two with 0xFF as NaN. nf4 is the table of the QLoRA
paper (appendix E); lut4 and lut8 carry a table of their own, and lut8 is quantized to `dynamic_map`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qhal.errors import FormatError


@dataclass(frozen=True)
class Element:
    """One element type. `storage` is the torch dtype that holds one code; `largest` the largest finite value."""

    name: str
    kind: str
    """int | uint | float (a torch dtype) | mini (a table of at most 64 values) | exponent | lut"""
    bits: int
    storage: torch.dtype
    largest: float
    smallest: float

    @property
    def integer(self) -> bool:
        """Whether codes are integers that stand for themselves."""
        return self.kind in ("int", "uint")

    @property
    def wide(self) -> bool:
        """Whether this is a plain 16- or 32-bit float: such a plane is stored as numbers, not as codes."""
        return self.name in WIDE


WIDE: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FLOAT8 = {
    "e4m3fn": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2": torch.float8_e5m2,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}
MINI = {"e3m2": (3, 2, 3), "e2m3": (2, 3, 1), "e2m1": (2, 1, 1)}
"""Exponent bits, mantissa bits and bias of the mini floats."""
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _registry() -> dict[str, Element]:
    table: dict[str, Element] = {}
    for b in range(1, 9):
        table[f"int{b}"] = Element(f"int{b}", "int", b, torch.int8, 2.0 ** (b - 1) - 1, -(2.0 ** (b - 1)))
        table[f"uint{b}"] = Element(f"uint{b}", "uint", b, torch.uint8, 2.0**b - 1, 0.0)
    for name, dtype in _FLOAT8.items():
        top = torch.finfo(dtype).max
        table[name] = Element(name, "float", 8, dtype, top, -top)
    for name, (e, m, bias) in MINI.items():
        top = (2 - 2.0**-m) * 2.0 ** (2**e - 1 - bias)
        table[name] = Element(name, "mini", 1 + e + m, torch.uint8, top, -top)
    table["e8m0"] = Element("e8m0", "exponent", 8, torch.uint8, 2.0**127, 2.0**-127)
    table["nf4"] = Element("nf4", "lut", 4, torch.uint8, 1.0, -1.0)
    table["lut4"] = Element("lut4", "lut", 4, torch.uint8, float("inf"), -float("inf"))
    table["lut8"] = Element("lut8", "lut", 8, torch.uint8, 1.0, -0.992968738079071)  # `dynamic_map`
    for name, dtype in WIDE.items():
        top = torch.finfo(dtype).max
        table[name] = Element(name, "float", 8 * dtype.itemsize, dtype, top, -top)
    return table


ELEMENTS: dict[str, Element] = _registry()
_OF_DTYPE = {e.storage: e.name for e in ELEMENTS.values() if e.kind == "float"}


def element(name: str) -> Element:
    """The element type called `name`; FormatError with the nearest names otherwise."""
    try:
        return ELEMENTS[name]
    except KeyError:
        raise FormatError(_unknown(name)) from None


def _unknown(name: str) -> str:
    if name in ("e4m3", "fp8", "float8_e4m3"):
        return f"element {name!r} is ambiguous: the flavour changes the value; write e4m3fn (OCP) or e4m3fnuz"
    stem = re.sub(r"\d+$", "", name)
    near = [n for n in ELEMENTS if stem and n.startswith(stem)] or list(ELEMENTS)
    return f"unknown element {name!r}; known: {', '.join(near)}"


def dtype_name(dtype: torch.dtype) -> str:
    """The element name of a torch float dtype: torch.bfloat16 -> "bf16"."""
    try:
        return _OF_DTYPE[dtype]
    except KeyError:
        raise FormatError(f"{dtype} is no element type; known: {', '.join(str(d) for d in _OF_DTYPE)}") from None


@cache
def values(name: str) -> Tensor | None:
    """float32 value of every code of a table-decoded element (mini floats, nf4), else None."""
    if name in MINI:
        e, m, bias = MINI[name]
        codes = torch.arange(1 << (1 + e + m), device="cpu")  # cached: never on a default device
        exponent, mantissa = (codes >> m) & ((1 << e) - 1), codes & ((1 << m) - 1)
        normal = (1 + mantissa / 2.0**m) * torch.exp2((exponent - bias).double())
        subnormal = mantissa * 2.0 ** (1 - bias - m)
        magnitude = torch.where(exponent == 0, subnormal.double(), normal)
        sign = 1.0 - 2.0 * (codes >> (e + m)).double()
        return (sign * magnitude).float()
    return torch.tensor(_NF4, device="cpu") if name == "nf4" else None


@cache
def dynamic_map() -> Tensor:
    """float32 [256] in rising order: the table that bitsandbytes quantizes scales with, and that `lut8` is encoded to.

    Decades 10^-6 to 1 of which decade i has 2^i values, the middles of as many equal parts of 0.1 to 1, with both
    signs; and 0 and 1. Source: T. Dettmers, 8-Bit Approximations for Parallelism in Deep Learning (2016), dynamic tree
    quantization. Edges and middles are rounded to float32 once each, as bitsandbytes 0.50.2 writes them.
    """
    low = torch.tensor(0.1, device="cpu").double()  # cached: never on a default device
    found = [torch.tensor([0.0, 1.0], device="cpu")]
    for i in range(7):
        parts = 1 << i
        step = (1 - low).float().double() / parts
        j = torch.arange(parts + 1, device="cpu").double()
        edges = torch.where(j < (parts + 1) // 2, low + step * j, 1 - step * (parts - j)).float()
        middles = (edges[:-1] + edges[1:]) / 2 * torch.tensor(10.0 ** (i - 6), device="cpu")
        found += [middles, -middles]
    return torch.cat(found).sort().values


def lookup(name: str) -> Tensor | None:
    """The table that a lut element is encoded to: nf4's own, `dynamic_map` for lut8, none for lut4."""
    return dynamic_map() if name == "lut8" else values(name)


@cache
def _float8_values(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float()


def decode(name: str, codes: Tensor, table: Tensor | None = None) -> Tensor:
    """The float32 value of each code; exact. `table` [2**bits] is required by lut4 and lut8.

    Any dtype may hold a wide float (fp16 values in a float32 tensor are legal planes); codes of the other elements
    come in `Element.storage`. e8m0 also accepts torch.float8_e8m0fnu; 255 is NaN.
    """
    kind = element(name).kind
    if kind == "lut" or kind == "mini":
        lut = table if table is not None else values(name)
        if lut is None:
            raise FormatError(f"{name} needs a table of {2 ** element(name).bits} values; none was given")
        return lut.to(device=codes.device, dtype=torch.float32)[codes.long()]
    if codes.is_cpu and codes.dtype in _FLOAT8.values():  # torch converts one by one; a table is several times as fast
        index = codes.reshape(-1).view(torch.uint8).int()
        return _float8_values(codes.dtype).index_select(0, index).view(codes.shape)
    if kind == "exponent":
        exponent = codes.view(torch.uint8) if codes.dtype == torch.float8_e8m0fnu else codes
        bits = exponent.int() << 23  # not ldexp: on a device that is not the current one torch 2.11 gives zeros
        bits = torch.where(exponent == 0, 0x00400000, torch.where(exponent == 255, 0x7FC00000, bits))
        return bits.int().view(torch.float32)
    return codes.to(torch.float32)
