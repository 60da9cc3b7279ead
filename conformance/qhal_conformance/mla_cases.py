"""Caches of multi-head latent attention: one latent row and one rope row per token, read by every head.

The shapes are those of the published models (512 + 64, scale (128 + 64)^-1/2) scaled down; level 1 has them whole.
Keys are both rows together, values the latent row, so a query row has R + P features and a result R.
"""

from __future__ import annotations

from qhal.formats import Format
from qhal.requests import KVRequest
from qhal_conformance.attention_cases import ATTENTION_DATA
from qhal_conformance.cases import Case
from qhal_conformance.guards import STORAGES

FORMATS: tuple[tuple[str, str], ...] = (
    ("bf16", "bf16"),
    ("e4m3fn.tensor*fp32", "e4m3fn.tensor*fp32"),
    ("e4m3fn.g128*fp32", "bf16"),
    ("e4m3fn.row*fp32", "bf16"),
    ("int8.row*fp32", "int8.row*fp32"),
    ("int4.g32*fp16", "e4m3fn.row*fp32"),
)
"""(latent, rope)"""

PREFIX = "mla:"
_REQUIRED = {FORMATS[0], FORMATS[1], FORMATS[2]}
_DATA = tuple(data for data in ATTENTION_DATA if data != "saturated")
_OPTIONS: tuple[tuple[str, ...], ...] = (("lse",), (), ("softcap",), ("lse",), ("p32",))
_QUERIES = ("q=e4m3fn.row*fp32", "q=int8.row*fp32", "q_rope=bf16")
"""Q in codes with one scale for both parts, and with a latent part in codes beside a plain rope part."""


def is_mla(case: Case) -> bool:
    """Whether a case of quant_kv or attention is about latent rows."""
    return case.subject.startswith(PREFIX)


def kv_request(case: Case) -> KVRequest:
    """The cache of a case; its letters are r (latent), d (rope) and p (page)."""
    k, _, v = case.subject.removeprefix(PREFIX).partition("~")
    return KVRequest(
        kind="mla",
        k=Format.parse(k),
        v=Format.parse(v or k),
        heads=1,
        k_dim=case.size("r"),
        v_dim=case.size("d"),
        page=case.size("p"),
    )


def scale(case: Case) -> float:
    """(nope + rope)^-1/2 of the heads before absorption; a latent row stands for four times as many features."""
    return float((case.size("r") // 4 + case.size("d")) ** -0.5)


def kv_cases(level: int) -> list[Case]:
    """quant_kv: every format, and one batch that is skipped; level 1 adds the whole sizes."""
    found = []
    for number, formats in enumerate(FORMATS):
        data = ("scattered", "positive")[number % 2]
        found.append(_kv(formats, (19, 17, 33, 1, 16, 0)[number], _sizes(formats, number), data, number, 0))
        if level >= 1:
            for i, tokens in enumerate((1, 130)):
                found.append(_kv(formats, tokens, (512, 64, 64), ("scattered", "skipped")[i], number + i, 1))
    found.append(_kv(FORMATS[2], 19, _sizes(FORMATS[2], 0), "skipped", 0, 0))
    return found


def attention_cases(level: int) -> list[Case]:
    """Every format with two data sets, prefill, decode and mixed in rotation; queries in codes; level 1: everything."""
    found = []
    for number, formats in enumerate(FORMATS):
        for i in (0, 1):
            turn = 2 * number + i
            found.append(_attention(formats, _DATA[turn % 5], (number + 2 * i) % 3, _OPTIONS[turn % 5], turn, 0))
        if level >= 1:
            for i, data in enumerate(_DATA):
                for batch in (0, 1, 2, 3, 4):
                    turn = number + i + batch
                    found.append(_attention(formats, data, batch, _OPTIONS[turn % 5], turn, 1))
    latent = FORMATS[1]
    found.append(_attention(latent, "normal", 2, (_QUERIES[0],), 0, 0))
    found.append(_attention(FORMATS[4], "normal", 0, (_QUERIES[1], _QUERIES[2], "lse"), 1, 0))
    return list({case.id: case for case in found}.values())


def _sizes(formats: tuple[str, str], turn: int) -> tuple[int, int, int]:
    """Latent, rope, page; two blocks at least where the latent row has blocks."""
    return (256, 32, 16) if "g128" in formats[0] else ((64, 16, 16), (128, 16, 64))[turn % 2]


def _subject(formats: tuple[str, str]) -> str:
    return PREFIX + (formats[0] if formats[0] == formats[1] else "~".join(formats))


def _kv(formats: tuple[str, str], tokens: int, sizes: tuple[int, int, int], data: str, turn: int, level: int) -> Case:
    shape = (("t", tokens), *zip("rdp", sizes, strict=True))
    kind = ("bf16", "fp16")[turn % 2] if "bf16" not in formats else "bf16"
    storage = STORAGES[turn % 3]
    return Case("quant_kv", _subject(formats), shape, kind, data, 0, storage, (), "mla", level, formats in _REQUIRED)


def _attention(
    formats: tuple[str, str], data: str, batch: int, options: tuple[str, ...], turn: int, level: int
) -> Case:
    if data == "dominant":
        options = tuple(o for o in options if o != "softcap")
    sizes = _sizes(formats, turn) if level == 0 else (512, 64, 64)
    shape = (("l", batch), ("h", (4, 16, 6)[turn % 3]), *zip("rdp", sizes, strict=True))
    kind = ("bf16", "fp16")[turn % 2] if "bf16" not in formats else "bf16"
    required = formats in _REQUIRED and set(options) <= {"lse"}
    return Case(
        "attention", _subject(formats), shape, kind, data, 0, STORAGES[turn % 3], options, "mla", level, required
    )
