"""Every example runs: a file of examples/ by itself, a folder by its run.py, installed first if it has a pyproject."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DOWNLOADS = {"demo", "kv_quality", "modelslim"}
"""Folders that need the network; `make demo`, `kv-quality` and `modelslim-demo` run them, other tests their parts."""
FOUND = sorted(
    p for p in EXAMPLES.iterdir() if (p.suffix == ".py" or p.is_dir()) and p.name not in {"__pycache__", *DOWNLOADS}
)


@pytest.mark.parametrize("example", FOUND, ids=lambda p: p.name)
def test_an_example_runs_and_its_claims_hold(example: Path, tmp_path: Path) -> None:
    """Examples assert what they say. Each is a process of its own, in another folder, as a reader's would be."""
    script, path = example, os.environ.get("PYTHONPATH", "")
    if example.is_dir():
        script = example / "run.py"
        site = tmp_path / "site"
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
        pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(example)]
        if (example / "pyproject.toml").is_file():
            done = subprocess.run(pip, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
        path = os.pathsep.join([str(site), *filter(None, [path])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("QHAL_BACKEND", None)
    command = [sys.executable, "-W", "error::UserWarning:__main__", str(script)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() and "Traceback" not in done.stderr, done.stderr


def test_examples_are_short_and_say_what_they_are() -> None:
    for file in (p for e in FOUND for p in ([e] if e.is_file() else e.rglob("*.py"))):
        text = file.read_text()
        assert len(text.splitlines()) <= 80, f"{file}: an example is at most 80 lines"
        assert text.startswith('"""'), f"{file}: an example begins with what it shows"
        if file in FOUND or file.name == "run.py":
            assert " assert " in text, f"{file}: an example asserts what it says"


def test_the_list_of_examples_names_each() -> None:
    page = (ROOT / "docs" / "examples.md").read_text()
    assert not [e.name for e in FOUND if f"examples/{e.name}" not in page]
