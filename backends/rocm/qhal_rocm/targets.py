"""The AMD GPUs that this backend knows, by the exact name of their instruction set.

Sources: LLVM's AMDGPU user guide (processors, wavefront size, LDS), the ISA guides of CDNA3, CDNA4, RDNA3 and RDNA4
(matrix instructions). A prefix test would take gfx1250 for a gfx12 that it is not, so a name that is not listed is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from qhal.errors import UnsupportedError
from qhal.requests import Support
from qhal_triton.target import Target

_FNUZ = frozenset({"e4m3fnuz", "e5m2fnuz"})
_OCP = frozenset({"e4m3fn", "e5m2"})


@dataclass(frozen=True)
class Chip:
    """What an instruction set brings. generation: for people; wave: lanes; lds: KiB of a program; fp8: see Target."""

    generation: str
    wave: int
    lds: int = 64
    fp8: frozenset[str] = frozenset()
    mx: bool = False

    @property
    def words(self) -> str:
        """One line: "CDNA4, fp8 e4m3fn, MX"."""
        fp8 = f"fp8 {sorted(self.fp8)[0]}" if self.fp8 else "no fp8"
        return f"{self.generation}, {fp8}" + (", MX" if self.mx else "")


CHIPS = {
    "gfx90a": Chip("CDNA2", 64),
    "gfx942": Chip("CDNA3", 64, fp8=_FNUZ),
    "gfx950": Chip("CDNA4", 64, lds=160, fp8=_OCP, mx=True),
    "gfx1100": Chip("RDNA3", 32),
    "gfx1101": Chip("RDNA3", 32),
    "gfx1200": Chip("RDNA4", 32, fp8=_OCP),
    "gfx1201": Chip("RDNA4", 32, fp8=_OCP),
}


def target(arch: str) -> Target:
    """The target of an instruction set; UnsupportedError with the known names for another."""
    chip = CHIPS.get(arch)
    if chip is None:
        known = ", ".join(CHIPS)
        raise UnsupportedError(
            Support(
                "unsupported", f"{arch!r} is not in the table of AMD GPUs ({known}); report the name to have it added"
            )
        )
    return Target(kind="hip", arch=arch, warp=chip.wave, shared=chip.lds << 10, fp8=chip.fp8, mx=chip.mx)
