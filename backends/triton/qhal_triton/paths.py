"""Path: a kernel that was found for a request, and what `supports` says of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qhal.requests import Arithmetic, NumericsClass, Request, Support


@dataclass(frozen=True, kw_only=True)
class Path:
    """What executes.

    kernel      the kernel's name; a family has one body of code for each
    executes    for people: "W4A16: nibbles decoded in registers, bf16 matrix instructions, fp32 sums"
    numerics    the class of its sums
    accumulate  type of its sums
    graph       it can stand in a captured graph: no host read, no allocation outside of torch's
    invariant   a row's bits do not depend on the other rows
    layouts     of what `prepare` keeps
    made        planes of the weight that are kept decoded to fp32 too (`PreparedWeight.made`)
    rounded     what products round the whole weight to: one that overflows it is refused when it is prepared
    """

    kernel: str
    executes: str
    numerics: NumericsClass
    accumulate: str = "fp32"
    graph: bool = True
    invariant: bool = False
    layouts: tuple[str, ...] = ("canonical",)
    rounded: torch.dtype | None = None
    made: tuple[str, ...] = ()

    def answer(self, request: Request) -> Support:
        """The full answer to a request that takes this path."""
        arithmetic = Arithmetic.of(request)
        return Support(
            "full",
            arithmetic=None if arithmetic is None else replace(arithmetic, accumulate=self.accumulate),
            executes=self.executes,
            numerics=self.numerics,
            layouts=self.layouts,
            graph=self.graph,
            deterministic=True,
            batch_invariant=self.invariant,
            concurrent=True,
        )
