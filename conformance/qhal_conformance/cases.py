"""Case: one question to a backend, as a frozen value with a readable name. Its inputs follow from the name alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qhal.errors import FormatError

PROFILES: dict[str, str] = {
    "core": "products of plain floats, and what every backend must keep: refusals, buffers, empty tensors",
    "core-int8": "8-bit integer weights, alone and with 8-bit integer activations",
    "core-fp8": "8-bit float weights and activations with tensor, row and block scales",
    "weight-int4": "4-bit integer weights in groups, symmetric, with zero points and with act-order groups",
    "mx": "microscaling formats: blocks of 32 with power-of-two scales",
    "nvfp4": "4-bit floats in blocks of 16 with two-level scales",
    "rotation": "Hadamard transforms of order 2^k, and 12 or 28 times that, with signs; other rotations where claimed",
    "kv": "paged quantized caches and attention over them",
    "moe": "products grouped by expert",
    "comm": "quantized collectives of one and two ranks (level 1: four): sums in rank order, parts moved to the bit",
    "mla": "paged caches of latent and rope rows, and attention of every head over them",
    "vq": "codebook weights of AQLM, VPTQ and QuIP#: decoded, and multiplied",
}
"""Whole or nothing: a backend has a profile if every required case of it passes."""


@dataclass(frozen=True)
class Case:
    """One question. `id` is its name and the key of its random inputs.

    operation  gemm | quantize | hadamard | quant_kv | attention | grouped_gemm | vq_decode | vq_gemm | comm_quant |
               contract
    subject    what is asked of: formats, or the name of a rule
    shape      sizes by their letters, in the order of the name
    out        element name of the result (gemm: of a plain x too)
    data       the data set
    storage    how the input lies in memory, see guards.STORAGES
    options    what else is switched on: bias, exact, static, gidx, ...
    required   whether a backend that has the profile must execute it; the others may be refused
    """

    operation: str
    subject: str
    shape: tuple[tuple[str, int], ...]
    out: str
    data: str
    seed: int = 0
    storage: str = "contiguous"
    options: tuple[str, ...] = ()
    profile: str = "core"
    level: int = 0
    required: bool = True

    @property
    def id(self) -> str:
        """`gemm/int4.g32*bf16/m7_n129_k256/bf16/onehot+offset+bias/0`"""
        sizes = "_".join(f"{letter}{size}" for letter, size in self.shape) or "-"
        extra = ([] if self.storage == "contiguous" else [self.storage]) + list(self.options)
        return "/".join([self.operation, self.subject, sizes, self.out, "+".join([self.data, *extra]), str(self.seed)])

    def size(self, letter: str) -> int:
        """The size called `letter`."""
        return dict(self.shape)[letter]

    def has(self, option: str) -> bool:
        """Whether an option is switched on."""
        return option in self.options

    def reseeded(self, seed: int) -> Case:
        """The same question with other numbers."""
        return replace(self, seed=seed)


def find(cases: tuple[Case, ...], wanted: str) -> Case:
    """The case with this id; a seed that the catalogue does not list is taken from the id."""
    by_id = {case.id: case for case in cases}
    if wanted in by_id:
        return by_id[wanted]
    stem, _, seed = wanted.rpartition("/")
    for case in cases:
        if seed.isdigit() and case.id.rpartition("/")[0] == stem:
            return case.reseeded(int(seed))
    near = [
        case.id for case in cases if wanted.split("/")[0] == case.operation and wanted.split("/")[1:2] == [case.subject]
    ]
    hint = f"; near it: {', '.join(near[:3])}" if near else "; `qhal conformance list` shows all"
    raise FormatError(f"no case {wanted!r}{hint}")
