"""Which products are asked: formats by profile; data sets, shapes and storage in a grid in which every pair occurs."""

from __future__ import annotations

from dataclasses import dataclass

from qhal_conformance.cases import Case
from qhal_conformance.datasets import DATASETS
from qhal_conformance.guards import STORAGES


@dataclass(frozen=True)
class Pair:
    """One weight format with one input format ("" keeps x plain), and the K that its blocks allow.

    tails  K that are no multiple of a 128-wide tile
    """

    profile: str
    w: str
    x: str = ""
    options: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("bf16", "fp16")
    tails: tuple[int, ...] = (160, 96)

    @property
    def subject(self) -> str:
        """`int8.row*fp32~int8.row*fp32`; the weight alone if x is plain."""
        return f"{self.w}~{self.x}" if self.x else self.w


PAIRS: tuple[Pair, ...] = (
    Pair("core", "bf16", kinds=("bf16",)),
    Pair("weight-int4", "int4.g32*bf16"),
    Pair("weight-int4", "uint4-uint4.g32*fp16"),
    Pair("weight-int4", "int4.g128*fp16", tails=(384, 640)),
    Pair("weight-int4", "int4.g32*bf16", options=("gidx",)),
    Pair("weight-int4", "int4.row*fp32"),
    Pair("core-int8", "int8.row*fp32"),
    Pair("core-int8", "int8.row*fp32", "int8.row*fp32"),
    Pair("core-int8", "int8.row*fp32", "int8.tensor*fp32", options=("static",)),
    Pair("core-int8", "int8.g128*bf16", tails=(384, 640)),
    Pair("core-fp8", "e4m3fn.row*fp32"),
    Pair("core-fp8", "e4m3fn.row*fp32", "e4m3fn.row*fp32"),
    Pair("core-fp8", "e4m3fn.tensor*fp32", "e4m3fn.tensor*fp32", options=("static",)),
    Pair("core-fp8", "e4m3fn.128x128*fp32", "e4m3fn.g128*fp32", tails=(320, 384)),
    Pair("mx", "e2m1.g32*e8m0"),
    Pair("mx", "e2m1.g32*e8m0", "e4m3fn.g32*e8m0"),
    Pair("mx", "e4m3fn.g32*e8m0", "e4m3fn.g32*e8m0"),
    Pair("nvfp4", "e2m1.g16*(e4m3fn.tensor*fp32)"),
    Pair("nvfp4", "e2m1.g16*(e4m3fn.tensor*fp32)", "e2m1.g16*(e4m3fn.tensor*fp32)"),
)

_KINDS = {"limits": "fp16", "wide": "bf16"}
"""Overflow and subnormal numbers are near in fp16; scales over many binades belong to weights that fp16 cannot hold."""


EVERYWHERE = ("normal", "codes", "onehot", "limits", "special")
"""Data sets that every format is asked at level 0: its codes, its addresses, its range. The others show how sums are
made: the first format of a profile is asked all of them, the rest one in three, in turns."""


def cases(level: int) -> list[Case]:
    """Every product of a level; level 1 contains level 0."""
    found: list[Case] = []
    for number, pair in enumerate(PAIRS):
        found += _smoke(pair, number)
        if level >= 1:
            found += _wide(pair, number)
    found += _clipped()
    return list({case.id: case for case in found}.values())


def _clipped() -> list[Case]:
    """Inputs that keep a part of their range: a smaller scale, or x is cut first. `GemmRequest.clip` may be refused."""
    row, shape = "int8.row*fp32", (("m", 17), ("n", 64), ("k", 160))
    asked = (("core-int8", row, row), ("core-int8", row, f"{row}@clip=range"), ("core-fp8", *("e4m3fn.row*fp32",) * 2))
    return [
        Case("gemm", f"{w}~{x}", shape, "bf16", "outlier", options=("clip",), profile=profile, required=False)
        for profile, w, x in asked
    ]


