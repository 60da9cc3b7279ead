"""Every golden checkpoint is planned on AMD GPUs with none here: nothing is refused, nothing is a downgrade."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import qhal
from qhal.requests import GemmRequest, minimum_class
from qhal_rocm.ops import RocmOps

HERE = Path(__file__).parents[1]
SMALL = HERE.parents[1] / "tests" / "golden"


def script() -> ModuleType:
    spec = spec_from_file_location("plans", HERE / "plans.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLANS = script()
ROOTS = (SMALL, Path(os.environ.get("QHAL_GOLDEN", SMALL)))
CASES = {case: folder for root in ROOTS for case, folder in PLANS.checkpoints(root)}


@pytest.mark.parametrize("case", CASES)
def test_the_table_of_the_page_is_what_would_run(case: str) -> None:
    assert PLANS.row(case, CASES[case]) in (HERE.parents[1] / "docs" / "rocm.md").read_text().splitlines()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", PLANS.ARCHS)
def test_every_checkpoint_is_planned(case: str, arch: str) -> None:
    plan = PLANS.planned(CASES[case], arch)
    assert plan.entries and plan.backend == "rocm"
    assert {entry.status for entry in plan.entries} <= {"ok", "rule"}, plan.explain()
    assert all(entry.support.executes and entry.support.numerics is not None for entry in plan.entries)


@pytest.mark.parametrize(
    ("arch", "kind", "w", "x"),
    [
        ("gfx942", "native fp8", "e4m3fn.row*fp32", "e4m3fn.row*fp32"),
        ("gfx942", "native fp8", "e4m3fnuz.row*fp32", "e4m3fnuz.row*fp32@qmax=224"),
        ("gfx950", "native fp8", "e4m3fn.128x128*fp32", "e4m3fn.g128*fp32"),
        ("gfx950", "in 16 bits", "e4m3fnuz.row*fp32", "e4m3fnuz.row*fp32@qmax=224"),
        ("gfx942", "in 16 bits", "e2m1.g32*e8m0", "e2m1.g32*e8m0"),
        ("gfx942", "native int8", "int8.row*fp32", "int8.row*fp32"),
        ("gfx1100", "in 16 bits", "e4m3fn.row*fp32", "e4m3fn.row*fp32"),
        ("gfx1201", "native fp8", "e4m3fn.row*fp32", "e4m3fn.row*fp32"),
    ],
)
def test_what_a_chip_multiplies(arch: str, kind: str, w: str, x: str) -> None:
    """The other flavour, or MXFP4 where no instruction takes it, is decoded exactly, and the plan says so."""
    request = GemmRequest(w=qhal.Format.parse(w), x=(qhal.Format.parse(x),), n=256, k=256)
    ops = RocmOps(arch, "meta")
    answer = ops.supports(request)
    assert answer and answer.numerics is not None and answer.numerics <= minimum_class(request)
    assert ("fp8 matrix instructions" in answer.executes) == (kind == "native fp8")
    assert ("int32 sums" in answer.executes) == (kind == "native int8")


def test_the_command_plans_offline() -> None:
    folder = CASES["quark/int8_group32"]
    where = ["--backend", "rocm", "--arch", "gfx950", "--json"]
    command = [sys.executable, "-m", "qhal_cli.entry", "plan", str(folder), *where]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["entries"]
