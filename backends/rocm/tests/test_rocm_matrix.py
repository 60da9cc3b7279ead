"""The support matrix says no level that a run did not give."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qhal_conformance.operations import catalogue

SCRIPT = Path(__file__).parents[1] / "matrix.py"
SUBJECT = "int4.g32*bf16"
Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A folder as levels.py leaves it, and a page to write into."""

    def made(bad: list[str], failed: str = "") -> Path:
        cases = [{"id": c.id, "status": "fail" if c.id == failed else "pass"} for c in catalogue(0)]
        (tmp_path / "gfx942").mkdir()
        (tmp_path / "gfx942" / "report.json").write_text(json.dumps({"cases": cases}))
        levels = {"L1 compiles": {"bad": bad}, "L2 interpreted": {"gfx950": {"cases": {}}}}
        (tmp_path / "report.json").write_text(json.dumps({"levels": levels}))
        (tmp_path / "page.md").write_text("before\n<!-- generated: support -->\n<!-- end -->\nafter\n")
        return tmp_path

    return made


def matrix(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(folder), "--page", str(folder / "page.md"), *more]
    return subprocess.run(command, capture_output=True, text=True)


def row(folder: Path) -> list[str]:
    lines = (folder / "page.md").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"| gemm | `{SUBJECT}` |")).strip("| ").split(" | ")[2:]


def test_a_run_that_holds(run: Run) -> None:
    folder = run([])
    assert matrix(folder, "--check").returncode == 1  # the page is still empty
    assert matrix(folder).returncode == 0 and matrix(folder, "--check").returncode == 0
    text = (folder / "page.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "none" not in text
    for cell in row(folder):
        kernel, portable = cell.split("; ")
        assert kernel.startswith("kernel ") and kernel.endswith(": L1 L2") and portable.endswith(": L2")


def test_a_tile_that_does_not_compile_takes_a_level_from_its_family(run: Run) -> None:
    folder = run(["gfx950 gemm.product[int8.row*fp32 x bf16 m=128]: spills 3, 0 allowed"])
    assert matrix(folder).returncode == 0
    old, new = row(folder)
    assert ": L1 L2;" in old and ": L2;" in new
    assert "| quantize |" in (folder / "page.md").read_text()


def test_a_case_that_failed_takes_the_level_of_its_row(run: Run) -> None:
    plain = f"gemm/{SUBJECT}/"
    folder = run([], failed=next(c.id for c in catalogue(0) if c.id.startswith(plain) and "exact" not in c.id))
    assert matrix(folder).returncode == 0
    old, _ = row(folder)
    assert "L1;" in old or old.endswith("none")
