"""Generate what pages repeat from the code; `--check` fails if a file is stale.

docs/interface.md       from the docstrings of `qhal.interface` and its request types
docs/cli.md             from the signatures and docstrings of the commands
docs/evidence/index.md  from the titles of the pages beside it
docs/formats.md         its parts between `<!-- generated: ... -->` and `<!-- end -->`, by `docs/families.py`
--console               also rewrites the outputs in console blocks that commands no longer print (`docs/console.py`)
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import commands
import console
import families
from docstrings import markdown

import qhal
from qhal import caches, groups, interface, requests, selection

HERE = Path(__file__).parent
HEADER = """# The interface

Generated from the docstrings of `qhal/interface.py` and its request types by `make docs-update`; do not edit.
Interface version {0}.{1}.

{2}
"""
EVIDENCE = """# Evidence

What was run, where, and what it printed. Levels, never mixed: L0 layout, L1 compiles for the chip, L2 interpreted or
emulated, L3 ran on the device. Generated from the pages of this folder by `make docs-update`; do not edit.
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


def interface_page() -> str:
    """docs/interface.md."""
    doc = inspect.getdoc(interface) or ""
    parts = [HEADER.format(*qhal.INTERFACE_VERSION, doc), "## QuantOps\n", inspect.getdoc(interface.QuantOps) or ""]
    for name, member in vars(interface.QuantOps).items():
        if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        function = member.fget if isinstance(member, property) else member
        assert function is not None
        signature = "" if isinstance(member, property) else _signature(function)
        # signatures are shown as text: they are no examples
        parts.append(f"\n### `{name}`\n\n```text\n{name}{signature}\n```\n\n{_text(function)}")
    parts.append("\n## Values\n")
    parts.extend(f"### `{value.__name__}`\n\n{_text(value)}\n" for value in VALUES)
    return "\n".join(parts).rstrip() + "\n"


def _signature(function: Callable[..., object]) -> str:
    """The signature as it is written in the source, a parameter per line where it is long."""
    signature = inspect.signature(function)
    parameters = [p for name, p in signature.parameters.items() if name != "self"]
    star = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.KEYWORD_ONLY), None)
    shown = [str(p).replace("'", "") for p in parameters]
    if star is not None:
        shown.insert(star, "*")
    end = f" -> {signature.return_annotation}".replace("'", "")
    short = f"({', '.join(shown)}){end}"
    return short if len(short) <= 100 else "(\n" + "".join(f"    {p},\n" for p in shown) + f"){end}"


def _text(thing: object) -> str:
    return markdown(inspect.getdoc(thing) or "")


def evidence_page() -> str:
    """docs/evidence/index.md: the pages of the folder, newest first, by their first line."""
    parts = [EVIDENCE]
    for page in sorted(HERE.glob("evidence/2*.md"), reverse=True):
        title = page.read_text().splitlines()[0].removeprefix("# ")
        parts.append(f"* [{title}]({page.name})")
    return "\n".join(parts) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "interface.md": interface_page,
    "cli.md": commands.page,
    "evidence/index.md": evidence_page,
    "formats.md": lambda: families.refreshed((HERE / "formats.md").read_text()),
}


def main() -> int:
    """Write the files, or compare them."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="fail if a file is stale")
    arguments.add_argument("--console", action="store_true", help="run console blocks and keep what they print")
    asked = arguments.parse_args()
    stale = [name for name, page in PAGES.items() if not _same(HERE / name, page())]
    if asked.check:
        print("".join(f"docs/{name} is stale: run make docs-update\n" for name in stale), end="", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (HERE / name).write_text(PAGES[name]())
    if asked.console:
        for page in sorted([*HERE.rglob("*.md"), HERE.parent / "README.md"]):
            with tempfile.TemporaryDirectory() as temporary:
                page.write_text(console.refreshed(page.read_text(), Path(temporary)))
    return 0


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main())
