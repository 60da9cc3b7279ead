"""Generate docs/interface.md from the docstrings of `qhal.interface`; `--check` fails if the file is stale."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import qhal
from qhal import caches, groups, interface, requests, selection

TARGET = Path(__file__).parent / "interface.md"
HEADER = """# The interface

Generated from the docstrings of `qhal/interface.py` and its request types by `make docs`; do not edit.
Interface version {0}.{1}.

{2}
"""
VALUES = (
    interface.Codec,
    interface.MemoryStats,
    requests.NumericsClass,
    requests.GemmRequest,
    requests.GroupedRequest,
    requests.KVRequest,
    requests.AttentionRequest,
    requests.QuantizeRequest,
    requests.HadamardRequest,
    requests.VQRequest,
    requests.CommRequest,
    requests.Arithmetic,
    requests.Support,
    groups.Offsets,
    groups.Masked,
    groups.Indexed,
    caches.Plane,
    caches.KVCache,
    caches.Limits,
    caches.AttentionBatch,
    selection.Device,
    selection.BackendInfo,
)


def render() -> str:
    """The whole document."""
    doc = inspect.getdoc(interface) or ""
    parts = [HEADER.format(*qhal.INTERFACE_VERSION, doc), "## QuantOps\n", inspect.getdoc(interface.QuantOps) or ""]
    for name, member in vars(interface.QuantOps).items():
        if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        function = member.fget if isinstance(member, property) else member
        assert function is not None
        signature = "" if isinstance(member, property) else _signature(function)
        parts.append(f"\n### `{name}`\n\n```python\n{name}{signature}\n```\n\n{_text(function)}")
    parts.append("\n## Values\n")
    parts.extend(f"### `{value.__name__}`\n\n{_text(value)}\n" for value in VALUES)
    return "\n".join(parts).rstrip() + "\n"


def _signature(function: object) -> str:
    text = str(inspect.signature(function))  # type: ignore[arg-type]
    return text.replace("(self, ", "(").replace("(self)", "()").replace("'", "")


def _text(thing: object) -> str:
    """The docstring; indented lines keep their columns."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    table = any("  " in line.strip() for line in lines)
    return "\n".join(lines) if not table else "```text\n" + "\n".join(lines) + "\n```"


def main() -> int:
    """Write the file, or compare it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true", help="fail if the file is stale")
    if arguments.parse_args().check:
        return 0 if TARGET.read_text() == render() else 1
    TARGET.write_text(render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
