"""The files of a report: JSON for programs, a page and Markdown for people, JUnit for CI."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qhal_conformance import junit, page, table

FORMATS: dict[str, Callable[[dict[str, Any]], str]] = {
    "report.json": lambda report: json.dumps(report, indent=1) + "\n",
    "report.md": table.markdown,
    "report.html": page.html,
    "junit.xml": junit.junit,
}
"""Text of each file by its name; every one follows from the report alone."""


def save(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write all four; each appears whole or not at all."""
    return write({folder / name: text(report) for name, text in FORMATS.items()})


def write(texts: Mapping[Path, str]) -> list[Path]:
    """Write files beside their places first, then move them."""
    parts = []
    try:
        for target, text in texts.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            parts.append((part, target))
            part.write_text(text, encoding="utf-8", errors="replace")
        for part, target in parts:
            part.replace(target)
    finally:
        for part, _ in parts:
            part.unlink(missing_ok=True)
    return list(texts)
