"""Compiling a tile for a chip that is not here (evidence level L1), and what must hold of the result.

Needs Triton's wheel alone: no GPU, no driver, no vendor's toolkit. The process must not have TRITON_INTERPRET set when
kernels are imported; `python -m qhal_triton.compile` is such a process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qhal_triton import machine_code
from qhal_triton.target import Target
from qhal_triton.tiles import Tile

_COLUMNS = 512
"""Of tensor memory, which the matrix instructions of sm_100 add into."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One cell of the compile matrix.

    registers     vector registers of a thread (AMD: with accumulation registers)
    spills        registers (AMD) or bytes (NVIDIA) that did not fit
    shared        bytes of fast memory of a program
    instructions  matrix instructions, with how often each stands in the code
    size          bytes of the binary
    hash          of the source, the options, the chip and Triton's version
    problems      what does not hold, one sentence each; empty: the cell is good
    """

    name: str
    arch: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    size: int = 0
    hash: str = ""
    seconds: float = 0.0
    problems: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def binary(tile: Tile, target: Target) -> Any:
    """Triton's CompiledKernel: `asm` (text and binary by name), `metadata`, `hash`."""
    return triton.compile(source(tile, target), target=gpu(target), options=dict(tile.options))


def compiled(tile: Tile, target: Target) -> Compiled:
    """The tile compiled and judged; a compiler's error is a problem of the cell."""
    start = time.monotonic()
    try:
        made = binary(tile, target)
        asm, shared = made.asm, int(made.metadata.shared)
        columns = int(getattr(made.metadata, "tmem_size", None) or 0)
        if target.kind == "hip":
            (registers, spills, found), code = machine_code.amd(asm["amdgcn"]), asm["hsaco"]
        else:
            code = asm["cubin"]
            registers, spills, found = machine_code.nvidia(asm["ptx"], code)
    except Exception as error:  # any pass of the compiler may raise anything: it is this cell's result
        cause = error.__cause__ or error  # Triton's own error quotes the kernel first
        words = " ".join(str(cause).split())[-300:] or "without a word"
        return Compiled(name=tile.name, arch=target.arch, problems=(f"{type(cause).__name__}: {words}",))
    return Compiled(
        name=tile.name,
        arch=target.arch,
        registers=registers,
        spills=spills,
        shared=shared,
        instructions=dict(found),
        size=len(code),
        hash=made.hash,
        seconds=round(time.monotonic() - start, 2),
        problems=tuple(_problems(tile, target, spills, shared, columns, machine_code.kinds(found))),
    )


def source(tile: Tile, target: Target) -> ASTSource:
    """The tile in the compiler's terms: constexpr arguments by value, what is known of pointers and sizes."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    unknown = (set(tile.signature) | set(tile.constants)) ^ set(tile.fn.arg_names)
    if unknown:
        raise TypeError(f"{tile.name}: arguments {sorted(unknown)} are in the tile or in the kernel, not in both")
    for i, name in enumerate(tile.fn.arg_names):
        if name in tile.constants:
            signature[name] = "constexpr"
            continue
        kind, _, multiple = tile.signature[name].partition(":")
        signature[name] = kind
        pointer = kind.startswith("*")
        if multiple == "16" or (pointer and not multiple):
            attributes[(i,)] = [["tt.divisibility", 16]]
        if pointer and target.kind == "hip":  # as at run time for tensors below 2 GiB: buffer instructions
            attributes.setdefault((i,), []).append(["tt.pointer_range", 32])
    return ASTSource(fn=tile.fn, signature=signature, constexprs=dict(tile.constants), attrs=attributes)


def gpu(target: Target) -> GPUTarget:
    """The target as the compiler names it."""
    arch = target.arch if target.kind == "hip" else int(target.arch.removeprefix("sm_"))
    return GPUTarget(target.kind, arch, target.warp)


def _problems(tile: Tile, target: Target, spills: int, shared: int, columns: int, kinds: set[str]) -> Iterator[str]:
    if shared > target.shared:
        yield f"needs {shared} bytes of shared memory, {target.arch} has {target.shared}"
    if columns > _COLUMNS:  # the compiler says nothing: it makes a kernel that traps
        yield f"needs {columns} columns of tensor memory, a multiprocessor has {_COLUMNS}"
        return
    if spills > tile.spills:
        yield f"spills {spills}, {tile.spills} allowed"
    if tile.matrix and not kinds:
        yield "has no matrix instruction"
    if tile.native and tile.native not in kinds:
        yield f"has matrix instructions for {', '.join(sorted(kinds)) or 'nothing'}, none for {tile.native} operands"
