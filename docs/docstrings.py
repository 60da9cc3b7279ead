"""Docstrings of this project as Markdown: aligned columns of names and meanings become lists.

n     rows           ->   - `n`: rows
k     columns
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ITEM = re.compile(r"^ {0,4}(?P<names>\S+(?:,? \S+){0,5}?) {2,}(?P<text>\S.*)$")


def markdown(text: str) -> str:
    """The docstring with runs of aligned `name   meaning` lines as lists and examples as blocks; the rest unchanged."""
    text = re.sub(r"^(?P<indent> *)>>> (?:.+\n?)+", lambda m: f"\n```python\n{m[0].rstrip()}\n```\n", text, flags=re.M)
    out: list[str] = []
    inside = block = False
    for line in text.splitlines():
        block ^= line.startswith("```")
        item = None if block else _ITEM.match(line)
        if item:
            if not inside and out and out[-1]:
                out.append("")
            out.append(f"- `{item['names']}`: {item['text']}")
            inside = True
        elif inside and line.startswith("  ") and line.strip():
            out.append(f"  {line.strip()}")
        else:
            if inside and line.strip():
                out.append("")
            inside = False
            out.append(line)
    return "\n".join(out)


class Readable(griffe.Extension):
    """Every docstring that the site shows goes through `markdown`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
