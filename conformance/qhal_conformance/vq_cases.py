"""Which codebook weights are decoded and multiplied: every kind, with data sets, shapes and types in rotation."""

from __future__ import annotations

from qhal_conformance.cases import Case
from qhal_conformance.guards import STORAGES
from qhal_conformance.vq_kinds import KINDS

_LATTICE = ("quip-e8p12", "quip-rvq3", "quip-rvq4")
_ODD = {  # rows and columns that end inside a vector
    "aqlm-3x5-out2": (45, 70),
    "vptq-11+8": (53, 67),
    "vptq-outliers": (43, 97),
    "aqlm-2x8": (1, 64),
    "prime-97": (31, 50),
}


def decode_cases(level: int) -> list[Case]:
    """Level 0: every kind with all its indices, and one more data set; level 1: every data set, larger."""
    found = []
    rest = ("scales", "codes", "ends", "zero")
    for number, subject in enumerate(KINDS):
        first = "codes" if subject in _LATTICE else "identity"
        n, k = _full(subject)
        found.append(_decode(subject, (n, k), first, "fp32" if number % 3 == 2 else _out(number), number, 0))
        odd = _ODD.get(subject, (33, 64))
        second = "ends" if subject in _LATTICE else rest[number % 4]
        found.append(_decode(subject, odd, second, _out(number + 1), number + 1, 0))
        if level >= 1:
            for i, data in enumerate((first, *rest)):
                for j, shape in enumerate(((128, 256), odd, (1, 96))):
                    turn = i + j + number
                    out = ("fp32", "fp16", "bf16")[turn % 3]
                    found.append(_decode(subject, shape, data, out, turn, 1))
    return list({case.id: case for case in found}.values())


def _full(subject: str) -> tuple[int, int]:
    """A shape in which every index of the largest table occurs."""
    part = KINDS[subject].parts[-1]
    largest = max(book.entries for book in part.books)
    if largest == 1 << 16:
        return 512, 1024
    return (192, 96) if part.vector == (8, 1) else (48, 64)


def _out(turn: int) -> str:
    return ("fp16", "bf16")[turn % 2]


def _decode(subject: str, shape: tuple[int, int], data: str, out: str, turn: int, level: int) -> Case:
    sizes = (("n", shape[0]), ("k", shape[1]))
    required = out != "fp32"
    return Case("vq_decode", subject, sizes, out, data, 0, STORAGES[turn % 3], (), "vq", level, required)


def gemm_cases(level: int) -> list[Case]:
    """Level 0: one product or two per kind; level 1: every data set and more rows."""
    found = []
    data = ("onehot", "codes", "scales", "zero")
    for number, subject in enumerate(KINDS):
        k = 96 if subject.startswith("vptq") else 64
        one = "onehot" if number % 2 == 0 else "codes" if subject in _LATTICE else ("codes", "zero")[number // 2]
        found.append(_gemm(subject, ((17, 1, 96, 33)[number % 4], 48, k), one, number, 0))
        if level >= 1:
            for i, name in enumerate(data):
                for j, m in enumerate((k, 1, 130)):
                    found.append(_gemm(subject, (m, (48, 80)[j % 2], k), name, i + j + number, 1))
    found.append(_gemm("aqlm-2x8", (0, 48, 64), "codes", 0, 0))
    found.append(_gemm("aqlm-1x16", (33, 48, 64), "scales", 2, 0))
    found.append(_gemm("vptq-11+8", (64, 53, 67), "codes", 3, 0))
    return list({case.id: case for case in found}.values())


def _gemm(subject: str, shape: tuple[int, int, int], data: str, turn: int, level: int) -> Case:
    sizes = tuple(zip("mnk", shape, strict=True))
    options = ("bias",) * (turn % 2) + ("exact",) * (turn % 4 == 3)
    required = shape[1] % 16 == 0 and shape[2] % 32 == 0 and "exact" not in options
    return Case("vq_gemm", subject, sizes, _out(turn), data, 0, STORAGES[turn % 3], options, "vq", level, required)
