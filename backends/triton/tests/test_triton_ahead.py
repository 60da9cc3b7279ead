"""Kernels compiled ahead are found by the calls that they were compiled for; a folder for others is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

import qhal
from qhal_triton import ahead
from qhal_triton.compile import target_of


def process(*arguments: str) -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "ahead_calls.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ahead") / "kernels"
    manifest = process("build", "gfx942", str(made), "-")
    assert (manifest["arch"], manifest["backend"]) == ("gfx942", "ahead")
    taken, left = manifest["requests"]
    assert taken["kernels"] and not taken["note"]
    assert not left["kernels"] and left["note"]
    assert [p.name for p in made.parent.iterdir()] == ["kernels"]
    return made


def test_a_second_process_compiles_nothing(folder: Path, tmp_path: Path) -> None:
    found = process("use", "gfx942", str(folder), str(tmp_path))
    assert found["placed"] >= 2 and found["again"] == 0
    assert found["compiled"] == 0 and found["launches"] >= 10


def test_a_cache_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(taken / "cache"))
    with pytest.raises(qhal.BackendError, match=r"file/cache, which cannot be written .*set TRITON_CACHE_DIR"):
        ahead.require_cache()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "new" / "cache"))
    ahead.require_cache()
    assert list((tmp_path / "new" / "cache").iterdir()) == []


def test_another_chip_is_refused(folder: Path) -> None:
    with pytest.raises(qhal.BackendError, match="was built for arch gfx942, here it is gfx950"):
        ahead.use(folder, target_of("gfx950"))


@pytest.mark.parametrize("name", ["sources", "wheel"])
def test_other_sources_or_another_compiler_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    manifest = json.loads((folder / ahead.MANIFEST).read_text())
    (tmp_path / ahead.MANIFEST).write_text(json.dumps(manifest | {name: "0" * 16}))
    with pytest.raises(qhal.BackendError, match=f"was built for {name} 0000000000000000, here it is"):
        ahead.use(tmp_path, target_of("gfx942"))


def test_a_file_that_changed_or_lies_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / ahead.MANIFEST).read_text())
    name = next(iter(manifest["files"]))
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("something else")
    (tmp_path / ahead.MANIFEST).write_text(json.dumps(manifest | {"files": {name: manifest["files"][name]}}))
    with pytest.raises(qhal.BackendError, match="is not the file that was built"):
        ahead.use(tmp_path, target_of("gfx942"))
    (tmp_path / ahead.MANIFEST).write_text(json.dumps(manifest | {"files": {"../x": manifest["files"][name]}}))
    with pytest.raises(qhal.BackendError, match="is not the file that was built"):
        ahead.use(tmp_path, target_of("gfx942"))


def test_no_manifest_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead.used(target_of("gfx942"))  # nothing is named: nothing happens
    monkeypatch.setenv(ahead.ENVIRONMENT, str(tmp_path))
    with pytest.raises(qhal.BackendError, match="holds no kernels that were built ahead"):
        ahead.used(target_of("gfx942"))


def test_a_folder_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(qhal.BackendError, match="is there already"):
        ahead.build(None, [], tmp_path, lambda request: None)  # type: ignore[arg-type]
