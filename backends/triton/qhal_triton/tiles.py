"""Tile: one kernel with everything fixed that a compiler needs; what compile checks and ahead-of-time builds read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from qhal_triton.target import Target

FAMILIES = ("gemm", "grouped", "quantize", "hadamard", "vq", "kv", "attention")
"""Folders of this package; each has `tiles(target)`."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A kernel to compile.

    name       unique: "gemm.words[int4.g128*bf16 x bf16]"
    fn         the `triton.jit` function
    signature  argument name to Triton's type: "*bf16", "*u8", "i32", "fp32"; constexpr arguments are left out. Pointers
               are taken as multiples of 16 bytes, "*bf16:1" as of nothing; "i32:16" is a multiple of 16. See `sized`
    constants  the constexpr arguments
    options    num_warps, num_stages, enable_fp_fusion
    matrix     whether it must use matrix instructions
    native     operands that some matrix instruction must take as they are: "16" (bits), "int8", "fp8", "mx" (block
               scales); "": any. What a compiler converts to 16 bits first is right and slow, and must not be claimed
    spills     how much may be spilled (registers on AMD, bytes on NVIDIA)
    variant    another tile stands for this kernel and format: compiled where everything is (`--full`)
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    matrix: bool = False
    native: Literal["", "16", "int8", "fp8", "mx"] = ""
    spills: int = 0
    variant: bool = False


def sized(values: Mapping[str, int | None]) -> tuple[dict[str, str], dict[str, int]]:
    """(signature, constants) of sizes and strides as a launch with these values specializes them.

    None: any value. Triton compiles 1 as a constant, and a multiple of 16 (0 too) as one: rows whose stride is such a
    multiple are read 16 bytes at a time, others element by element, which is another kernel.
    """
    constants = {name: 1 for name, value in values.items() if value == 1}
    known = {name: "i32" if value is None or value % 16 else "i32:16" for name, value in values.items()}
    return {name: kind for name, kind in known.items() if name not in constants}, constants


def tiles(target: Target) -> Iterator[Tile]:
    """One tile for every kernel and format that this target is said to execute."""
    for family in FAMILIES:
        yield from import_module(f"qhal_triton.{family}").tiles(target)
