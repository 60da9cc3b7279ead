"""Cases shared out among workers: the records of one process, in order, whatever happens to a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mischief import site
from typer.testing import CliRunner

import qhal
from qhal_conformance import isolated, workers
from qhal_conformance.commands import app
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import Record, run_case

__all__ = ["site"]

CASES = [case for case in catalogue(0) if case.level == 0][::45]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The worker processes, as they start."""
    found: list[Any] = []

    class Watched(isolated.WorkerProcess):
        def __init__(self) -> None:
            super().__init__()
            found.append(self._process)

    monkeypatch.setattr(isolated, "WorkerProcess", Watched)
    yield found
    assert all(process.poll() is not None for process in found), "a worker still runs"


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_same_records_as_in_process(jobs: int, started: list[Any]) -> None:
    ops, seen = qhal.select("cpu_reference"), []
    about, apart = workers.run_cases("cpu_reference", CASES, jobs=jobs, seen=lambda r: seen.append(r.case.id))
    assert {case.operation for case in CASES} >= {"comm_quant", "gemm"}
    assert sorted(seen) == sorted(case.id for case in CASES) and (jobs > 1 or seen == [case.id for case in CASES])
    assert len(started) == jobs and about["support"]
    for case, record in zip(CASES, apart, strict=True):
        here = run_case(case, ops)
        assert (record.case, record.outcome, record.inputs_sha) == (case, here.outcome, here.inputs_sha)


def test_more_workers_than_cases(started: list[Any]) -> None:
    _, records = workers.run_cases("cpu_reference", CASES[:1], jobs=4)
    assert [r.case for r in records] == CASES[:1]


def test_a_worker_that_ends_takes_no_other_case_with_it(site: Path, started: list[Any]) -> None:
    (site / "mischief.txt").write_text("os-exit")
    _, records = workers.run_cases("bad", [c for c in catalogue(0) if c.operation == "gemm"][:12], jobs=2)
    assert len(records) == 12 and {r.outcome.status for r in records} == {Status.ERROR}
    assert all("ended with exit code 7" in r.outcome.reason for r in records)


def test_an_interrupt_ends_every_worker(started: list[Any]) -> None:
    def seen(record: Record) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.run_cases("cpu_reference", CASES, jobs=2, seen=seen)


def test_wrong_use() -> None:
    asked = CliRunner().invoke(app, ["run", "--jobs", "2", "--in-process"])
    assert asked.exit_code == 2 and "--in-process is one process, --jobs 2 asks for more" in asked.output
    assert CliRunner().invoke(app, ["run", "--jobs", "0"]).exit_code == 2
    lost = CliRunner().invoke(app, ["run", "--jobs", "2", "--backend", "nowhere"])
    assert lost.exit_code == 2 and "nowhere" in lost.output


def test_the_command(tmp_path: Path) -> None:
    command = ["run", "--jobs", "2", "--filter", "gemm/int4.g32", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and (tmp_path / "report.json").is_file()
