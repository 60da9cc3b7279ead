"""The whole-model benchmark on the processor: every row runs, near its definition; and what it says without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qhal
from qhal.tensors import QTensor

FOLDER = Path(__file__).parents[3] / "benchmarks"
SIZES = {
    "layers": 2, "hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 96, "context": 48,
    "prompt": 24, "checked": 17, "steps": 1,
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of rows and the one that measures."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from model_rows import measure, rows, shape

    yield rows, measure, shape.Shape(**SIZES, batches=(2,))
    for name in [n for n in sys.modules if n == "model_rows" or n.startswith("model_rows.")]:
        del sys.modules[name]


def test_every_row_runs_near_its_definition(bench: Any) -> None:
    rows, measure, shape = bench
    runner = measure.Runner(qhal.select("cpu_reference"), shape)
    errors = {}
    for row in rows.ROWS:
        found = runner.run(row)
        assert not found.note, (row.name, found.note)
        assert set(found.decode) == {2} and found.prefill > 0 and found.weights > 0 and not found.graph
        errors[row.name] = max(found.error)
    plain = [e for name, e in errors.items() if name.startswith("w/") and "-a" not in name]
    assert max(plain) < 0.02, errors  # bf16 between operations, over two layers
    assert max(e for name, e in errors.items() if "a4" not in name) < 0.1, errors  # and codes that flip
    assert max(errors.values()) < 0.5, errors


def test_a_wrong_weight_shows(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, measure, shape = bench
    ops = qhal.select("cpu_reference")
    right = ops.prepare

    def swapped(w: QTensor, request: Any, **more: Any) -> Any:
        """Reads the two codes of a byte in the wrong order."""
        return right(replace(w, codes=w.codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)), request, **more)

    monkeypatch.setattr(ops, "prepare", swapped)
    row = next(r for r in rows.ROWS if r.name == "w/int4-g128")
    assert min(measure.Runner(ops, shape).run(row).error) > 0.5


def test_a_row_that_breaks_says_so_and_leaves_the_others(bench: Any) -> None:
    rows, measure, shape = bench
    runner = measure.Runner(qhal.select("cpu_reference"), replace(shape, checked=64))
    found = runner.run(rows.BASE)
    assert "65 tokens are checked, 48 are the context" in found.note and not found.decode


def test_the_command_lists_runs_and_writes(tmp_path: Path) -> None:
    script, out = str(FOLDER / "cuda_model.py"), tmp_path / "model.json"
    listed = subprocess.run([sys.executable, script, "--list"], capture_output=True, text=True, check=True).stdout
    names = listed.split()
    assert len(names) == len(set(names)) and "w/int4-g128" in names and "kv/nvfp4/w-int4" in names
    sizes = [x for name, value in SIZES.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, script, "--backend", "cpu_reference", *sizes, "--batches", "1", "--rows", "w/mxfp4"]
    done = subprocess.run([*command, "--json", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["row"] for row in report["rows"]] == ["w/bf16-torch", "w/mxfp4"]
    assert report == json.loads(out.read_text()) and report["shape"]["layers"] == 2
    assert "NOT the model of 7 billion parameters" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_run() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "cuda_model.py")], capture_output=True, text=True)
    assert done.returncode == 0 and "no NVIDIA GPU here" in done.stderr
