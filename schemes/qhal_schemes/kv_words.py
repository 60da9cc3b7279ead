"""Words for cache formats: what `--kv-format fp8` means, written out as format names.

A word is a target, not a name, as in `qhal quantize --format`: `int8` here is one scale per (token, head), where the
format name `int8` has no scale at all. Every other text is a format name or alias and means exactly itself.
"""

from __future__ import annotations

import difflib
import re

from qhal.errors import FormatError
from qhal.formats import Format

KV_WORDS: dict[str, str] = {
    "fp8": "e4m3fn.tensor*fp32",
    "fp8_head": "e4m3fn.head*fp32",
    "fp8_row": "e4m3fn.row*fp32",
    "fp8_e5m2": "e5m2.tensor*fp32",
    "fp8_fnuz": "e4m3fnuz.tensor*fp32",
    "int8": "int8.row*fp32",
    "int4": "int4.row*fp32",
    "uint4": "uint4-fp16.row*fp16@domain=minmax",
}
"""Static scales (tensor, head) come from the checkpoint; `row` is computed per (token, head). Beside these: mxfp8,
mxfp4, nvfp4, bf16 and every other format name."""

_BETWEEN = re.compile(r",(?!\s*\w+=)")  # a comma before key= belongs to a rule


def parse_kv(text: str) -> tuple[Format, Format]:
    """The formats of K and V that `text` names: one for both, or "K,V". FormatError lists the words."""
    parts = [part.strip() for part in _BETWEEN.split(text)]
    if len(parts) > 2 or not all(parts):
        raise FormatError(f"cache format {text[:120]!r}: give one format for K and V, or two with a comma: int8,int4")
    formats = [_one(part, text) for part in parts]
    return formats[0], formats[-1]


def _one(part: str, text: str) -> Format:
    try:
        return Format.parse(KV_WORDS.get(part, part))
    except FormatError as error:
        near = difflib.get_close_matches(part[:40], KV_WORDS, 1)
        hint = f" (near: {near[0]})" if near else ""
        words = ", ".join([*KV_WORDS, "mxfp8", "mxfp4", "nvfp4", "bf16"])
        raise FormatError(f"cache format {text[:120]!r}{hint}: {error}\n  words for caches: {words}") from None
