"""The grammar of format names, and the aliases that people type.

format  := element [zero] [ "." block ("*"|"/") plane [offset] ] ["%" n ":" m] ["@" rule]
zero    := "-" plane                        value = (code - zero) * scale
offset  := ("+"|"-") plane                  value = code * scale + offset
plane   := element | "(" format ")"
block   := tensor | row | col | head | g<k> | <n>x<k> | flat<k>      (channel and token are read as row)
rule    := key=value {"," key=value}        only what differs from the default
"""

from __future__ import annotations

import difflib
import re
from dataclasses import fields
from typing import Any

from qhal.blocks import Block
from qhal.elements import ELEMENTS, element
from qhal.errors import FormatError
from qhal.rules import Rule

ALIASES: dict[str, str] = {
    "int8_row": "int8.row*fp32",
    "fp8": "e4m3fn.tensor*fp32",
    "fp8_row": "e4m3fn.row*fp32",
    "fp8_block": "e4m3fn.128x128*fp32",
    "fp8_fnuz": "e4m3fnuz.row*fp32@qmax=224",
    "int4_fp8": "int4-int4.row*(bf16.tensor*bf16)",
    "mxfp4": "e2m1.g32*e8m0",
    "mxfp8": "e4m3fn.g32*e8m0",
    "mxfp6_e3m2": "e3m2.g32*e8m0",
    "mxfp6_e2m3": "e2m3.g32*e8m0",
    "mxfp4_dual": "e2m1.g32*(e8m0.g16*fp32)",
    "nvfp4": "e2m1.g16*(e4m3fn.tensor*fp32)",
    "nvfp4_div": "e2m1.g16*(e4m3fn.tensor/fp32)",
    "nf4_flat64": "nf4.flat64*fp32",
    "nf4_dq": "nf4.flat64*(lut8.flat256*fp32+fp32@domain=mean)",
    "q4_0": "int4.g32*fp16",
    "q4_1": "uint4.g32*fp16+fp16",
    "q5_0": "int5.g32*fp16",
    "q5_1": "uint5.g32*fp16+fp16",
    "q8_0": "int8.g32*fp16",
    "q2_k": "uint2.g16*(uint4.g16*fp16)-(uint4.g16*fp16)",
    "q3_k": "int3.g16*(int6.g16*fp16)",
    "q4_k": "uint4.g32*(uint6.g8*fp16)-(uint6.g8*fp16)",
    "q5_k": "uint5.g32*(uint6.g8*fp16)-(uint6.g8*fp16)",
    "q6_k": "int6.g16*(int8.g16*fp16)",
    "tq2_0": "int2.g256*fp16",
}
"""Short names of whole formats. An alias is expanded only when it is the whole name: inside a name the same word is
an element (`int8` as a zero point), and the canonical name is what everything prints."""

MAX_DEPTH = 8
"""How many levels of planes a format may nest; files use two."""
_SHOWN = 80
_GROUPED = re.compile(r"(u?)int([2-8])_g([0-9]{1,9})")
_WORD = re.compile(r"[a-z0-9]+")
_BLOCK = re.compile(r"(tensor|row|channel|token|col|head)|g([0-9]{1,9})|flat([0-9]{1,9})|([0-9]{1,9})x([0-9]{1,9})")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?")
_RULES = {f.name for f in fields(Rule)}


def shown(text: str) -> str:
    """The text as an error quotes it: a long one is cut in the middle."""
    half = _SHOWN // 2
    return repr(text if len(text) <= _SHOWN else f"{text[:half]}...{text[-half:]}")


def read(text: str) -> dict[str, Any]:
    """The fields of the format called `text` (name or alias), planes as nested dicts; FormatError where it stops."""
    if not text.strip():
        raise FormatError("an empty name; examples: int4.g128*bf16, mxfp4, e4m3fn.row*fp32")
    name = text.strip()
    grouped = _GROUPED.fullmatch(name)
    if grouped:
        u, bits, size = grouped.groups()
        name = f"uint{bits}-uint{bits}.g{size}*bf16@domain=minmax" if u else f"int{bits}.g{size}*bf16"
    reader = _Reader(ALIASES.get(name, name), asked=text)
    parts = reader.format()
    if reader.rest:
        raise reader.error("expected the end of the name")
    return parts


