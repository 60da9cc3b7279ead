"""The vendor kit: a complete backend in a distribution of its own, to begin with.

`template/` is that distribution for a device called acme: code that is read, typed and tested as it stands. `render`
puts another name in its place; `qhal new-backend` writes the result.
"""

from __future__ import annotations

import keyword
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from qhal.errors import BackendError
from qhal.interface import INTERFACE_VERSION
from qhal.selection import backends

TEMPLATE = Path(__file__).parent / "template"
_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
_LONGEST = 40


def distribution(name: str) -> str:
    """`qhal-my-chip`: the name on a package index, in the form that PEP 503 gives it."""
    return f"qhal-{name.replace('_', '-')}"


def check(name: str) -> str:
    """The name as an identifier (`my-chip` is `my_chip` in code); BackendError if no backend can be called that."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_LONGEST].rstrip("-")
        hint = f"; {near!r} would do" if _NAME.fullmatch(near) else ""
        raise BackendError(
            f"{name[:80]!r} is no name for a backend: lower case letters and digits, parts joined by - or _, a letter "
            f"first, {_LONGEST} characters at most{hint}"
        )
    word = name.replace("-", "_")
    package = f"qhal_{word}"
    if word == "quant":
        raise BackendError("'quant' would call its class QuantOps, as qhal calls the interface; choose another name")
    if word == "auto" or keyword.iskeyword(word) or word in sys.stdlib_module_names:
        what = "what `qhal.select` calls its own choice" if word == "auto" else "a word of Python"
        raise BackendError(f"{name!r} is {what}; choose another name")
    if word in backends():
        raise BackendError(f"a backend {word!r} is installed already; choose another name, or uninstall it first")
    if find_spec(package) is not None:
        raise BackendError(f"a package {package!r} is installed already; choose another name, or uninstall it first")
    return word


def render(name: str) -> dict[str, str]:
    """Every file of the distribution by its path. BackendError for a name that no backend can have."""
    word = check(name)
    camel = "".join(part.capitalize() for part in word.split("_"))
    words = {"qhal-acme": distribution(name), "ACME": word.upper(), "Acme": camel, "acme": word}
    version = f"INTERFACE = ({INTERFACE_VERSION[0]}, {INTERFACE_VERSION[1]})"

    def named(text: str) -> str:
        return re.sub("|".join(words), lambda found: words[found[0]], text)

    files = {}
    for file in sorted(p for p in TEMPLATE.rglob("*") if p.is_file()):
        inside = file.relative_to(TEMPLATE)
        if any(part.startswith((".", "__pycache__")) for part in inside.parts):
            continue  # what tools leave beside the code: the template has `dot_` where a name begins with a dot
        path = named(inside.as_posix().replace("dot_", "."))
        files[path] = re.sub(r"^INTERFACE = \(.*\)$", version, named(file.read_text(encoding="utf-8")), flags=re.M)
    return files
