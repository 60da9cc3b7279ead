"""What compiled kernels say of themselves: registers, spills and matrix instructions, read from assembly and binaries.

AMD's compiler writes its figures into the assembly text; for NVIDIA the `cuobjdump` that comes with Triton reads the
binary. Neither needs a device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

_AMD = re.compile(r"^\s*(v_s?mfma\w*|v_s?wmma\w*|v_swmmac\w*)", re.MULTILINE)
_PTX = re.compile(r"\b((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*)")
_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*?\b(0x[0-9a-f]+)")
_LOCAL = re.compile(r"\b(?:STL|LDL)\b")
_ASIDE = 32
"""Bytes of a thread, eight registers, that a program may put aside outside its loops."""
_SKIPPED = frozenset({"sync", "aligned", "row", "col", "cta_group::1", "cta_group::2", "satfinite"})
_KINDS = (  # first match wins: the more special name contains the more general one
    ("mx", re.compile(r"mfma_scale|block_scale|kind::mx")),
    ("fp8", re.compile(r"_f8f6f4|_fp8|_bf8|e4m3|e5m2|kind::f8f6f4")),
    ("int8", re.compile(r"_i8\b|_iu8|\.[su]8\b|kind::i8")),
    ("16", re.compile(r"bf16|f16")),
)


def amd(text: str) -> tuple[int, int, Counter[str]]:
    """(vector registers, spilled ones, matrix instructions) of AMD assembly.

    Scalar registers that do not fit lie in lanes of vector registers: no memory is read, so they are not counted.
    """

    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return figure("vgpr_count") + figure("agpr_count"), figure("vgpr_spill_count"), Counter(_AMD.findall(text))


def nvidia(ptx: str, cubin: bytes) -> tuple[int, int, Counter[str]]:
    """(registers, bytes spilled, matrix instructions); a kernel's stack is for spills.

    Up to 32 bytes that no loop touches are not counted: a program stores and loads them once, its steps never. Such are
    values put aside while it loops, and the place to return to from a division's rare case.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = _dumped("--dump-resource-usage", file.name)
        registers, stack = re.search(r"REG:(\d+)", used), re.search(r"STACK:(\d+)", used)
        assert registers and stack, used
        spilled = int(stack[1])
        if 0 < spilled <= _ASIDE and not looped(_dumped("-sass", file.name)):
            spilled = 0
    return int(registers[1]), spilled, Counter(_short(name) for name in _PTX.findall(ptx))


def _dumped(what: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, file], capture_output=True, text=True, check=True).stdout


def looped(sass: str) -> bool:
    """Whether a loop (what lies between a branch and its earlier target) touches the stack.

    Behind the last EXIT stand the rare cases, waiting among them, which branch back to where they came from.
    """
    code = [(int(at, 16), words) for at, words in _SASS.findall(sass)]
    end = max((at for at, words in code if words.endswith("EXIT")), default=1 << 62)
    loops = [(int(to[1], 16), at) for at, words in code if at < end and (to := _BRANCH.search(words))]
    return any(first <= at <= last for at, words in code if _LOCAL.search(words) for first, last in loops)


def kinds(instructions: Counter[str]) -> set[str]:
    """Which operands the matrix instructions take: "16", "int8", "fp8", "mx"."""
    return {next((kind for kind, known in _KINDS if known.search(name)), "other") for name in instructions}


def _short(name: str) -> str:
    """wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 without the words that every one has."""
    return ".".join(part for part in name.split(".") if part not in _SKIPPED)
