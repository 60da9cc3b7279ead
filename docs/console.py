"""Console blocks of the pages: `$ command` lines with what they print. Tests run them, `make docs-update` renews them.

    ```console
    $ qhal inspect tests/golden/awq/autoawq_b4_g128_gemm/checkpoint
    ...                                   stands for any text, as in a doctest
    $ qhal plan missing                   # exit code 1: the code that is expected, 0 where nothing is said
    ```

`qhal` runs in this process (one import of torch for all of them), everything else in a shell; pip fetches nothing.
Commands start in the root of the project; $TMP is a folder of the page's own. A page that says
`<!-- fresh environment -->` has a Python of its own too: what it installs is seen by it alone.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
QUIET = {
    "COLUMNS": "100",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "PIP_QUIET": "1",
    "PIP_NO_INDEX": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}
FRESH = "<!-- fresh environment -->"
OURS = Path(sys.executable).parent
_CODE = re.compile(r"\s+# exit code (\d+)\s*$")


@dataclass(frozen=True)
class Step:
    """One command and what it must print (both streams) and return."""

    line: str
    expected: str

    @property
    def code(self) -> int:
        """The exit code that is expected."""
        found = _CODE.search(self.line)
        return int(found[1]) if found else 0

    @property
    def command(self) -> str:
        """The command without its remark."""
        return _CODE.sub("", self.line)

    def difference(self, printed: str, code: int) -> str:
        """What is wrong with a result, or ""."""
        if code != self.code:
            return f"$ {self.line}\nexit code {code}, expected {self.code}; it printed:\n{printed}"
        if not doctest.OutputChecker().check_output(self.expected.strip() + "\n", printed.strip() + "\n", FLAGS):
            return f"$ {self.line}\nexpected:\n{self.expected}\nprinted:\n{printed}"
        return ""


def steps(block: str) -> Iterator[Step]:
    """The commands of a block; a command that ends with a backslash goes on in the next line."""
    current: Step | None = None
    for line in block.splitlines():
        if current is not None and not current.expected and current.line.endswith("\\"):
            current = replace(current, line=f"{current.line[:-1].rstrip()} {line.strip()}")
        elif line.startswith("$ "):
            if current is not None:
                yield current
            current = Step(line[2:], "")
        elif current is not None:
            current = replace(current, expected=f"{current.expected}{line}\n")
    if current is not None:
        yield current


class Session:
    """The commands of one page: `export NAME=VALUE` holds until its end."""

    def __init__(self, temporary: Path, page: str = "") -> None:
        self.temporary = temporary
        self.bin = fresh(temporary / "environment") if FRESH in page else OURS
        self.exported: dict[str, str] = {}

    def run(self, step: Step) -> tuple[str, int]:
        """(what a command prints, its exit code)."""
        command = step.command.replace("$TMP", str(self.temporary))
        words = shlex.split(command)
        if words[0] == "export":
            self.exported |= dict(word.split("=", 1) for word in words[1:])
            return "", 0
        if (
            words[0] == "qhal"
            and self.bin == OURS
            and not self.exported
            and not any(w in ("|", ">", "&&") for w in words)
        ):
            printed, code = _inside(words)
        else:
            path = os.pathsep.join([str(self.bin), os.environ["PATH"]])
            environment = {**os.environ, **QUIET, **self.exported, "PATH": path}
            done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
            printed, code = done.stdout + done.stderr, done.returncode
        printed = "\n".join(line.rstrip() for line in printed.splitlines())
        return printed.replace(str(self.temporary), "$TMP").replace(f"{ROOT}/", ""), code


def fresh(folder: Path) -> Path:
    """The programs of a new environment that sees the packages of ours, this project among them; nothing is fetched."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    bin_folder, (packages,) = folder / "bin", folder.glob("lib/python*/site-packages")
    ours = sysconfig.get_paths()["purelib"]
    (packages / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    script = bin_folder / "qhal"
    script.write_text(f"#!{bin_folder / 'python'}\nfrom qhal_cli.entry import main\n\nmain()\n")
    script.chmod(0o755)
    return bin_folder


def _inside(words: list[str]) -> tuple[str, int]:
    from qhal_cli import output
    from qhal_cli.entry import main

    printed, arguments, folder, code = io.StringIO(), sys.argv, Path.cwd(), 0
    saved = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    output.console.width = output.stderr.width = int(QUIET["COLUMNS"])  # they may be older than the variable
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    sys.argv = words
    os.chdir(ROOT)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = arguments
        os.chdir(folder)
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return printed.getvalue(), code


_BLOCK = re.compile(r"(?P<open>^```console\n)(?P<body>.*?)(?P<close>^```$)", re.S | re.M)


def refreshed(page: str, temporary: Path) -> str:
    """The page with the output of every command that no longer matches replaced by what it prints now."""
    session = Session(temporary, page)

    def block(match: re.Match[str]) -> str:
        body = match["body"]
        for step in steps(body):
            printed, code = session.run(step)
            if code != step.code:
                raise SystemExit(step.difference(printed, code))
            if step.difference(printed, code):
                old, shown = f"{step.line}\n{step.expected}", f"{printed.strip()}\n" if printed.strip() else ""
                if old not in body:
                    raise SystemExit(
                        f"a command of several lines is renewed by hand:\n{step.difference(printed, code)}"
                    )
                body = body.replace(old, f"{step.line}\n{shown}", 1)
        return f"{match['open']}{body}{match['close']}"

    return _BLOCK.sub(block, page)
