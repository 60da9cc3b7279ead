"""Target: the chip that kernels are chosen and compiled for. It needs no device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """What the choice of a kernel may depend on.

    kind    Triton's name of the compiler's back end
    arch    "sm_90", "gfx942": in words, and as the key of tuned tables
    warp    threads that execute together
    shared  bytes of fast memory that one program may use
    fp8     elements that the matrix instructions take, else fp8 operands are converted to 16 bits first
    mx      whether matrix instructions take block scales of e8m0 (MXFP8, MXFP4)
    """

    kind: Literal["cuda", "hip"]
    arch: str
    warp: int
    shared: int
    fp8: frozenset[str] = frozenset()
    mx: bool = False

    @property
    def from_memory(self) -> bool:
        """Whether matrix instructions read an operand from fast memory; else both are in registers."""
        return self.arch.startswith(("sm_90", "sm_10"))
