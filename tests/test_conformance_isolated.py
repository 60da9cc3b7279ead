"""Backends that crash, hang, print and spoil: one clear line in the case's record each, and the next case runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mischief import site
from typer.testing import CliRunner

from qhal_conformance import isolated, messages
from qhal_conformance.cases import Case
from qhal_conformance.comm_ranks import START_S
from qhal_conformance.commands import app
from qhal_conformance.isolated import CRASHES, CUT, Session
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import FailKind, Outcome, Status, Worst
from qhal_conformance.runner import Record
from qhal_conformance.worker_process import CLOSED, Lost, Silent

__all__ = ["site"]

CASE = next(case for case in catalogue(0) if case.id.startswith("gemm/bf16/m33_n97"))


@pytest.fixture(scope="module")
def session(site: Path) -> Iterator[Session]:
    with Session("bad", timeout=60) as opened:
        yield opened


def _with(site: Path, session: Session, word: str) -> tuple[Record, Record]:
    """A case with that mischief, and the next without."""
    (site / "mischief.txt").write_text(word)
    spoiled = session.run(CASE)
    (site / "mischief.txt").write_text("")
    return spoiled, session.run(CASE)


@pytest.mark.parametrize(
    ("word", "status", "line"),
    [
        ("raises", Status.ERROR, "in raises: ValueError: no such kernel"),
        ("exit", Status.ERROR, "SystemExit: 3"),
        ("interrupt", Status.ERROR, "in interrupt: KeyboardInterrupt"),
        ("device-raises", Status.ERROR, "OSError: device lost"),
        ("supports-exits", Status.ERROR, "in supports: SystemExit: 2"),
        ("none", FailKind.RETURN, "gemm returned NoneType, must be a Tensor"),
        ("list", FailKind.RETURN, "gemm returned list"),
        ("array", FailKind.RETURN, "gemm returned ndarray"),
        ("prepare-none", FailKind.RETURN, "prepare returned NoneType, must be a Prepared"),
        ("restore-none", FailKind.RETURN, "restore returned NoneType, must be a QTensor or CodebookTensor or Tensor"),
        ("supports-raises", FailKind.CLAIM, "supports must never raise; it raised RuntimeError: never asked"),
        ("supports-none", FailKind.CLAIM, "supports returned NoneType, must be a Support"),
        ("supports-yes", FailKind.CLAIM, "supports returned bool"),
        ("dtype", FailKind.GLOBAL_STATE, "default dtype"),
        ("device", FailKind.GLOBAL_STATE, "default device"),
        ("threads", FailKind.GLOBAL_STATE, "threads"),
        ("grad", FailKind.GLOBAL_STATE, "gradient mode"),
        ("deterministic", FailKind.GLOBAL_STATE, "deterministic algorithms"),
        ("seed", FailKind.GLOBAL_STATE, "random state of torch"),
        ("numpy", FailKind.GLOBAL_STATE, "random state of numpy"),
        ("random", FailKind.GLOBAL_STATE, "random state of Python"),
        ("subnormals", FailKind.GLOBAL_STATE, "flushed subnormals"),
        ("precision", FailKind.GLOBAL_STATE, "float32 matmul precision"),
        ("autocast", FailKind.GLOBAL_STATE, "autocast"),
        ("inference", FailKind.GLOBAL_STATE, "inference mode could not be put back"),
        ("segfault", Status.ERROR, "the process of the backend was ended by SIGSEGV at"),
        ("abort", Status.ERROR, "ended by SIGABRT at bad_backends.py:"),
        ("killed", Status.ERROR, "ended by SIGKILL (out of memory?)"),
        ("os-exit", Status.ERROR, "ended with exit code 7"),
        ("pipes", Status.ERROR, "the backend closed the pipe of the suite"),
    ],
)
def test_one_line_and_the_next_case_runs(
    site: Path, session: Session, word: str, status: Status | FailKind, line: str
) -> None:
    spoiled, after = _with(site, session, word)
    outcome = spoiled.outcome
    assert (outcome.status if isinstance(status, Status) else outcome.kind) == status, outcome
    assert line in outcome.reason and "\n" not in outcome.reason
    assert spoiled.inputs_sha == after.inputs_sha and spoiled.case == CASE
    assert after.outcome.status == Status.PASS, after.outcome


def test_a_pipe_that_closes_before_the_worker_waits_for_it_is_closed_all_the_same() -> None:
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    code = (
        "import os, threading, time; from qhal_conformance.worker import _Pipe; start = threading.Thread.start\n"
        f"threading.Thread.start = lambda thread: (os.close({number}), start(thread))\n"
        f"_Pipe({number}); time.sleep(60)"
    )
    with ours, theirs:
        assert subprocess.run([sys.executable, "-c", code], pass_fds=[number], timeout=60).returncode == CLOSED


def test_what_is_printed_becomes_notes(site: Path, session: Session) -> None:
    spoiled, after = _with(site, session, "prints")
    assert spoiled.outcome.status == Status.PASS and len(spoiled.outcome.notes) == 5
    text = "\n".join(spoiled.outcome.notes)
    assert "printed: hello from the kernel" in text and "printed: \\x1b[2Jloud" in text and "printed: from C" in text
    assert after.outcome.notes == ()


def test_a_closed_stdout_is_opened_again(site: Path, session: Session) -> None:
    closed, after = _with(site, session, "closes")
    assert closed.outcome.status == after.outcome.status == Status.PASS
    assert _with(site, session, "prints")[0].outcome.notes != ()


def test_a_copy_that_was_forked_answers_nothing(site: Path, session: Session) -> None:
    forked, after = _with(site, session, "forks")
    assert forked.outcome.status == after.outcome.status == Status.PASS
    deadline, written = time.monotonic() + 10, ""
    while not written:  # the copy writes its number while the runner goes on
        assert time.monotonic() < deadline, "the copy has not written its number"
        written = (site / "forked.txt").read_text() if (site / "forked.txt").exists() else ""
    process = int(written)
    while _runs(process):
        assert time.monotonic() < deadline, "the copy still runs"
        time.sleep(0.05)


def _runs(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("word", "where"), [("hangs", "bad_backends.py"), ("floods", "bad_backends.py")])
def test_a_hang_ends_after_the_timeout(
    site: Path, session: Session, word: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session.run(CASE).outcome.status == Status.PASS  # a worker that has started
    (site / "mischief.txt").write_text(word)
    monkeypatch.setattr(session, "timeout", 1.5)
    record = session.run(CASE)
    (site / "mischief.txt").write_text("")
    assert record.outcome.status == Status.ERROR and 1.5 <= record.seconds < 10
    assert record.outcome.reason.startswith("timeout after 1.5 s at ") and where in record.outcome.reason
    assert sum(len(note) for note in record.outcome.notes) < 2000


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("load_crash", "backend 'load_crash' cannot be loaded: the process of the backend was ended by SIGSEGV"),
        ("load_exit", "SystemExit: needs a licence"),
        ("load_hang", "timeout after 1 s"),
        ("twice", "two distributions register the backend 'twice'"),
        ("no_such", "no backend named 'no_such'"),
    ],
)
def test_a_backend_that_cannot_be_loaded(site: Path, name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error, exit code 2, nothing on stdout; the command's own process never loads the backend."""
    if name == "load_hang":
        monkeypatch.setattr(isolated, "LOADING", 1.0)
    result = CliRunner().invoke(app, ["run", "--backend", name, "--json", "--timeout", "1"])
    assert result.exit_code == 2 and result.stdout == "" and line in result.stderr and "Traceback" not in result.stderr


