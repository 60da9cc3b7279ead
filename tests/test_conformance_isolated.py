"""Backends that crash, hang, print and spoil: one clear line in the case's record each, and the next case runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import qhal
from qhal_conformance import isolated, messages
from qhal_conformance.cases import Case
from qhal_conformance.commands import app
from qhal_conformance.isolated import Session
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import FailKind, Outcome, Status, Worst
from qhal_conformance.runner import Record, run_case

CASE = next(case for case in catalogue(0) if case.id.startswith("gemm/bf16/m33_n97"))

BACKENDS = '''
"""One backend whose mischief is read from a file before each gemm; others that cannot be loaded."""
import contextlib, ctypes, os, pathlib, random, signal, sys, time
import numpy, torch, qhal
from qhal.selection import Available, BackendInfo, Device
from qhal_conformance.wrapping import Wrapped

WORD = pathlib.Path(__file__).with_name("mischief.txt")

KEPT = []
def inference(): KEPT.append(torch.inference_mode()); KEPT[-1].__enter__()
def raises(): raise ValueError("no such kernel\\nand a second line")
def interrupt(): raise KeyboardInterrupt
def prints():
    print("hello from the kernel"); print("\\x1b[2Jloud", file=sys.stderr)
    os.write(1, bytes(range(128, 256)) + b"\\n"); ctypes.CDLL(None).puts(b"from C")
def floods():
    while True: os.write(1, b"x" * 65536 + b"\\n")
def closes():
    sys.stdout.close()
    with contextlib.suppress(OSError): os.close(1)
def forks():
    if os.fork() == 0: WORD.with_name("forked.txt").write_text(str(os.getpid()))
def pipes(): os.closerange(3, 64)

MISCHIEF = {
    "raises": raises, "interrupt": interrupt, "prints": prints, "closes": closes, "forks": forks, "pipes": pipes,
    "exit": lambda: sys.exit(3), "os-exit": lambda: os._exit(7), "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort, "killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "hangs": lambda: time.sleep(600),
    "floods": floods, "inference": inference,
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "grad": lambda: torch.set_grad_enabled(False),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "seed": lambda: torch.manual_seed(1), "numpy": lambda: numpy.random.seed(1), "random": lambda: random.seed(1),
    "subnormals": lambda: torch.set_flush_denormal(True),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
}

class Bad(Wrapped):
    name = "bad"
    def gemm(self, x, w, *, input=0, out=None):
        word = WORD.read_text()
        y = self._inner.gemm(x, w, input=input, out=out)
        if word in MISCHIEF: MISCHIEF[word]()
        return {"none": None, "list": [1.0], "array": y.float().numpy()}.get(word, y)
    def supports(self, request):
        word = WORD.read_text()
        if word == "supports-raises": raise RuntimeError("never asked")
        if word == "supports-exits": raise SystemExit(2)
        return {"supports-none": None, "supports-yes": True}.get(word, self._inner.supports(request))
    def prepare(self, w, request, *, inputs=(), operand=None, bias=None, into=None):
        made = self._inner.prepare(w, request, inputs=inputs, operand=operand, bias=bias, into=into)
        return None if WORD.read_text() == "prepare-none" else made
    def restore(self, thing):
        return None if WORD.read_text() == "restore-none" else self._inner.restore(thing)
    @property
    def device(self):
        if WORD.read_text() == "device-raises": raise OSError("device lost")
        return self._inner.device

def _info(name, load):
    devices = Available((Device(0, "test"),))
    return BackendInfo(name, qhal.INTERFACE_VERSION, 500, lambda: devices, load, load)

def bad(): return _info("bad", lambda device: Bad(qhal.select("cpu_reference")))
def load_crash(): return _info("load_crash", lambda device: ctypes.string_at(0))
def load_exit(): return _info("load_exit", lambda device: sys.exit("needs a licence"))
def load_hang(): return _info("load_hang", lambda device: time.sleep(600))
def twice(): return _info("twice", lambda device: Bad(qhal.select("cpu_reference")))
'''
NAMES = ("bad", "load_crash", "load_exit", "load_hang", "twice")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The backends, registered like any vendor's package, and a second package that registers one of them again."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "bad_backends.py").write_text(BACKENDS)
    (folder / "mischief.txt").write_text("")
    for package, names in (("bad-backends", NAMES), ("copied-backends", ("twice",))):
        info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        points = "".join(f"{name} = bad_backends:{name}\n" for name in names)
        (info / "entry_points.txt").write_text(f"[qhal.backends]\n{points}")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


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
    session._gone = ""
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


def test_the_same_records_as_in_process() -> None:
    chosen = [case for case in catalogue(0) if case.level == 0][::60]
    ops = qhal.select("cpu_reference")
    seen: list[str] = []
    apart = isolated.run_cases("cpu_reference", chosen, seen=lambda record: seen.append(record.case.id))
    assert seen == [case.id for case in chosen]
    for case, record in zip(chosen, apart, strict=True):
        here = run_case(case, ops)
        assert (record.case, record.outcome, record.inputs_sha) == (case, here.outcome, here.inputs_sha)


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
