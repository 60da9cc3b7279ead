"""selftest of backends that crash and hang: unusable with one line of why, in time, and the caller lives."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mischief import site
from typer.testing import CliRunner

import qhal
from qhal import Format, LinearFormat
from qhal_cli.app import app
from qhal_conformance import selftest as module
from qhal_conformance.asking import Apart
from qhal_conformance.selftest import Selftest, selftest
from qhal_conformance.wrapping import Wrapped

__all__ = ["site"]
INT8 = Format.parse("int8.row*fp32")
LAYERS = [LinearFormat("layers.0.mlp.down_proj", 128, 256, INT8, None)]
GRACE = 6.0
"""Seconds in which a worker that hangs is ended, on a busy machine."""


def bad(site: Path, word: str, budget: float = 60.0, name: str = "bad") -> Selftest:
    """What selftest finds; it keeps to its time."""
    (site / "mischief.txt").write_text(word)
    start = time.monotonic()
    try:
        found = selftest(name, LAYERS, budget=budget)
    finally:
        (site / "mischief.txt").write_text("")
    assert time.monotonic() - start < budget + GRACE and "\n" not in "".join(found.wrong)
    return found


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the contract's rules, which are the same in every test; three cases."""
    cases_for = module.cases_for
    monkeypatch.setattr(module, "_contract", list)
    monkeypatch.setattr(module, "cases_for", lambda need: cases_for(need)[:3])


def test_a_backend_that_crashes_is_unusable(site: Path) -> None:
    found = bad(site, "segfault")
    assert found.verdict == "unusable" and len(found.wrong) == len(found.records) == 3
    assert "ended by SIGSEGV at" in found.wrong[0]
    assert f"; qhal conformance repro '{found.records[0].case.id}' --backend bad" in found.wrong[0]


def shares(monkeypatch: pytest.MonkeyPatch, share: float, left: float | None = None) -> list[float]:
    """A case may take `share` seconds, and `left` seconds are left after loading, however busy the machine is.

    Gives the shares that selftest asked for.
    """
    asked = []

    def apart(backend: str, until: float, usual: float) -> Apart:
        asked.append(usual)
        made = Apart(backend, until, share)
        made._session.until = until if left is None else time.monotonic() + left
        return made

    monkeypatch.setattr(module, "Apart", apart)
    return asked


def test_a_backend_that_hangs_is_unusable_when_a_third_of_the_time_is_over(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = shares(monkeypatch, 1.5)
    found = bad(site, "hangs", budget=60)
    assert asked == [20.0] and found.verdict == "unusable" and len(found.records) == 3
    assert "timeout after 1.5 s at bad_backends.py" in found.wrong[0]


def test_a_case_that_the_end_of_the_time_cuts_is_no_fault(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had less than its third."""
    shares(monkeypatch, 20, left=3)
    found = bad(site, "hangs", budget=60)
    assert found.verdict == "unproven" and not found.records and "not reached in 60 s: 3 of 3" in found.uncovered[0]


@pytest.mark.parametrize(
    ("word", "name", "budget", "line"),
    [
        ("supports-hangs", "bad", 60, "asked what it supports: timeout after 1.5 s at bad_backends.py"),
        ("supports-exits", "bad", 60, "asked what it supports: the process of the backend ended with exit code 2"),
        ("supports-raises", "bad", 60, "supports must never raise; it raised RuntimeError: never asked"),
        (
            "",
            "load_crash",
            60,
            "'load_crash' cannot be loaded: the process of the backend was ended by SIGSEGV",
        ),
        ("", "load_hang", 4, "backend 'load_hang' cannot be loaded: timeout after "),
    ],
)
def test_what_goes_wrong_before_the_first_case(
    site: Path, word: str, name: str, budget: float, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if word == "supports-hangs":
        shares(monkeypatch, 1.5)
    found = bad(site, word, budget, name)
    assert found.verdict == "unusable" and line in found.wrong[0] and not found.records


def test_a_backend_that_does_not_start_again_is_said_once(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qhal_conformance.isolated.CRASHES", 1)
    found = bad(site, "os-exit")
    assert len(found.records) == 1 and len(found.wrong) == 2 and found.unreached and not found.uncovered
    assert found.wrong[1].startswith("not run: the backend ended its process in 1 cases in a row")


def test_an_object_is_made_again_by_its_name(site: Path) -> None:
    """What select gave is; anything else is refused, and asked in this process if the caller wants that."""
    ops = qhal.select("cpu_reference")
    assert selftest(ops, LAYERS).verdict == "usable"
    with pytest.raises(qhal.BackendError, match="no installed backend has that name"):
        selftest(Wrapped(ops), LAYERS)
    posing = type("Posing", (Wrapped,), {"name": "cpu_reference"})(ops)
    with pytest.raises(qhal.BackendError, match="there it is a qhal_cpu_reference"):
        selftest(posing, LAYERS)
    assert selftest(posing, LAYERS, in_process=True).verdict == "usable"


def test_the_command_lives(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qhal_conformance.isolated.CRASHES", 1)
    (site / "mischief.txt").write_text("segfault")
    done = CliRunner().invoke(app, ["selftest", "-b", "bad"])
    (site / "mischief.txt").write_text("")
    assert done.exit_code == 1 and "SIGSEGV" in done.stdout and "bad: unusable" in done.stdout