def test_a_backend_that_does_not_load_again_is_not_tried_for_every_case(
    site: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site / "mischief.txt").write_text("os-exit")
    first = session.run(CASE)
    (site / "mischief.txt").write_text("")
    with monkeypatch.context() as changed:
        changed.setattr(session, "spec", "load_exit")
        second, third = session.run(CASE), session.run(CASE)
    session.gone = ""
    assert session.run(CASE).outcome.status == Status.PASS
    assert "exit code 7" in first.outcome.reason and third.seconds < 1.0
    assert second.outcome.reason.startswith("not run: after a crash, backend 'load_exit' cannot be loaded")
    assert second.outcome.reason == third.outcome.reason


def test_a_whole_run_of_a_backend_that_crashes_has_a_report(site: Path) -> None:
    """stdout holds the report alone, whatever the backend prints; exit code 1."""
    (site / "mischief.txt").write_text("prints")
    result = CliRunner().invoke(app, ["run", "--backend", "bad", "--filter", "gemm/bf16/m1", "--json"])
    (site / "mischief.txt").write_text("")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["backend"]["distribution"] == "bad-backends"
    assert any(n.startswith("printed: ") for c in found["cases"] for n in c["notes"])


class _Answers(Session):
    """A session whose worker answers as it is told: with the status of a case, hung, or ended."""

    def __init__(self) -> None:
        self.told: Status | type[Lost] = Status.PASS
        self.given: list[float] = []
        super().__init__("nothing")

    def _start(self) -> dict[str, Any]:
        return {}

    def _again(self) -> None:
        if self.gone:
            raise Lost(self.gone)

    def _ask(self, message: dict[str, Any], usual: float) -> dict[str, Any]:
        self.given.append(usual)
        if not isinstance(self.told, Status):
            raise self.told("no answer")
        outcome = Outcome(self.told, reason="so it is", elements=self.told == Status.PASS)
        return {"record": messages.record_to(Record(CASE, outcome, 0.0, ""))}

    def row(self, *told: Status | type[Lost]) -> list[str]:
        """The reasons of cases that end so."""
        found = []
        for self.told in told:
            found.append(self.run(CASE).outcome.reason)
        return found


def test_the_start_of_ranks_is_not_the_time_of_the_first_collective() -> None:
    """Of every worker: a lost one takes its ranks with it."""
    session, case = _Answers(), next(c for c in catalogue(0) if c.operation == "comm_quant")
    usual = isolated.TIMEOUTS[case.level]
    for session.told in (Silent, Status.PASS, Status.PASS, Silent, Status.PASS):
        session.run(case)
    session.run(CASE)
    first = usual + START_S
    assert session.given == [first, first, usual, usual, first, isolated.TIMEOUTS[CASE.level]]


