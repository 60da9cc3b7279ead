"""The pytest plugin: `-p qhal_conformance.plugin --qhal-backend NAME`, beside one file that imports `suite`.

Loaded by name (in `addopts`, or by `pytest_plugins` of a conftest.py at the root), never by an entry point: that would
load it into the tests of every project beside which qhal is installed.

The verdict is one more test, `verdict`, reported when all cases have ended; under xdist by the process that collects
the workers' results. It passes if the run as a whole passes (`report.verdict`), and every profile that
`--qhal-require` names. A run that left out a case has none: it is skipped, with the number that is missing.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

import qhal
from qhal.errors import QhalError
from qhal.interface import QuantOps
from qhal_conformance import report
from qhal_conformance.cases import PROFILES, Case
from qhal_conformance.operations import catalogue
from qhal_conformance.runner import run_case

VERDICT = "qhal_conformance::verdict"
_ENTRY = "qhal_entry"
_ASKED = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, in a group of their own."""
    group = parser.getgroup("qhal", "conformance of a qhal backend")
    group.addoption("--qhal-backend", metavar="NAME", help="the backend to judge, as qhal.select takes it")
    group.addoption("--qhal-level", type=int, choices=(0, 1), default=0, help="0: a minute on two cores; 1: more")
    group.addoption(
        "--qhal-profile", action="append", default=[], metavar="P", help="only cases of this profile; gives no verdict"
    )
    group.addoption(
        "--qhal-require", action="append", default=[], metavar="P", help="the verdict fails unless this profile passes"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse wrong words before anything is collected, and watch the results."""
    for option in ("qhal_profile", "qhal_require"):
        for profile in config.getoption(option):
            if profile not in PROFILES:
                known = ", ".join(PROFILES)
                raise pytest.UsageError(f"--{option.replace('_', '-')} {profile}: choose one of {known}")
    config.pluginmanager.register(Watcher(config), "qhal-verdict")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case of the level, in the order of the catalogue."""
    if "qhal_case" in metafunc.fixturenames:
        _backend(metafunc.config)
        wanted = metafunc.config.getoption("qhal_profile")
        cases = [c for c in catalogue(_level(metafunc.config)) if not wanted or c.profile in wanted]
        metafunc.parametrize("qhal_case", cases, ids=[c.id for c in cases])


@pytest.fixture(scope="session")
def qhal_ops(request: pytest.FixtureRequest) -> QuantOps:
    """The backend's operations, made once in each process. One error ends the run: every case would have it."""
    try:
        return qhal.select(_backend(request.config))
    except QhalError as error:
        reason = f"qhal: {error}"
    request.session.shouldstop = "there is no backend to judge"
    pytest.fail(reason, pytrace=False)


def ask(request: pytest.FixtureRequest, case: Case, ops: QuantOps) -> dict[str, Any]:
    """Run one case; its entry of the report travels with the test's own."""
    entry = report.case_entry(run_case(case, ops), _backend(request.config))
    request.node.stash[_ASKED] = entry
    for name in ("status", "class", "headroom"):
        request.node.user_properties.append((f"qhal {name}", entry[name]))
    return entry


def words(entry: dict[str, Any]) -> str:
    """A failed case for people: what did not hold, where it was worst, how to see it again."""
    kind = f" ({entry['kind']})" if entry["kind"] else ""
    reason = entry["reason"].partition("; worst at ")[0]  # it follows with everything that is known about it
    lines = [f"{entry['status']}{kind}: {reason}"]
    worst = entry["worst"]
    if worst is not None:
        place = ", ".join(str(i) for i in worst["index"])
        lines.append(f"worst at [{place}]: got {worst['got']}, reference {worst['ref']}")
        lines.append(f"  error {worst['error']}, bound {worst['bound']}, class {entry['class'] or '-'}")
    return "\n".join([*lines, entry["repro"]])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hang the case's entry on the report: a worker's reports arrive in the main process with it."""
    made = yield
    if made.when == "call" and _ASKED in item.stash:
        setattr(made, _ENTRY, item.stash[_ASKED])
    return made


class Watcher:
    """Collects the entries of all cases, wherever they ran, and gives the verdict at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.entries: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One test has ended."""
        entry = getattr(report, _ENTRY, None)
        if entry is not None:
            self.entries[entry["id"]] = entry

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """After the last test, where all results are: not in a worker, and not where no case was asked for."""
        result = yield
        if self.entries and not hasattr(self.config, "workerinput"):
            outcome, text = self.judge()
            place = (VERDICT.partition("::")[0], 0, "verdict")
            where: object = text if outcome != "skipped" else (place[0], 0, f"Skipped: {text}")
            made = pytest.TestReport(VERDICT, place, {}, outcome, where, "call")  # type: ignore[arg-type]
            session.testscollected += 1  # or the progress would end above 100 %
            self.config.hook.pytest_runtest_logreport(report=made)
        return result

    def judge(self) -> tuple[str, str]:
        """(passed | failed | skipped, the profiles and why)."""
        level, entries = _level(self.config), list(self.entries.values())
        missing = sum(1 for case in catalogue(level) if case.id not in self.entries)
        if missing:
            return "skipped", f"no verdict: {missing} of {missing + len(entries)} cases of level {level} were not run"
        profiles = report.profiles(entries, level, "")
        verdict = report.verdict(entries, level, "")
        lost = [p for p in self.config.getoption("qhal_require") if profiles.get(p, {}).get("verdict") != "pass"]
        wanted = f", but {', '.join(lost)} is required and not whole" if lost else ""
        lines = [f"verdict of level {level}: {verdict}{wanted}"]
        lines += [f"{name:12} {p['verdict']:10} {p['passed']} of {p['required']}" for name, p in profiles.items()]
        return "passed" if verdict == "pass" and not lost else "failed", "\n".join(lines)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The profiles, whatever the verdict is."""
        if self.entries:
            terminalreporter.section(f"qhal conformance of {_backend(self.config)}")
            terminalreporter.write_line(self.judge()[1])


def _backend(config: pytest.Config) -> str:
    name = config.getoption("qhal_backend")
    if not name:
        raise pytest.Collector.CollectError(
            "--qhal-backend NAME is needed: in the command, or in addopts of pyproject.toml"
        )
    return str(name)


def _level(config: pytest.Config) -> int:
    return int(config.getoption("qhal_level"))
