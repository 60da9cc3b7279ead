"""The command line, read from its own functions: the page docs/cli.md, and whether a written command could run."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

_HEAD = """# The command line

Generated from the commands themselves by `make docs-update`; do not edit.

Every command explains itself with `--help`; every table has `--json`. Exit codes: 0 it is so, 1 what was asked failed,
2 wrong use. Errors are one message on stderr: what was asked, what was found, what to do
([Errors and what to do](errors.md)).
"""


@dataclass(frozen=True)
class Command:
    """One command: its words ("qhal conformance run"), its docstring, rows of (words, meaning, default)."""

    words: str
    text: str
    arguments: tuple[tuple[str, str], ...]
    options: dict[str, tuple[str, str, bool]] = field(default_factory=dict)
    """option -> (meaning, default, whether it is a flag)"""


def commands() -> dict[str, Command]:
    """Every command of ours, by its words."""
    from qhal_cli.app import app
    from qhal_conformance.commands import app as conformance

    found = [_command("qhal", c.name, c.callback) for c in app.registered_commands]
    found += [_command("qhal conformance", c.name, c.callback) for c in conformance.registered_commands]
    return {c.words: c for c in found}


def _command(prefix: str, name: str | None, function: Callable[..., Any] | None) -> Command:
    assert function is not None
    hints = get_type_hints(function, include_extras=True)
    arguments, options = [], {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        info = next(m for m in hint.__metadata__ if isinstance(m, ArgumentInfo | OptionInfo))
        if isinstance(info, ArgumentInfo):
            arguments.append((info.metavar or parameter.name.upper(), info.help or ""))
            continue
        first = [info.default] if isinstance(info.default, str) else []  # inside Annotated the first name lands there
        names = [*first, *(info.param_decls or ())] or [f"--{parameter.name.replace('_', '-')}"]
        required, default = parameter.default is inspect.Parameter.empty, parameter.default
        shown = "required" if required else "" if default in (None, "") or default is False else f"`{default}`"
        options[", ".join(names)] = (info.help or "", shown, hint.__origin__ is bool)
    words = f"{prefix} {name or function.__name__.replace('_', '-')}"
    return Command(words, inspect.getdoc(function) or "", tuple(arguments), options)


def page() -> str:
    """docs/cli.md."""
    parts = [_HEAD]
    for c in commands().values():
        usage = " ".join([c.words, *(name for name, _ in c.arguments), "[OPTIONS]"])
        parts.append(f"## `{c.words}`\n\n```text\n{usage}\n```\n\n{_prose(c.text)}")
        rows = [f"| `{name}` | {_cell(meaning)} | required |" for name, meaning in c.arguments]
        rows += [
            f"| {_names(name)} | {_cell(meaning)} | {default} |" for name, (meaning, default, _) in c.options.items()
        ]
        parts.append("\n".join(["| | meaning | default |", "|---|---|---|", *rows, ""]))
    return "\n".join(parts).rstrip() + "\n"


def _names(option: str) -> str:
    return ", ".join(f"`{name}`" for name in option.split(", "))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _prose(text: str) -> str:
    """The docstring, its examples as a block; "Example: `...`" in a line stays as it is."""
    body, _, examples = text.partition("Examples:\n")
    if not examples:
        return f"{text.strip()}\n"
    lines = [line.strip() for line in examples.splitlines()]
    last = max(i for i, line in enumerate(lines) if line.startswith("qhal") or "=" in line.split(" ")[0])
    shown, rest = [line for line in lines[: last + 1] if line], "\n".join(lines[last + 1 :]).strip()
    block = "```sh\n" + "\n".join(shown) + "\n```\n"
    return f"{body.strip()}\n\n{block}" + (f"\n{rest}\n" if rest else "")


_LINE = re.compile(r"^(?:\$ )?(?:[A-Z_]+=\S* )*(qhal .*)$")


def written(text: str) -> Iterator[str]:
    """Every `qhal ...` command in the code of a page: in blocks (a line each) and between backticks."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.S | re.M):
        joined = block.replace("\\\n", " ")
        yield from (m[1] for line in joined.splitlines() if (m := _LINE.match(line)))
    yield from re.findall(r"`(qhal [a-z][^`\n]*)`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))


def fault(line: str) -> str:
    """Why a written command cannot be meant, or "": no such command, no such option. Values are not judged."""
    words = shlex.split(re.split(r"\s+(?:#|\|)\s*|\s{2,}", line)[0], comments=True)
    known = commands()
    depth = 3 if words[1:2] == ["conformance"] else 2
    name = " ".join(words[:depth]).rstrip(",")
    if words[1].startswith("-") or (words == ["qhal", "conformance"]):
        return ""
    if name not in known:
        return f"no command {name!r} (in: {line})"
    options = {alias for names in known[name].options for alias in names.split(", ")} | {"--help", "-h"}
    unknown = [w for w in words[depth:] if w.startswith("-") and w.partition("=")[0] not in options]
    return f"{name} has no option {unknown[0]} (in: {line})" if unknown else ""