def test_after_three_hangs_in_a_row_nothing_more_is_run() -> None:
    """An answer of the device between them starts the count again; a refusal asks no device."""
    session = _Answers()
    session.row(Silent, Silent, Status.PASS, Silent, Status.ERROR, Silent, Silent)
    assert not session.gone
    assert session.row(Status.UNSUPPORTED, Lost, Silent)[-1] == "no answer"
    assert session.gone == "not run: the backend hung in 3 cases in a row (" + ", ".join([CASE.id] * 3) + ")"
    assert session.row(Status.PASS, Silent) == [session.gone] * 2


def test_after_thirty_crashes_in_a_row_nothing_more_is_run() -> None:
    session = _Answers()
    session.row(*[Lost] * (CRASHES - 1), Status.ERROR, *[Lost] * (CRASHES - 1))
    assert not session.gone
    session.row(Lost)
    assert (
        session.gone == f"not run: the backend ended its process in {CRASHES} cases in a row ({CASE.id} to {CASE.id})"
    )


def test_a_backend_that_hangs_in_every_case_ends_the_run_soon(site: Path) -> None:
    """One line for every case that was left; the verdict is fail."""
    (site / "mischief.txt").write_text("hangs")
    start = time.monotonic()
    arguments = ["run", "--backend", "bad", "--filter", "gemm/int8", "--json", "--timeout", "0.7"]
    result = CliRunner().invoke(app, arguments)
    (site / "mischief.txt").write_text("")
    cases = json.loads(result.stdout)["cases"]
    rest = [c["reason"] for c in cases if not c["reason"].startswith("timeout after 0.7 s")]
    assert result.exit_code == 1 and len(cases) - len(rest) == 3 and time.monotonic() - start < 120
    assert len(rest) > 20 and len(set(rest)) == 1 and rest[0].startswith("not run: the backend hung in 3 cases")
    assert all(c["status"] == "error" for c in cases) and cases[0]["id"] in rest[0]


def test_the_end_of_the_time_skips_a_case_and_blames_nobody(site: Path) -> None:
    (site / "mischief.txt").write_text("hangs")
    with Session("bad") as short:
        short.until = time.monotonic() + 0.5
        record = short.run(CASE)
        again = short.run(CASE)
    (site / "mischief.txt").write_text("")
    assert (record.outcome.status, record.outcome.reason) == (Status.SKIP, CUT) == (
        again.outcome.status, again.outcome.reason
    )  # fmt: skip
    assert not short.gone and again.seconds < 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process(site: Path, number: signal.Signals) -> None:
    (site / "mischief.txt").write_text("")
    code = f"import sys; sys.path[:] = {sys.path!r}; from qhal_conformance.isolated import *\n"
    code += "with Session('bad') as s: print(s._worker._process.pid, flush=True); time.sleep(60)"
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert runner.stdout is not None
    worker = int(runner.stdout.readline())
    assert _runs(worker)
    os.kill(runner.pid, number)
    runner.wait(20)
    deadline = time.monotonic() + 10
    while _runs(worker):
        assert time.monotonic() < deadline, "the worker still runs"
        time.sleep(0.05)


FLOATS = st.floats(allow_nan=True, allow_infinity=True)
WORST = st.builds(Worst, st.lists(st.integers(0, 9), max_size=3).map(tuple), FLOATS, FLOATS, FLOATS, FLOATS)


@given(WORST, FLOATS, st.none() | FLOATS, st.lists(st.text()), st.sampled_from(FailKind), st.text(min_size=1))
def test_records_survive_the_pipe(
    worst: Worst, headroom: float, rms: float | None, notes: list[str], kind: FailKind, reason: str
) -> None:
    """Every bit of every float, NaN and Inf included."""
    outcome = Outcome(Status.FAIL, kind, reason, "exact", worst, headroom, rms, None, 3, tuple(notes))
    case = Case("gemm", "x", (("m", 1),), "bf16", "normal", options=("bias",))
    record = Record(case, outcome, 0.1, "sha", 0.05)
    back = messages.record_from(case, messages.decode(messages.encode(messages.record_to(record))))
    assert repr(back) == repr(record)
    assert messages.case_from(messages.decode(messages.encode(messages.case_to(case)))) == case


def test_a_message_is_an_object() -> None:
    with pytest.raises(ValueError, match="object"):
        messages.decode(b"[1]")


def test_ranks_start_with_the_claims_and_leave_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is killed, so it cannot tidy up: its session does."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    case = next(c for c in catalogue(0) if c.profile == "comm")
    with Session("cpu_reference") as session:
        session.claims([case])
        assert list(tmp_path.glob("qhal-worker-*/qhal-ranks-*/rank1.txt"))
        assert session.run(case).outcome.status is Status.PASS
    assert not list(tmp_path.iterdir())
