"""What docs/formats.md says of checkpoint families, read from the schemes themselves; a new family is here by itself.

Compared forms are the lists that golden tests hold (`qhal_schemes/compared`), titles, layouts and refusals are
`Family` data beside each scheme, and what runs is the answer of `cpu_reference` to the products of every form.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch

import qhal
from qhal import Format, LinearFormat
from qhal.codebooks import CodebookFormat, SegmentFormat
from qhal.grammar import ALIASES
from qhal.layer_formats import KVFormat, LayerFormat
from qhal.layers import requests
from qhal_schemes import SchemeMapping, known_methods
from qhal_schemes.evidence import Family, Form, cache_form, compared_forms, form
from qhal_schemes.kv_words import KV_WORDS
from qhal_schemes.registry import load_scheme

_MARK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)
_PARAMETERS = (
    (r"\.g(?=[*/])", ".g32"),
    (r"\.flat(?=[*/])", ".flat64"),
    (r"\.tile(?=[*/])", ".128x128"),
    ("float", "bf16"),
)
_LATTICES = {"e8p12": 65536, "e81b": 256}
NAMES = (
    ("int4.g128*bf16", "int4.row*bf16", "int3.g32*bf16", "int8.g32*bf16"),
    ("int8.row*fp32",),
    ("int4-int4.g128*bf16",),
    ("uint4-uint4.g128*bf16", "uint2-uint2.g32*fp16", "uint3-uint3.g32*fp16", "uint8-uint8.g32*fp16"),
    ("int8-int8.row*fp32",),
    ("int8-fp32.row*fp32", "int4-fp32.row*fp32"),
    ("e4m3fn.tensor*fp32",),
    ("e4m3fn.row*fp32",),
    ("e4m3fn.128x128*fp32",),
    ("e4m3fn.row*bf16%2:4",),
    ("e2m1.g32*e8m0",),
    ("e4m3fn.g32*e8m0",),
    ("e3m2.g32*e8m0",),
    ("e2m3.g32*e8m0",),
    ("e2m1.g16*(e4m3fn.tensor*fp32)",),
    ("e2m1.g16*(e4m3fn.tensor/fp32)",),
    ("e2m1.g32*(e8m0.g16*fp32)",),
    ("int4.row*(bf16.tensor*bf16)", "int4.g32*(fp32.row*fp32)"),
    ("int8.row*(fp32.tensor/fp32)",),
    ("nf4.flat64*fp32",),
    ("nf4.flat64*(lut8.flat256*fp32+fp32)",),
    ("uint4.g32*fp16+fp16",),
    ("uint4.g32*(uint6.g8*fp16)-(uint6.g8*fp16)",),
    ("int6.g16*(int8.g16*fp16)",),
)
"""Formats of weights that files hold, a row each; several in one where they differ in the width of codes or blocks."""


def refreshed(text: str) -> str:
    """The page with its generated parts renewed."""
    return _MARK.sub(lambda m: f"{m[1]}\n{PARTS[m[2]]()}\n\n{m[3]}", text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown; a bar inside a cell would end it."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def schemes() -> list[tuple[str, Family, type[SchemeMapping]]]:
    """(quant_method, family, mapping) of every scheme of this distribution, by title."""
    found = [(method, load_scheme(method)) for method in known_methods()]
    ours = [(m, s.family, s.mapping) for m, s in found if getattr(s, "family", None) is not None]
    return sorted(ours, key=lambda one: one[1].title.lower())


def families() -> str:
    """One row for every family: what it was compared in, what is read besides, and what runs."""
    rows = []
    for method, family, mapping in schemes():
        forms = sorted(compared_forms(method))
        modules = [f for f in forms if not f.layout.startswith("cache")]
        inputs = {f.second != "-" and ("static" if "static input" in f.more else "dynamic") for f in modules}
        caches = len(forms) - len(modules)
        around = {word for f in modules for word in re.findall(r"(?:in|out) (\w+)|(low rank)", f.more)}
        rows.append(
            (
                f"{family.title} (`{method}`)",
                family.tools,
                ", ".join(
                    ("none", "dynamic", "static")[i] for i, k in enumerate((False, "dynamic", "static")) if k in inputs
                ),
                str(caches) if caches else "read, not compared" if "cache" in mapping.__annotations__ else "",
                ", ".join(sorted(a or b for a, b in around)),
                "yes" if mapping.stacked is not SchemeMapping.stacked else "",
                "; ".join(family.uncompared(method)),
                f"{sum(map(runs, forms))} of {len(forms)}",
            )
        )
    head = (
        "family (`quant_method`)", "written by", "inputs", "caches", "rotations, low rank", "stacked experts",
        "layouts from specification, not compared", "compared forms that run on `cpu_reference`",
    )  # fmt: skip
    return table(head, rows)


def refused() -> str:
    """What files of a family may hold and is refused by name."""
    return "\n".join(f"* **{family.title}**: {'; '.join(family.refused)}." for _, family, _ in schemes())


def forms() -> str:
    """Every compared form."""
    rows = [
        (family.title, f.layout, f"`{f.first}`", "" if f.second == "-" else f"`{f.second}`", f.more.strip("-"))
        for method, family, _ in schemes()
        for f in sorted(compared_forms(method))
    ]
    return table(("family", "layout", "weight (of a cache: K)", "input (of a cache: V)", "besides"), rows)


def names() -> str:
    """Canonical names, their aliases, and the families in which the weight format was compared."""
    rows = []
    for row in NAMES:
        generic = {form(LinearFormat("", 1, 1, Format.parse(name)), "").first for name in row}
        writers = [
            family.title
            for method, family, _ in schemes()
            if any(f.first in generic and not f.layout.startswith("cache") for f in compared_forms(method))
        ]
        aliases = [f"`{alias}`" for name in row if (alias := _alias(name))]
        shown = ", ".join(f"`{name}`" for name in row)
        rows.append((shown, ", ".join(aliases), ", ".join(writers) or "none yet"))
    return table(("name", "alias", "compared in checkpoints of"), rows)


def _alias(name: str) -> str:
    """The short name of a format: one of the list, or `int4_g128` for element and block."""
    built = re.sub(r"-\w+", "", name.partition("*")[0]).replace(".", "_")
    known = {Format.parse(full).storage: alias for alias, full in ALIASES.items()}
    with contextlib.suppress(qhal.FormatError):  # most names have no short one
        known.setdefault(Format.parse(built).storage, built)
    return known.get(Format.parse(name).storage, "")


def words() -> str:
    """The words of --kv-format."""
    return table(("word", "format of K and V"), ((f"`{word}`", f"`{name}`") for word, name in KV_WORDS.items()))


def runs(f: Form) -> bool:
    """Whether cpu_reference executes every request of a form, at one size; rotations are left to the operator."""
    asked = requests(example(f), torch.bfloat16)
    return all(_reference().supports(request).level != "unsupported" for request in asked)


def example(f: Form) -> LayerFormat:
    """A layer of the form; `form(example(f))` is f but for rotations, low rank and group index."""
    pairs = (part.split(" ", 1) for part in f.more.split(", ") if " " in part)
    more = {what: _format(name) for what, name in pairs if what in ("decode", "operand")}
    if f.layout.startswith("cache"):
        parts = dict(part.split(" ") for part in f.more.split(", ") if part != "-")
        q, p = (_format(parts[side]) if side in parts else None for side in "qp")
        cache = KVFormat("mha", _format(f.first), _format(f.second), q, p, heads=2, k_dim=64, v_dim=64)
        assert cache_form(cache) == f
        return cache
    given = None if f.second == "-" else _format(f.second)
    weight = _codebook(f.first) if f.first.startswith("vq") else _format(f.first)
    layer = LinearFormat(
        "example", 256, 256, weight, given, "static input" in f.more, more.get("decode"), more.get("operand")
    )
    assert form(layer, f.layout)[:3] == f[:3]
    return layer


@lru_cache(maxsize=1)
def _reference() -> qhal.QuantOps:
    return qhal.select("cpu_reference")


def _format(generic: str) -> Format:
    name, at, rule = generic.partition("@")
    for pattern, value in _PARAMETERS:
        name = re.sub(pattern, value, name)
    return Format.parse(name + at + rule)


def _codebook(generic: str) -> CodebookFormat:
    """The 256 columns in equal segments; two where a form says that there are several of one kind."""
    text, _, flags = generic.partition("*")
    found = re.findall(r"vq(\d+)x(\d+)\[(.*?)\](?=(\|\.\.\.)?)", text)
    kinds = [one for one in found for _ in range(2 if one[3] else 1)]
    segments = []
    for rows, columns, books, _ in kinds:
        tables = ((0, name) if name in _LATTICES else (int(name), "") for name in books.split("+"))
        sizes = tuple((_LATTICES.get(name, size), name) for size, name in tables)
        segments.append(SegmentFormat(256 // len(kinds), (int(rows), int(columns)), sizes))
    return CodebookFormat(tuple(segments), **dict.fromkeys(flags.split(",") if flags else (), True))


PARTS: dict[str, Callable[[], str]] = {
    "families": families,
    "refused": refused,
    "forms": forms,
    "names": names,
    "words": words,
}