class _Reader:
    """A recursive-descent reader over one name; `rest` is what has not been read yet."""

    def __init__(self, text: str, asked: str) -> None:
        self.text, self.asked, self.at, self.depth = text, asked, 0, 0

    @property
    def rest(self) -> str:
        return self.text[self.at :]

    def error(self, why: str) -> FormatError:
        known = [*ALIASES, "int4_g128", "int4.g128*bf16"]
        near = difflib.get_close_matches(self.asked[:_SHOWN].lower(), known, n=3, cutoff=0.5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        if re.search("[A-Z]", self.asked):
            hint = f"; write lower case{hint}"
        return FormatError(f"{why}; read {shown(self.text[: self.at])}, stopped before {shown(self.rest)}{hint}")

    def take(self, literal: str) -> bool:
        if self.rest.startswith(literal):
            self.at += len(literal)
            return True
        return False

    def word(self) -> str:
        match = _WORD.match(self.rest)
        if not match:
            raise self.error("expected an element such as int4, uint8, e4m3fn, bf16")
        whole = re.match(r"[a-z0-9_]+", self.rest)
        if whole and (whole[0] in ALIASES or _GROUPED.fullmatch(whole[0])) and whole[0] not in ELEMENTS:
            raise self.error(f"{whole[0]!r} is an alias, and an alias must be the whole name; write it out")
        try:
            element(match[0])
        except FormatError as unknown:
            raise self.error(str(unknown) if len(match[0]) <= _SHOWN else "unknown element") from None
        self.at += match.end()
        return match[0]

    def plane(self) -> dict[str, Any]:
        if not self.take("("):
            return {"element": self.word()}
        self.depth += 1
        if self.depth >= MAX_DEPTH:
            raise self.error(f"planes nest more than {MAX_DEPTH} levels deep")
        inner = self.format()
        self.depth -= 1
        if not self.take(")"):
            raise self.error("expected ')'")
        return inner

    def block(self) -> Block:
        match = _BLOCK.match(self.rest)
        if not match:
            raise self.error("expected a block: tensor, row, col, head, g<k>, <n>x<k> or flat<k>")
        self.at += match.end()
        named, group, flat, rows, cols = match.groups()
        if named:
            return Block({"channel": "row", "token": "row"}.get(named, named))
        if group:
            return Block("group", cols=int(group))
        return Block("flat", cols=int(flat)) if flat else Block("tile", int(rows), int(cols))

    def format(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"element": self.word()}
        if self.take("-"):
            parts["zero"] = self.plane()
        if self.take("."):
            parts["block"] = self.block()
            if not (self.take("*") or self.take("/")):
                raise self.error("expected '*' or '/' and the scale's type")
            parts["op"], parts["scale"] = self.text[self.at - 1], self.plane()
            for sign, literal in ((1, "+"), (-1, "-")):
                if "offset" not in parts and self.take(literal):
                    parts["offset_sign"], parts["offset"] = sign, self.plane()
        if self.take("%"):
            match = re.match(r"([0-9]{1,9}):([0-9]{1,9})", self.rest)
            if not match:
                raise self.error("expected a sparsity such as 2:4")
            self.at += match.end()
            parts["sparsity"] = (int(match[1]), int(match[2]))
        if self.take("@"):
            parts["rule"] = self.rule()
        return parts

    def rule(self) -> Rule:
        chosen: dict[str, Any] = {}
        while True:
            match = re.match(r"([a-z0-9]+)=([a-z0-9_.+-]+)", self.rest)
            if not match or match[1] not in _RULES or match[1] in chosen:
                raise self.error(f"expected key=value once for each of: {', '.join(sorted(_RULES))}")
            key, value = match.groups()
            if key == "qmax" and not _NUMBER.fullmatch(value):
                raise self.error(f"qmax={shown(value)} is no number")
            chosen[key] = float(value) if key == "qmax" else value
            self.at += match.end()
            if not self.take(","):
                break
        try:
            return Rule(**chosen)
        except FormatError as bad:
            raise self.error(str(bad)) from None
