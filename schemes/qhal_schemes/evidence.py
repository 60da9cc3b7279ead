"""Evidence: which forms of checkpoints were compared, number by number, with what their own tools compute.

A form is a layout in the file and the arithmetic of one module or cache. Group sizes, tiles, dtypes of float planes and
the number of groups with codebooks of their own, if there are several, are parameters of a form, everything else makes
another one. `compared/<quant_method>.txt` lists the compared forms, a line each; tests/test_schemes_golden.py holds
every list to what golden checkpoints (and, of GGUF, random blocks decoded by its own package) reach, in both
directions. All other forms are read as the tool's source or specification says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

from qhal.codebooks import CodebookFormat
from qhal.layer_formats import KVFormat, LinearFormat

UNCOMPARED = "from specification, not compared"
COMPARED = "compared"

_FLOAT = re.compile(r"\b(?:fp32|fp16|bf16)\b")
_GROUP = re.compile(r"\.(g|flat)\d+(?=[*/]\(?(?:float|lut8))")
_SEGMENTS = re.compile(r"(vq[^|*]+)(?:\|\1(?=[|*]|$))+")
_TILE = re.compile(r"\.\d+x\d+(?=[*/])")


@dataclass(frozen=True)
class Family:
    """What the table of formats says about a scheme beyond its compared forms.

    title    the name of the family
    tools    what writes such files, with the versions that the scheme was written for
    layouts  every layout the scheme reads, as `SchemeMapping.layout` names them
    refused  what such files may hold and the scheme refuses by name, each with the reason
    """

    title: str
    tools: str
    layouts: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def uncompared(self, method: str) -> tuple[str, ...]:
        """Layouts of which no form was compared."""
        seen = {f.layout.partition(",")[0] for f in compared_forms(method)} | {f.layout for f in compared_forms(method)}
        return tuple(name for name in self.layouts if name not in seen)


def variants(base: str, *traits: str) -> tuple[str, ...]:
    """The names of a layout with any of its traits: "a", "a, x", "a, y", "a, x, y"."""
    names = [base]
    for trait in traits:
        names += [f"{name}, {trait}" for name in names]
    return tuple(names)


class Form(NamedTuple):
    """One form: layout, weight and input of a module; of a cache "cache", K and V. more: what else belongs to it."""

    layout: str
    first: str
    second: str
    more: str

    def __str__(self) -> str:
        return " | ".join(self)


def form(f: LinearFormat, layout: str) -> Form:
    """The form of a module."""
    more = ["static input"] if f.static_input else []
    more += [f"{what} {_generic(g)}" for what, g in (("decode", f.decode_input), ("operand", f.operand)) if g]
    more += [
        f"{side} {rotation[0]}" for side, found in (("in", f.rotate_in), ("out", f.rotate_out)) for rotation in found
    ]
    more += [what for what, there in (("low rank", f.low_rank), ("group index", f.group_index)) if there]
    return Form(layout, _generic(f.weight), _generic(f.input), ", ".join(more) or "-")


def cache_form(f: KVFormat) -> Form:
    """The form of a layer's cache and of its attention operands."""
    more = [f"{what} {_generic(g)}" for what, g in (("q", f.q), ("p", f.p)) if g is not None]
    return Form("cache" if f.kind == "mha" else f"cache {f.kind}", _generic(f.k), _generic(f.v), ", ".join(more) or "-")


@lru_cache(maxsize=64)
def compared_forms(method: str) -> frozenset[Form]:
    """The forms of a quant_method that were compared; none for a method of another distribution."""
    file = resources.files("qhal_schemes").joinpath("compared").joinpath(f"{method}.txt")
    if not re.fullmatch(r"[a-z0-9_-]+", method) or not file.is_file():
        return frozenset()
    return frozenset(parse(line) for line in file.read_text("utf-8").splitlines() if line)


def parse(line: str) -> Form:
    """`str(form)` read back."""
    layout, first, second, more = line.split(" | ")
    return Form(layout, first, second, more)


def _generic(f: object) -> str:
    """A format without its parameters; the rule behind @ stays as it is."""
    if f is None:
        return "-"
    if isinstance(f, CodebookFormat):
        return _SEGMENTS.sub(r"\1|...", str(f))
    name, at, rule = str(f).partition("@")
    return _TILE.sub(".tile", _GROUP.sub(r".\1", _FLOAT.sub("float", name))) + at + rule
