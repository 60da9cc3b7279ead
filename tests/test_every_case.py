"""Every golden checkpoint through the commands: plan on every backend and architecture, inspect, picture, dequantize.

A new family needs no line here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import golden_cases
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from qhal.selection import backends
from qhal_cli.app import app
from qhal_cli.picture import letter, page
from qhal_schemes import Checkpoint, open_checkpoint
from qhal_schemes.evidence import COMPARED, UNCOMPARED

CASES = golden_cases.cases()
TARGETS = [(name, arch) for name, info in sorted(backends().items()) for arch in info.archs or ("cpu",)]


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def folder(case: str) -> Path:
    return golden_cases.path(case) / "checkpoint"


def command(*arguments: str) -> str:
    """`qhal ARGUMENTS` in this process."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output or repr(done.exception)
    return done.stdout


@pytest.mark.parametrize("case", CASES)
def test_inspect_tells_everything(case: str, tmp_path: Path) -> None:
    ckpt, out = open_checkpoint(folder(case)), tmp_path / "picture.html"
    record = json.loads(command("inspect", str(folder(case)), "--html", str(out), "--json"))
    members = [m for row in record["formats"] for m in row["members"]]
    assert sorted(members) == sorted(ckpt.modules(quantized=True))
    assert {row["evidence"] for row in (*record["formats"], *record["kv"])} <= {COMPARED, UNCOMPARED}
    assert {row["evidence"] for row in record["formats"]} == {COMPARED}, "a golden case compares its modules"
    shown = Page(out.read_text())
    cells = {(value or "").partition(": ")[0] for name, value in shown.attributes if name == "title"}
    for module in ckpt.modules():
        assert re.sub(r"experts\.\d+\.", "experts.*.", module) in cells
    for row in record["formats"]:
        assert row["weight"] in shown.words and f"{row['bits_per_weight']:.2f}" in shown.words
    text = command("inspect", str(folder(case)))
    assert all(row["rule"].split()[0] in text for row in record["excluded"])


@pytest.mark.parametrize("case", CASES)
def test_every_backend_and_architecture_gives_a_plan(case: str) -> None:
    layers = {f.name for f in open_checkpoint(folder(case)).layer_formats()}
    for backend, arch in TARGETS:
        arguments = ["--backend", backend, "--arch", arch, "--policy", "report", "--json"]
        plan = json.loads(command("plan", str(folder(case)), *arguments))
        assert plan["backend"] == backend
        named = {name for entry in plan["entries"] for name in entry["layers"]}
        assert layers <= named
        assert all(e["reason"] or e["executes"] for e in plan["entries"])
        if backend == "cpu_reference":
            assert {e["status"] for e in plan["entries"]} == {"ok"}


@pytest.mark.parametrize("case", CASES)
def test_dequantize_writes_every_module_and_tensor(case: str, tmp_path: Path) -> None:
    ckpt, out = open_checkpoint(folder(case)), tmp_path / "w.safetensors"
    record = json.loads(command("dequantize", str(folder(case)), "--out", str(out), "--json"))
    with safe_open(out, "pt") as file:
        names = set(file.keys())
        assert len(names) == record["tensors"] and set(ckpt.account.plain) <= names
        stacked = {m for group in ckpt.stacked.values() for m in group.modules()}
        for module in (m for m in ckpt.modules() if m not in stacked):
            w, f = file.get_tensor(f"{module}.weight"), ckpt.format(module)
            assert w.shape == (f.n, f.k) and w.dtype == torch.float32 and bool(w.isfinite().all())
        for prefix, group in ckpt.stacked.items():
            assert all(f"{prefix}.{e}.{p}_proj.weight" in names for e in range(group.count) for p in ("gate", "down"))


NAMES = ['<script>alert("x")</script>', "a&b\"'", "[/red]x[bold]", "{{ 7 * 7 }}", "m" * 300]


def hostile(write_checkpoint: Callable[..., Path]) -> Checkpoint:
    tensors = {f"{name}.weight": torch.ones(4, 4) for name in NAMES}
    tensors |= {f"model.layers.{i}.{name}.weight": torch.ones(4, 4) for i, name in enumerate(NAMES)}
    return open_checkpoint(write_checkpoint(tensors, name="\x1b[31mred"))


def test_names_of_a_file_are_text_in_the_picture(write_checkpoint: Callable[..., Path]) -> None:
    shown = Page(page(hostile(write_checkpoint)))
    assert not shown.tags & {"script", "img", "iframe", "link", "form", "a"}
    assert not any(name.startswith("on") or name in ("href", "src") for name, _ in shown.attributes)
    styles = [value for name, value in shown.attributes if name == "style"]
    assert styles and all(re.fullmatch(r"background:[-a-z0-9(),.% ]+", value or "") for value in styles)
    assert all(name in shown.words for name in NAMES)
    titles = {(value or "").partition(": ")[0] for name, value in shown.attributes if name == "title"}
    assert titles == {*NAMES, *(f"model.layers.{i}.{name}" for i, name in enumerate(NAMES))}


def test_names_of_a_file_are_text_in_the_terminal(write_checkpoint: Callable[..., Path]) -> None:
    ckpt = hostile(write_checkpoint)
    for name in NAMES:
        assert ckpt.format(name).n == 4
    done = CliRunner().invoke(app, ["inspect", str(ckpt.path)])
    assert done.exit_code == 0 and "\x1b" not in done.stdout and r"\x1b[31mred" in done.stdout


def test_the_picture_of_experts_with_two_formats_has_stripes(tmp_path: Path) -> None:
    from qhal_cli.picture import Cell

    cell = Cell("x")
    cell.kinds.update({0: 3, 1: 1})
    assert cell.text == "AB" and cell.style == (
        "background:linear-gradient(90deg,var(--c0) 0.0% 75.0%,var(--c1) 75.0% 100.0%)"
    )
    assert [letter(i) for i in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]


def test_a_picture_is_never_written_into_the_checkpoint() -> None:
    case = folder(CASES[0])
    done = CliRunner().invoke(app, ["inspect", str(case), "--html", str(case / "x.html")])
    assert done.exit_code == 1 and not (case / "x.html").exists()
