"""Which grouped products are asked: formats with every form of groups, then one by one what else may be asked."""

from __future__ import annotations

from qhal.formats import Format
from qhal.layer_formats import Activation
from qhal.requests import GemmRequest, GroupedRequest
from qhal_conformance import guards
from qhal_conformance.cases import Case
from qhal_conformance.datasets import DATASETS
from qhal_conformance.problem import DTYPES

EXPERTS = 5
COUNTS: dict[str, tuple[int, ...]] = {
    "uneven": (7, 0, 17, 1, 8),
    "one": (0, 0, 33, 0, 0),
    "none": (0, 0, 0, 0, 0),
    "single": (0, 0, 0, 0, 1),
    "many": (0, 131, 2, 70, 1),
}
"""Rows per expert: an empty one between full ones, all rows in one, no row, one row, more rows than a tile."""
ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation("silu"),
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "relu2": Activation("relu2", gated=False),
    "swiglu": Activation("swiglu", alpha=1.702, limit=1.25, shift=1.0),
}
FORMATS = (
    ("int4.g32*bf16", ""),
    ("int8.row*fp32", "int8.row*fp32"),
    ("e4m3fn.row*fp32", "e4m3fn.row*fp32"),
    ("e4m3fn.128x128*fp32", "e4m3fn.g128*fp32"),
    ("e2m1.g32*e8m0", ""),
)
GROUPED_DATA = {data: DATASETS[data] for data in ("normal", "codes", "onehot", "outlier", "tiny_columns")}
_FORMS = ("offsets", "masked", "indexed", "pairs")
_MORE: tuple[tuple[int, tuple[str, ...]], ...] = (
    (0, ("offsets", "many")),
    (1, ("masked", "full", "uneven")),
    (2, ("indexed", "weights", "uneven")),
    (0, ("pairs", "weights", "uneven")),
    (4, ("indexed", "top4", "uneven")),
    (2, ("offsets", "single")),
    (0, ("offsets", "spare", "uneven")),
    (1, ("indexed", "nowhere", "uneven")),
    (3, ("offsets", "gelu", "uneven")),
    (0, ("masked", "gelu_tanh", "uneven")),
    (4, ("pairs", "relu2", "uneven")),
    (4, ("offsets", "swiglu", "bias", "uneven")),
    (1, ("offsets", "silu", "q=int8.row*fp32", "uneven")),
    (2, ("indexed", "q=e4m3fn.row*fp32", "uneven")),
    (1, ("offsets", "static", "uneven")),
    (1, ("offsets", "coded", "uneven")),
    (2, ("masked", "coded", "uneven")),
)
"""(format, options). weights: the sum of a token's results; top4: one expert twice; spare: rows past the last offset;
nowhere: every id is -1; full: no padding; q=: a quantized result; static: a scale per expert; coded: x is quantized."""
_REQUIRED = {"bias", "many", "single", "spare", "nowhere", *COUNTS}


def cases(level: int) -> list[Case]:
    """Every format with every form of groups; data sets, counts and the activation rotate."""
    found = []
    for number, (w, x) in enumerate(FORMATS):
        for i, form in enumerate(_FORMS):
            for j in range(2 + 3 * level):
                turn = 2 * i + j + number
                options = (form,) + (("bias",) if turn % 3 == 0 else ()) + (("silu",) if j == 1 else ())
                counts = ("uneven", "uneven", "one", "uneven", "none")[(turn + j) % 5]
                data = tuple(GROUPED_DATA)[(turn + i) % 5]  # by the form too: counts go round in fives as well
                found.append(_case(w, x, data, (*options, counts), turn, int(j > 1)))
    for i, (number, options) in enumerate(_MORE):
        w, x = FORMATS[number]
        x = "int8.tensor*fp32" if "static" in options else x
        for j in range(1 + level):
            found.append(_case(w, x, ("normal", "outlier")[(i + j) % 2], options, i + j, j))
    return list({case.id: case for case in found}.values())


def _case(w: str, x: str, data: str, options: tuple[str, ...], turn: int, level: int) -> Case:
    k = 256 if level == 0 else 512
    shape = (("e", EXPERTS), ("n", (64, 96, 128)[turn % 3]), ("k", k))
    storage = guards.STORAGES[turn % 3] if "coded" not in options else "contiguous"
    subject = f"{w}~{x}" if x else w
    required = set(options[1:]) <= _REQUIRED and options[0] in ("offsets", "indexed")
    return Case("grouped_gemm", subject, shape, "bf16", data, 0, storage, options, "moe", level, required)


def request_of(case: Case) -> GroupedRequest:
    """What is asked of `supports`."""
    w, _, x = case.subject.partition("~")
    gemm = GemmRequest(
        w=Format.parse(w),
        n=case.size("n"),
        k=case.size("k"),
        x=(Format.parse(x or case.out),),
        static=(True,) if case.has("static") else (),
        m=(0, 256),
        bias=case.has("bias"),
        out=DTYPES[case.out] if case.has("coded") else None,
    )
    form = case.options[0]
    held = next((o.removeprefix("q=") for o in case.options if o.startswith("q=")), None)
    return GroupedRequest(
        gemm=gemm,
        experts=EXPERTS,
        groups="indexed" if form == "pairs" else form,  # type: ignore[arg-type]
        top_k=top_k(case),
        activation=next((a for name, a in ACTIVATIONS.items() if case.has(name)), None),
        quantize=None if held is None else Format.parse(held),
    )


def top_k(case: Case) -> int:
    """How many experts every token names; 1 where groups do not say."""
    if case.has("top4"):
        return 4
    return 2 if case.options[0] == "indexed" or case.has("weights") else 1
