"""What the pages claim is run: python blocks, console blocks, written commands, generated pages, the strict build."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sybil import Document, Example
from sybil.example import SybilFailure
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import qhal
from qhal.contract import COMPOSITES
from qhal.elements import ELEMENTS
from qhal.selection import OPERATIONS
from qhal_engines import transformers as transformers_engine

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CASE = ROOT / "tests/golden/compressed_tensors/w4a16_g128_sym/checkpoint"
SHOWN = {"python", "console", "sh", "text", ""}
"""Languages of blocks: python and console are run, commands in the others are parsed. Whole files have their title."""


def module(name: str) -> ModuleType:
    """A helper of docs/, which is no package."""
    if str(ROOT / "docs") not in sys.path:
        sys.path.insert(0, str(ROOT / "docs"))
    return importlib.import_module(name)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_shows_happens(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run in the page's order in one namespace, from the project's root (the README in a folder of its own)."""
    console = module("console")
    session = console.Session(tmp_path)

    def shell(example: Example) -> str:
        return "\n".join(
            wrong for step in console.steps(example.parsed) if (wrong := step.difference(*session.run(step)))
        )

    parsers = [
        PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE),
        CodeBlockParser("console", shell),
        SkipParser(),
    ]
    monkeypatch.delenv("QHAL_BACKEND", raising=False)
    monkeypatch.setenv("TMP", str(tmp_path))
    monkeypatch.chdir(ROOT)
    document = Document.parse(str(page), *parsers)
    if page.name == "README.md":  # its example names a checkpoint and an input of the reader
        (tmp_path / "path/to").mkdir(parents=True)
        shutil.copytree(CASE, tmp_path / "path/to/checkpoint")
        monkeypatch.chdir(tmp_path)
        document.namespace["x"] = torch.ones(2, 128, dtype=torch.bfloat16)
        monkeypatch.setattr(transformers_engine, "install", lambda: None)  # tests/test_engine_transformers.py installs
    wrong = []
    for example in document:
        try:
            example.evaluate()
        except SybilFailure as failure:  # an example that raises ends the page, one that prints something else does not
            wrong.append(str(failure))
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_written_command_exists_with_its_options(page: Path) -> None:
    commands = module("commands")
    faults = [fault for line in commands.written(page.read_text()) if (fault := commands.fault(line))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_hides_from_the_tests(page: Path) -> None:
    """A misspelt language would make a block that looks run and is not."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.S | re.M)
    for language, body in found:
        whole = re.fullmatch(r' \{\.(python|toml) title="(.*)"\}', language)
        assert language in SHOWN or (whole and body == f'--8<-- "{whole[2]}"\n'), language
    assert "skip:" not in page.read_text(), "a block that is not run has another language than python or console"


def test_a_wrong_claim_fails(tmp_path: Path) -> None:
    """The tests above can fail: each kind of claim, made wrong."""
    console, commands = module("console"), module("commands")
    run = console.Session(tmp_path).run
    (step,) = console.steps("$ qhal inspect nowhere\nqhal: it exists\n")
    assert "expected 0" in step.difference(*run(step))
    (step,) = console.steps("$ qhal inspect nowhere  # exit code 1\nqhal: it exists\n")
    assert "printed" in step.difference(*run(step))
    (step,) = console.steps("$ qhal inspect nowhere \\\n    --json  # exit code 1\nqhal: CheckpointError: nowhere...\n")
    assert step.difference(*run(step)) == ""
    assert (
        commands.fault("qhal plan X --polcy error") == "qhal plan has no option --polcy (in: qhal plan X --polcy error)"
    )
    assert "no command 'qhal plans'" in commands.fault("qhal plans X")
    assert commands.fault("qhal conformance run -b x --level 0   # what it does") == ""
    page = tmp_path / "page.md"
    page.write_text("```python\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(Exception, match="Expected"):
        for example in Document.parse(str(page), PythonCodeBlockParser()):
            example.evaluate()


def test_numerics_leaves_nothing_out() -> None:
    """A new operation, rule, element, format alias's storage or numerics class needs its place on the page."""
    text = (ROOT / "docs/numerics.md").read_text()
    sections = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^### (.*)$", text, re.M))))
    assert sections >= {*OPERATIONS, *COMPOSITES, "quantize", "prepare", "restore"}
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    for rule in fields(qhal.Rule):
        assert f"| `{rule.name}` |" in rows
    for name in {re.sub(r"int\d$", "int8", n) for n in ELEMENTS}:
        assert f"`{name}`" in rows, name
    for numerics in qhal.NumericsClass:
        assert f"| `{numerics.label}` |" in rows
    for error in vars(qhal.errors).values():
        if isinstance(error, type) and issubclass(error, qhal.QhalError):
            assert error.__name__ in (ROOT / "docs/errors.md").read_text()


def test_aligned_columns_become_lists() -> None:
    text = "What it does.\n\nn    rows, of\n     course\nk|m  columns\nA sentence.\n>>> f(1)  # two\n2\n"
    assert module("docstrings").markdown(text) == (
        "What it does.\n\n- `n`: rows, of\n  course\n- `k|m`: columns\n\nA sentence.\n\n"
        "```python\n>>> f(1)  # two\n2\n```"
    )


def test_the_site_builds_strictly_and_holds_every_page(tmp_path: Path) -> None:
    """Broken links, anchors, snippets and docstring references are errors; nothing on a page is fetched elsewhere."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(site)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES[1:]:
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), page
    outside = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="https?://(?!localhost)[^"]+"')
    for page in site.rglob("*.html"):
        assert not (found := outside.search(page.read_text())), (page, found and found[0])
