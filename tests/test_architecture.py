"""The house rules that a reviewer would otherwise have to remember: words, sizes, imports, generated files."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEUTRAL = ("qhal", "schemes", "conformance", "cli")
FORBIDDEN = re.compile(
    r"cuda|\bhip\b|rocm|\bnpu\b|ascend|gfx\d|\bgfx\b|sm_\d|\bsm_|torch_npu|flashinfer|\baiter\b|cupy|humming", re.I
)


def _sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(p for p in (ROOT / folder).rglob("*.py") if "build" not in p.parts and ".venv" not in p.parts)


def test_no_device_word_outside_backends_and_engines() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _sources(*NEUTRAL)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert not found, "\n".join(found)


def test_files_hold_one_idea() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {count} lines"
        for path in _sources(*NEUTRAL, "engines", "backends", "examples", "benchmarks")
        if (count := len(path.read_text().splitlines())) > 400
    ]
    assert not long, "\n".join(long)


def test_no_machine_path_or_session_in_the_tree() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout: nothing tells which files are the project's")
    private = re.compile("/" + r"work/|/" + r"tmp/w\b|\.\./" + "shared/notes")
    found = [
        name
        for name in tracked
        if (ROOT / name).suffix in (".py", ".md", ".toml", ".txt", "") and (ROOT / name).is_file()
        and private.search((ROOT / name).read_text(errors="ignore"))
    ]  # fmt: skip
    assert not found


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import qhal", ("transformers", "rich", "typer", "safetensors", "numpy.testing", "qhal_schemes", "pynvml")),
        ("import qhal; qhal.backends()", ("transformers", "pynvml", "torch_npu", "triton", "qhal_cpu_reference.ops")),
        ("import qhal_schemes", ("transformers", "rich", "typer", "compressed_tensors")),
        ("import qhal_engines", ("transformers",)),
        ("import qhal_conformance", ("transformers", "qhal_schemes", "pytest")),
    ],
)
def test_imports_are_light(statement: str, absent: tuple[str, ...]) -> None:
    check = f"print([m for m in {absent!r} if m in set(sys.modules) - own])"
    script = f"import sys, torch\nown = set(sys.modules)\n{statement}\n{check}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_generated_pages_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_package_is_typed() -> None:
    for package in (*(ROOT / p for p in ("qhal", "schemes/qhal_schemes", "conformance/qhal_conformance")),
                    *(ROOT / p for p in ("engines/qhal_engines", "cli/qhal_cli")),
                    *ROOT.glob("backends/*/qhal_*")):  # fmt: skip
        assert (package / "py.typed").is_file(), package
