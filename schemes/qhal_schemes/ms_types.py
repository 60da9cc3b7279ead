"""The quantization types of ModelSlim, as data: what a name such as W4A4_FLATQUANT_DYNAMIC says about a Linear module.

Input formats are those of the serving operators: one scale per token, where msmodelslim's own fake quantization on a
CPU takes one per feature. MX exponents are floor(log2 amax) for FP8 elements and over1.75 for FP4, elements round half
away from zero. Decoding is the writer's, (code - offset) * scale; some operators add the offset they are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qhal.errors import CheckpointError

_MXFP4 = "e2m1.g32*e8m0@e8m0=over1.75,round=away"
_MXFP8 = "e4m3fn.g32*e8m0@round=away"
STATIC = "int8-fp32.tensor*fp32"
"""A static int8 input: round(x / input_scale + input_offset)."""


@dataclass(frozen=True)
class Kind:
    """One type. dtype: of the stored codes; input: the format of a dynamic input, "" for none.

    static  input_scale, input_offset, quant_bias and deq_scale: always, or when decoding (`decode`)
    offset  weight_offset counts; elsewhere the writer stores zeros, which are checked and dropped
    pairs   two int4 codes may share a byte
    """

    element: str
    dtype: str
    input: str = ""
    static: Literal["", "always", "decode"] = ""
    offset: bool = False
    pairs: bool = False
    mx: bool = False
    dual: bool = False


PLAIN = ("FLOAT", "W16A16S")
"""Types of tensors that hold plain floats; W16A16S is pruned, and stored densely."""

KINDS: dict[str, Kind] = {
    "W8A8": Kind("int8", "I8", static="always"),
    "W8A8S": Kind("int8", "I8", static="always"),  # pruned, stored densely
    "W8A8_MIX": Kind("int8", "I8", "int8.row*fp32", static="decode"),
    "W8A8_DYNAMIC": Kind("int8", "I8", "int8.row*fp32"),
    "W4A8_DYNAMIC": Kind("int4", "I8", "int8.row*fp32", pairs=True),
    "W4A4_DYNAMIC": Kind("int4", "I8", "int4.row*fp32"),
    "W8A16": Kind("int8", "I8", offset=True),
    "W4A16": Kind("int4", "I8", offset=True, pairs=True),
    "WFP8AFP8_DYNAMIC": Kind("e4m3fn", "F8_E4M3", "e4m3fn.row*fp32"),
    "W8A8_MXFP8": Kind("e4m3fn", "F8_E4M3", _MXFP8, mx=True),
    "W4A8_MXFP": Kind("e2m1", "U8", _MXFP8, mx=True),
    "W4A4_MXFP4": Kind("e2m1", "U8", _MXFP4, mx=True),
    "W4A4_MXFP4_DUALSCALE": Kind("e2m1", "U8", mx=True, dual=True),
}
REFUSED = {
    "W8A8SC": "compressed codes",
    "W16A16SC": "compressed weights",
    "W8A8_TIMESTEP": "scales for every time step",
    "NF4": "a layout that its writer does not describe",
}


@dataclass(frozen=True)
class Type:
    """A type taken apart: its kind and the wrappers around the Linear module that its name tells of."""

    name: str
    kind: Kind | None
    flatquant: bool = False
    svd: bool = False


def parse(name: str, where: str) -> Type:
    """The type called `name`; CheckpointError with the known names otherwise. where: file and tensor, for the error."""
    if name in PLAIN:
        return Type(name, None)
    words = name.split("_")
    base = "_".join(w for w in words if w not in ("FLATQUANT", "SVD"))
    if base in KINDS:
        return Type(name, KINDS[base], "FLATQUANT" in words, "SVD" in words)
    if base in REFUSED:
        raise CheckpointError(f"unsupported: {where}: type {name[:80]}: {REFUSED[base]}; planned")
    raise CheckpointError(
        f"{where}: unknown quantization type {name[:80]!r}; known: {', '.join((*PLAIN, *KINDS))}, with _FLATQUANT or "
        f"_SVD before _DYNAMIC or at the end"
    )
