"""Which collectives are asked: codecs, worlds, rows that do not divide by the ranks, and the ranks' data."""

from __future__ import annotations

from qhal_conformance.cases import Case
from qhal_conformance.guards import STORAGES

COMM_DATA: dict[str, str] = {
    "integers": "every block holds its largest code, so scales are exact and sums are exact in any order: the codes of "
    "the way back, and the same sum whichever rank has which numbers, bit for bit",
    "normal": "near-normal numbers within the bound; moved parts bit for bit",
    "ranks": "every rank is eight times the rank before: another rank's scale, a lost or doubled rank",
    "positive": "nothing cancels: lost contributions and narrow sums err to one side",
}

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
INT8, FP8, MX, NVFP4 = "int8.g128*fp16", "e4m3fn.g128*fp32", "e2m1.g32*e8m0", "e2m1.g16*(e4m3fn.tensor*fp32)"
INT6, INT4, ROW = "int6.g32*fp16", "int4.g32*fp16", "int8.row*fp32"
_SPLIT = ("parity", "planes=4,2")

_CHOSEN: tuple[tuple[str, str, int, int, int, str, tuple[str, ...]], ...] = (
    (INT8, "all_reduce", 2, 5, 130, "integers", ()),
    (INT8, "all_reduce", 2, 5, 130, "normal", ("once", "own")),
    (INT8, "reduce_scatter", 2, 5, 130, "ranks", ()),
    (INT8, "all_gather", 2, 3, 130, "ranks", ("uneven",)),
    (INT8, "all_to_all", 2, 5, 130, "normal", ("uneven",)),
    (FP8, "all_reduce", 2, 4, 256, "normal", ()),
    (FP8, "reduce_scatter", 1, 2, 128, "normal", ()),
    (FP8, "all_gather", 2, 3, 130, "normal", ("codes",)),
    (FP8, "all_to_all", 2, 5, 130, "ranks", ("codes", "uneven")),
    (MX, "all_reduce", 2, 4, 96, "integers", ()),
    (MX, "reduce_scatter", 2, 1, 64, "positive", ()),
    (INT6, "all_reduce", 2, 3, 130, "integers", _SPLIT),
    (INT6, "all_gather", 2, 3, 130, "normal", _SPLIT),
    (NVFP4, "all_reduce", 2, 4, 64, "ranks", ("async",)),
    (NVFP4, "all_to_all", 2, 5, 48, "normal", ()),
    (INT4, "reduce_scatter", 2, 5, 96, "positive", ("own", "uneven")),
    (INT4, "all_reduce", 1, 5, 96, "normal", ()),
    (ROW, "all_reduce", 2, 5, 64, "positive", ("acc=fp16",)),
    ("bf16", "all_reduce", 2, 6, 32, "normal", ("deep",)),
    (INT8, "all_gather", 2, 0, 64, "normal", ()),
)
"""(format, collective, ranks, rows, columns, data, options); once: without requantize, own: own parts as they are,
codes: decode=False, uneven: splits, deep: x has three axes."""


def cases(level: int) -> list[Case]:
    """One and two ranks; level 1 adds four, and every collective with every codec."""
    found = [_case(*chosen, turn, 0) for turn, chosen in enumerate(_CHOSEN)]
    if level >= 1:
        turn = 0
        for number, subject in enumerate((INT8, FP8, MX, NVFP4, INT6, INT4, ROW, "bf16")):
            for i, collective in enumerate(COLLECTIVES):
                for world in (2, 4):
                    turn += 1
                    data = tuple(COMM_DATA)[turn % 4]
                    data = "normal" if data == "integers" and subject in (NVFP4, "bf16") else data
                    options: tuple[str, ...] = ("uneven",) if collective != "all_reduce" and turn % 3 == 0 else ()
                    options += _SPLIT if subject == INT6 and number % 2 == 0 else ()
                    found.append(_case(subject, collective, world, 7 + i, 160, data, options, turn, 1))
    return list({case.id: case for case in found}.values())


def _case(
    subject: str,
    collective: str,
    world: int,
    rows: int,
    k: int,
    data: str,
    options: tuple[str, ...],
    turn: int,
    level: int,
) -> Case:
    required = subject in (INT8, FP8) and not {"own", "async", "codes"} & set(options)
    kinds = ("bf16", "fp16") if required else ("bf16", "fp16", "fp32")
    kind = kinds[turn % len(kinds)] if data != "integers" else "bf16"  # which holds every largest code
    shape = (("w", world), ("t", rows), ("k", k))
    storage = STORAGES[turn % 3]
    return Case("comm_quant", subject, shape, kind, data, 0, storage, (collective, *options), "comm", level, required)
