"""Which attentions are asked: cache formats, batches of lengths around a page, and what is switched on."""

from __future__ import annotations

from typing import Literal

from qhal_conformance.cases import Case

ATTENTION_DATA: dict[str, str] = {
    "normal": "near-normal q, k and v within the bound",
    "uniform": "q = 0: every visible key weighs the same, the result is the mean of their values; masks and lengths "
    "show as a wrong mean",
    "dominant": "q is 64 times one visible key: the result is that key's value row; head groups, pages and positions "
    "show as another row",
    "positive": "values of one sign: lost keys and lost weight cannot cancel",
    "relabel": "the same tokens in other pages: bit-equal",
    "saturated": "dominant, under a static scale of P that ends at three quarters: the result is that much of a row",
}
"""In every set, unused pages and slots past a length hold NaN, and unused entries of the page table point there."""

Phase = Literal["prefill", "decode", "mixed"]
LENS: dict[int, tuple[Phase, tuple[tuple[int, int], ...]]] = {
    0: ("decode", ((1, 16), (1, 1), (1, 37), (1, 15), (1, 17))),
    1: ("prefill", ((7, 7), (16, 16), (17, 33))),
    2: ("mixed", ((1, 31), (5, 5), (3, 0), (1, 48), (9, 40), (4, 2))),
    3: ("decode", ((1, 700), (1, 513))),
    4: ("prefill", ((129, 129), (64, 300))),
    5: ("mixed", ((1, 1100), (140, 141))),
}
"""Batches by number: (query tokens, keys) of every sequence. Lengths 0, 1, a page, a page more and less, many pages;
more new tokens than keys; more queries than a tile."""

FORMATS = ("bf16", "e4m3fn.tensor*fp32", "e4m3fn.row*fp32", "int8.row*fp32")
_OPTIONS: tuple[tuple[str, ...], ...] = (
    ("lse",), (), ("window",), ("softcap",), ("sinks", "lse"), ("full", "lse"), ("p32",), ("window", "full"),
)  # fmt: skip
_REQUIRED = {"lse", "window", "full", "scale=0.1875", "devlens"}
"""Options that a backend of the profile must have; others may be refused."""

_TREES: tuple[tuple[str, str, int], ...] = (
    ("bf16", "normal", 1),
    ("e4m3fn.tensor*fp32", "uniform", 2),
    ("int8.row*fp32", "normal", 2),
)
_OPERANDS: tuple[tuple[str, str, str], ...] = (
    ("e4m3fn.tensor*fp32", "normal", "q=e4m3fn.tensor*fp32"),
    ("e4m3fn.row*fp32", "normal", "q=e4m3fn.row*fp32"),
    ("int8.row*fp32", "normal", "q=int8.row*fp32"),
    ("int8.row*fp32", "positive", "q=int8.head*fp32"),
    ("bf16", "normal", "p=uint8.tensor*fp32"),
    ("e4m3fn.tensor*fp32", "normal", "p=e4m3fn.tensor*fp32"),
    ("int8.row*fp32", "normal", "p=int8.tensor*fp32"),
    ("int8.row*fp32", "positive", "p=int8.tensor*fp32"),
    ("e4m3fn.tensor*fp32", "saturated", "p=e4m3fn.tensor*fp32"),
)
"""(cache, data, how Q or P is held)"""


def cases(level: int) -> list[Case]:
    """Trees and quantized operands, then every cache format with every data set; batches, options, heads rotate."""
    found = _trees_and_operands(0, (1, 2, 0)) + (_trees_and_operands(1, (4, 3)) if level >= 1 else [])
    usual = [data for data in ATTENTION_DATA if data != "saturated"]
    for number, subject in enumerate(FORMATS):
        for i, data in enumerate(usual):
            found.append(
                _case(subject, data, (i + number) % 3, _OPTIONS[(2 * i + number) % len(_OPTIONS)], i + number, 0)
            )
        for i, options in enumerate(_OPTIONS):
            found.append(_case(subject, "normal", (i + number + 1) % 3, options, i, 0))
        for i, options in enumerate((("lse",), ("scale=0.1875", "devlens"))):
            found.append(_case(subject, "normal", 5 if (i + number) % 2 else 2, options, i + number, 0))
        if level >= 1:
            for i, data in enumerate(usual):
                for batch in LENS:
                    turn = i + batch + number
                    found.append(_case(subject, data, batch, _OPTIONS[turn % len(_OPTIONS)], turn, 1))
    return list({case.id: case for case in found}.values())


def _trees_and_operands(level: int, batches: tuple[int, ...]) -> list[Case]:
    """Trees over batches with new tokens in plenty; quantized Q and P, where both are asked with all that is left."""
    found = []
    for i, (subject, data, batch) in enumerate(_TREES):
        found.append(_case(subject, data, batch if level == 0 else 4, ("tree", *(("lse",) * (i == 0))), i, level))
    for i, (subject, data, option) in enumerate(_OPERANDS):
        found.append(_case(subject, data, batches[i % len(batches)], (option,), i, level))
    both = ("q=int8.head*fp32", "p=int8.tensor*fp32", "lse")
    found.append(_case("int8.row*fp32", "normal", batches[-1], both, level, level))
    return found


def _case(subject: str, data: str, batch: int, options: tuple[str, ...], turn: int, level: int) -> Case:
    heads, groups, dim, page = ((4, 2, 64, 16), (6, 1, 64, 16), (4, 4, 128, 16), (8, 2, 64, 32))[turn % 4]
    if data == "dominant":
        options = tuple(o for o in options if o not in ("sinks", "softcap"))
    shape = (("l", batch), ("h", heads), ("g", groups), ("d", dim), ("p", page))
    kind = "bf16" if subject == "bf16" or turn % 2 == 0 else "fp16"
    storage = ("contiguous", "offset", "strided")[turn % 3]
    required = set(options) <= _REQUIRED
    return Case("attention", subject, shape, kind, data, 0, storage, options, "kv", level, required)