def _shapes(pair: Pair) -> tuple[tuple[int, int, int], ...]:
    """(m, n, k): a tile and both its neighbours, one, primes, K tails."""
    tail, other = pair.tails
    return ((16, 128, 256), (17, 129, tail), (33, 97, other), (1, 127, 256), (64, 64, tail), (31, 112, 256))


def far(pair: Pair) -> dict[str, tuple[int, int, int]]:
    """Data sets that bring their own shape: past the tiles that kernels loop over, in one direction each."""
    tail, _ = pair.tails
    long = 8192 + (32 if tail % 128 else 128)
    return {
        "positive": (515, 48, tail),
        "outlier": (3, 528, tail),
        "signed_range": (96, 1, 256),
        "small_onto_large": (8, 16, long),
        "special": (19, 64, tail),
    }


def _smoke(pair: Pair, number: int) -> list[Case]:
    shapes, own = _shapes(pair), far(pair)
    tiled = [data for data in DATASETS if data not in own]
    first = number == next(i for i, other in enumerate(PAIRS) if other.profile == pair.profile)
    found = []
    for i, data in enumerate(DATASETS):
        long = data == "small_onto_large" and bool(pair.x)  # where both operands are rounded, the bound is narrow
        if not (first or long or data in EVERYWHERE or (i + number) % 3 == 0):
            continue
        m, n, k = own.get(data) or shapes[(tiled.index(data) + number) % len(shapes)]
        kind = pair.kinds[(i + number // 2) % len(pair.kinds)]
        if data in _KINDS and _KINDS[data] in pair.kinds:
            kind = _KINDS[data]
        bias = ("bias",) * ((data not in ("special", "limits") and (i + number) % 2 == 1) or data == "positive")
        found.append(
            _case(
                pair, (m, n, k), data, kind, STORAGES[(i // 3 + number) % 3],
                bias + ("exact",) * ((i + number) % 4 == 0),
            )
        )  # fmt: skip
    found.append(_case(pair, (256, 96, 256), "onehot", pair.kinds[0], "contiguous", ()))
    if first:
        found.append(_case(pair, (0, 128, 256), "normal", pair.kinds[0], "contiguous", ()))
        found.append(_case(pair, (48, 32, 256), "normal", "fp32", "contiguous", ("bias",)))
        if len(pair.kinds) > 1:
            found.append(_case(pair, (33, 48, 256), "limits", "bf16", "contiguous", ()))
    return found


def _wide(pair: Pair, number: int) -> list[Case]:
    tail, _ = pair.tails
    shapes = (
        *_shapes(pair),
        (128, 256, 1024),
        (127, 257, 512),
        (5, 1, 256),
        (1, 1024, 2048),
        (2, 48, 4096),
        (96, 33, tail),
    )
    found = []
    for i, data in enumerate(DATASETS):
        for j, shape in enumerate(shapes):
            turn = i + j + number
            options = ("bias",) * (turn % 2) + ("exact",) * (turn % 5 == 0)
            kind = ("bf16", "fp16", "fp32")[turn % 3] if len(pair.kinds) > 1 else pair.kinds[0]
            if data == "wide" and kind == "fp16":
                kind = "bf16"
            if data == "special" and shape[0] < 4:
                continue
            found.append(_case(pair, shape, data, kind, STORAGES[(j + i // 2) % 3], options, level=1))
    return found


def _case(
    pair: Pair,
    shape: tuple[int, int, int],
    data: str,
    kind: str,
    storage: str,
    options: tuple[str, ...],
    level: int = 0,
) -> Case:
    m, n, k = shape
    return Case(
        operation="gemm",
        subject=pair.subject,
        shape=(("m", m), ("n", n), ("k", k)),
        out=kind,
        data=data,
        storage=storage,
        options=pair.options + options,
        profile=pair.profile,
        level=level,
        # many matrix instructions want n and k in steps of 16: what they refuse by shape is no hole in a profile
        required=n % 16 == 0 and k % 32 == 0 and "exact" not in options and kind != "fp32",
    )
