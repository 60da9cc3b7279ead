"""The vendor kit: names, files, nothing half written. docs/adding_a_backend.md is where its backend is installed and
judged, in a fresh environment (`test_docs.py`)."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

import qhal
from qhal.errors import BackendError
from qhal_cli.app import app
from qhal_conformance import kit

cli = CliRunner()


def test_another_name_stands_everywhere() -> None:
    files = kit.render("my-chip")
    assert not [f"{path}: {text}" for path, text in files.items() if re.search("acme", path + text, re.I)]
    assert {"pyproject.toml", "README.md", ".gitignore", ".github/workflows/conformance.yml"} <= set(files)
    assert {"qhal_my_chip/ops.py", "tests/test_my_chip.py", "qhal_my_chip/py.typed"} <= set(files)
    assert 'name = "qhal-my-chip"' in files["pyproject.toml"]
    assert 'my_chip = "qhal_my_chip:backend"' in files["pyproject.toml"]
    assert "class MyChipOps(QuantOps)" in files["qhal_my_chip/ops.py"]
    assert "MY_CHIP_DEVICE" in files["qhal_my_chip/probe.py"]
    for path, text in files.items():
        if path.endswith(".py"):
            ast.parse(text, path)
            assert len(text.splitlines()) <= 150, f"{path}: the first thing that a vendor reads is short"


def test_it_is_written_for_the_interface_of_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the template says: a generated backend must load."""
    assert f"INTERFACE = {qhal.INTERFACE_VERSION}" in kit.render("acme")["qhal_acme/__init__.py"]
    monkeypatch.setattr(kit, "INTERFACE_VERSION", (3, 7))
    assert "\nINTERFACE = (3, 7)\n" in kit.render("acme")["qhal_acme/__init__.py"]


@given(st.from_regex(r"[a-z][a-z0-9]{0,9}([-_][a-z0-9]{1,9}){0,2}", fullmatch=True))
def test_names_fit_python_and_the_index(name: str) -> None:
    """What is accepted is a package's name in both worlds, and is its own canonical form (PEP 503)."""
    try:
        word = kit.check(name)
    except BackendError as refused:
        assert "choose another name" in str(refused)
        return
    assert word.isidentifier() and canonicalize_name(kit.distribution(name)) == kit.distribution(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("My Chip!", "'my-chip' would do"),
        ("acme/../x", "'acme-x' would do"),
        ("1st", "a letter first"),
        ("", "a letter first"),
        ("-", "a letter first"),
        ("a--b", "'a-b' would do"),
        ("a" * 41, "40 characters"),
        ("acmé", "lower case letters"),
        ("class", "a word of Python"),
        ("json", "a word of Python"),
        ("auto", "its own choice"),
        ("quant", "QuantOps"),
        ("cpu_reference", "installed already"),
        ("cpu-reference", "installed already"),
        ("conformance", "'qhal_conformance' is installed already"),
    ],
)
def test_a_name_that_no_backend_can_have_is_refused(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=re.escape(words)):
        kit.render(name)
    done = cli.invoke(app, ["new-backend", "--out", str(tmp_path / "out"), "--", name])
    assert done.exit_code != 0 and isinstance(done.exception, BackendError)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.invoke(app, ["new-backend", "acme"]).exit_code == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    done = cli.invoke(app, ["new-backend", "acme"])
    assert isinstance(done.exception, BackendError) and "exists already" in str(done.exception)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_nothing_is_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = Path.write_text, []

    def full(self: Path, *arguments: str, **named: str) -> int:
        written.append(self)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **named)

    monkeypatch.setattr(Path, "write_text", full)
    done = cli.invoke(app, ["new-backend", "acme", "--out", str(tmp_path / "deep/acme")])
    assert isinstance(done.exception, BackendError) and "nothing was left behind" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_json_lists_the_files(tmp_path: Path) -> None:
    done = cli.invoke(app, ["new-backend", "acme", "--out", str(tmp_path / "acme"), "--json"])
    found = json.loads(done.stdout)
    assert found["distribution"] == "qhal-acme" and found["name"] == "acme"
    assert sorted(found["files"]) == sorted(
        str(p.relative_to(tmp_path / "acme")) for p in (tmp_path / "acme").rglob("*") if p.is_file()
    )


def test_its_claims_name_every_obstacle_and_no_device_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(kit.TEMPLATE)
    for name in [m for m in sys.modules if m.startswith("qhal_acme")]:
        monkeypatch.delitem(sys.modules, name)
    info = importlib.import_module("qhal_acme").backend()
    assert qhal.selection.probe(info) is not None
    ops = qhal.selection.offline(info, "anything")
    w = qhal.Format.parse("uint4-uint4.g32*fp16")
    refused = ops.supports(qhal.GemmRequest(w=w, n=64, k=64, x=(qhal.Format("bf16"),), graph=True, group_index=True))
    assert all(words in refused.reason for words in ("uint4", "act-order", "captures no graphs"))
    assert not ops.supports("no request") and ops.supports("no request").reason  # type: ignore[arg-type]
