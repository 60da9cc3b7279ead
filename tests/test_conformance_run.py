"""A whole run through the command line: reports that hold together, edits that are seen, backends that misbehave."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import qhal
from qhal.requests import Support
from qhal_conformance import report
from qhal_conformance.commands import app
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import run_case
from qhal_conformance.verify import verify
from qhal_conformance.wrapping import Wrapped

cli = CliRunner()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Level 0 of the reference, run once."""
    out = tmp_path_factory.mktemp("report")
    result = cli.invoke(app, ["run", "--backend", "cpu_reference", "--level", "0", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out, json.loads((out / "report.json").read_text())


def test_the_reference_passes_level_zero(whole: tuple[Path, dict[str, Any]]) -> None:
    out, found = whole
    assert found["verdict"] == "pass"
    assert {p["verdict"] for p in found["profiles"].values()} == {"pass"}
    assert found["counts"]["pass"] == len(catalogue(0)) and found["counts"]["fail"] == found["counts"]["error"] == 0
    assert found["device"]["arch"] and found["backend"]["distribution"] == "qhal-cpu-reference"
    assert "| gemm | exact |" in (out / "report.md").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["junit.xml", "report.html", "report.json", "report.md"]


def test_verify_accepts_it(whole: tuple[Path, dict[str, Any]]) -> None:
    out, found = whole
    assert verify(found) == []
    assert cli.invoke(app, ["verify", str(out / "report.json")]).exit_code == 0


def _pass_more(r: dict[str, Any]) -> None:
    r["counts"]["pass"] += 1


def _hide_a_case(r: dict[str, Any]) -> None:
    del r["cases"][5]


def _raise_the_bound(r: dict[str, Any]) -> None:
    next(c for c in r["cases"] if c["worst"] and c["worst"]["error"])["worst"]["error"] *= 0.5


def _other_list(r: dict[str, Any]) -> None:
    r["suite"]["mustpass"] = "0" * 64


def _failure_called_pass(r: dict[str, Any]) -> None:
    r["cases"][0].update(headroom=1.5)


def _not_required(r: dict[str, Any]) -> None:
    next(c for c in r["cases"] if c["required"])["required"] = False


def _unknown_case(r: dict[str, Any]) -> None:
    r["cases"][0]["id"] = "gemm/x/y"


@pytest.mark.parametrize(
    "edit",
    [_pass_more, _hide_a_case, _raise_the_bound, _other_list, _failure_called_pass, _not_required, _unknown_case],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_verify_sees_edits(
    whole: tuple[Path, dict[str, Any]], edit: Callable[[dict[str, Any]], None], sealed: bool, tmp_path: Path
) -> None:
    """Also when the digest was made again after the edit."""
    changed = copy.deepcopy(whole[1])
    edit(changed)
    if sealed:
        changed["digest"] = report.digest(changed)
    assert verify(changed) != []
    path = tmp_path / "report.json"
    path.write_text(json.dumps(changed))
    assert cli.invoke(app, ["verify", str(path)]).exit_code == 1


def test_verify_names_both_versions(whole: tuple[Path, dict[str, Any]]) -> None:
    changed = {**whole[1], "suite": {**whole[1]["suite"], "version": "9.9"}}
    (complaint,) = verify(changed)
    assert "9.9" in complaint and qhal_suite_version() in complaint
    assert "schema" in verify({"schema": 0})[0] and verify([]) == ["a report is a JSON object"]


def qhal_suite_version() -> str:
    from qhal_conformance import SUITE_VERSION

    return SUITE_VERSION


def test_a_filtered_run_has_no_verdict() -> None:
    result = cli.invoke(app, ["run", "--filter", "hadamard/sylvester64", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["verdict"] == "none" and verify(found) == []
    assert {p["verdict"] for p in found["profiles"].values()} == {"none"}
    shown = cli.invoke(app, ["run", "--filter", "hadamard/sylvester64"])
    assert "no verdict" in shown.output and "level 0, L3 device: pass" not in shown.output


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["run", "--filter", "no such case"], 2),
        (["run", "--backend", "no_such_backend"], 2),
        (["run", "--level", "7"], 2),
        (["show", "gemm/nothing"], 2),
        (["verify", "/no/such/report.json"], 2),
        (["list", "--filter", "onehot", "--json"], 0),
        (["show", "quantize/int8.row*fp32/m515_k96/fp32/normal/0"], 0),
        (["repro", "quantize/int8.row*fp32/m515_k96/fp32/normal/3", "--json"], 0),
        (["support", "--json"], 0),
        (["mutants", "--filter", "no such mutant"], 2),
        (["mutants", "--filter", "nibble", "--json"], 0),
    ],
)
def test_exit_codes(arguments: list[str], code: int) -> None:
    result = cli.invoke(app, arguments)
    assert result.exit_code == code, result.output
    if "--json" in arguments and code == 0:
        json.loads(result.stdout)


def test_support_matrix_names_what_runs() -> None:
    rows = json.loads(cli.invoke(app, ["support", "--json"]).stdout)
    row = next(r for r in rows if r["operation"] == "gemm" and r["subject"] == "int4.g32*bf16")
    assert row["level"] == "full" and row["class"] in ("exact", "fp32-acc", "dequant-16") and row["detail"]


class _Nothing(Wrapped):
    def supports(self, request: Any) -> Support:
        return Support("not_implemented", "no kernel is connected")


def test_a_backend_that_executes_nothing_never_passes() -> None:
    """Every case is unsupported, and zero executed cases is an error."""
    ops = _Nothing(qhal.select("cpu_reference"))
    records = [run_case(case, ops) for case in catalogue(0) if case.operation in ("gemm", "quantize")][:40]
    assert {r.outcome.status for r in records} == {Status.UNSUPPORTED}, [r.outcome for r in records]
    assert report.build(ops, "nothing", records, 0, "", 0.0)["verdict"] == "error"


class _Misbehaves(Wrapped):
    def gemm(self, x: Any, w: Any, *, input: int = 0, out: Any = None) -> Any:
        raise SystemError("lost the device\nand more")


def test_an_exception_ends_one_case_and_not_the_run() -> None:
    ops = _Misbehaves(qhal.select("cpu_reference"))
    records = [run_case(case, ops) for case in catalogue(0)[:3]]
    assert [r.outcome.status for r in records] == [Status.ERROR] * 3
    assert "SystemError: lost the device" in records[0].outcome.reason and "\n" not in records[0].outcome.reason


PLANTED = '''
"""A backend outside the tree: the reference, with the scale index of the last block one too small."""
import qhal
from qhal.selection import Available, BackendInfo, Device
from qhal_conformance.faults_weight import WEIGHT_FAULTS

fault = {name: kind for name, _, _, kind in WEIGHT_FAULTS}["scale-last-block"]

def backend():
    device = Device(0, "planted")
    load = lambda device: fault(qhal.select("cpu_reference"))
    return BackendInfo("planted", qhal.INTERFACE_VERSION, 500, lambda: Available((device,)), load, load)
'''


def test_a_planted_wrong_scale_index_fails_the_run(tmp_path: Path) -> None:
    """Registered like any vendor's package: a distribution with an entry point, found by qhal.select."""
    site = tmp_path / "site"
    info = site / "planted_backend-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "planted_backend.py").write_text(PLANTED)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qhal.backends]\nplanted = planted_backend:backend\n")
    code = "from qhal_conformance.commands import app; app()"
    command = [
        sys.executable,
        "-c",
        code,
        "run",
        "--backend",
        "planted",
        "--filter",
        "gemm/int4",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path[1:]]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["backend"]["distribution"] == "planted-backend" and found["backend"]["version"] == "1.0"
    assert found["counts"]["fail"] > 10 and found["profiles"]["weight-int4"]["verdict"] == "none"
    assert {c["kind"] for c in found["cases"] if c["status"] == "fail"} <= {"numeric", "nonfinite"}
