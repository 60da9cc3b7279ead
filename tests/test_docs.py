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
from unittest.mock import create_autospec

import pytest
import torch
from sybil import Document, Example
from sybil.example import SybilFailure
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

import qhal
from qhal.contract import COMPOSITES
from qhal.elements import ELEMENTS
from qhal.selection import OPERATIONS
from qhal_engines import transformers as transformers_engine

ROOT = Path(__file__).parent.parent
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SITE]
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
    session = console.Session(tmp_path, page.read_text())

    def shell(example: Example) -> str:
        return "\n".join(
            wrong for step in console.steps(example.parsed) if (wrong := step.difference(*session.run(step)))
        )

    parsers = [
        PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE),
        CodeBlockParser("console", shell),
    ]
    monkeypatch.setenv("QHAL_BACKEND", "cpu_reference")  # the same pages on a machine with an accelerator
    monkeypatch.chdir(ROOT)
    document = Document.parse(str(page), *parsers)
    if page.name == "README.md":  # its example names a checkpoint and an input of the reader
        (tmp_path / "path/to").mkdir(parents=True)
        shutil.copytree(CASE, tmp_path / "path/to/checkpoint")
        monkeypatch.chdir(tmp_path)
        document.namespace["x"] = torch.ones(2, 128, dtype=torch.bfloat16)
        # tests/test_engine_transformers.py installs; here the call has to fit the signature
        monkeypatch.setattr(transformers_engine, "install", create_autospec(transformers_engine.install))
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
    text = page.read_text()
    faults = [fault for line in commands.written(text) if (fault := commands.fault(line))]
    assert not faults, "\n".join(faults)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_hides_from_the_tests(page: Path) -> None:
    """A misspelt language would make a block that looks run and is not."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.S | re.M)
    for language, body in found:
        whole = re.fullmatch(r' \{\.(python|toml|diff|json) title="(.*)"\}', language)
        assert language in SHOWN or (whole and body == f'--8<-- "{whole[2]}"\n'), language


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


def test_outputs_are_renewed_only_where_they_changed(tmp_path: Path) -> None:
    page = "```console\n$ echo one\nold\n$ echo two three\ntwo ...\n$ true\n$ false  # exit code 1\nold\n```\nold\n"
    renewed = "```console\n$ echo one\none\n$ echo two three\ntwo ...\n$ true\n$ false  # exit code 1\n```\nold\n"
    assert module("console").refreshed(page, tmp_path) == renewed
    assert module("console").refreshed(renewed, tmp_path) == renewed
    with pytest.raises(SystemExit, match="exit code 1, expected 0"):
        module("console").refreshed("```console\n$ false\n```\n", tmp_path)


def test_numerics_leaves_nothing_out() -> None:
    """A new operation, rule, element, numerics class or error needs its place on its page."""
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


def build(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site), *arguments]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_site_builds_strictly_and_holds_every_page(tmp_path: Path) -> None:
    """Broken links, anchors, file includes and docstring references are errors; no page fetches anything elsewhere."""
    site = tmp_path / "site"
    done = build(site)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in SITE:
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), page
    outside = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="https?://(?!localhost)[^"]+"')
    for page in site.rglob("*.html"):
        assert not (found := outside.search(page.read_text())), (page, found and found[0])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[x](nowhere.md)", "nowhere.md"),
        ("[x](index.md#nope)", "#nope"),
        ('``` {.python title="examples/nope.py"}\n--8<-- "examples/nope.py"\n```', "examples/nope.py"),
        ("::: qhal.nothing", "qhal.nothing"),
    ],
    ids=["page", "anchor", "file", "docstring"],
)
def test_the_strict_build_refuses(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Page\n\n{text}\n")
    config = f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {tmp_path / 'docs'}\nnav: [index.md]\nextra_css: []\n"
    extension = "plugins: {mkdocstrings: {handlers: {python: {options: {extensions: []}}}}}\n"
    (tmp_path / "mkdocs.yml").write_text(config + extension)
    done = build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode != 0 and complaint in done.stderr, done.stderr
