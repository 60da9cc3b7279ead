"""What is made from a report: the page, Markdown, JUnit, a comparison of two, a sample that is run again."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_cases import HOSTILE, JUNK, ONLY, Report, at, chosen, leaves, put, sealed, sound, spoiled, written
from rich.console import Console
from typer.testing import CliRunner

import qhal
from qhal_conformance import diff, junit, page, rendering, report, rerun, schema
from qhal_conformance.cases import PROFILES
from qhal_conformance.commands import app
from qhal_conformance.runner import run_cases
from qhal_conformance.table import markdown, show

cli = CliRunner()


@pytest.fixture(scope="module")
def good() -> Report:
    return sound()


@pytest.fixture(scope="module")
def bad() -> Report:
    return spoiled()


# ---- what is drawn


class Tags(HTMLParser):
    """Opened and closed tags, attributes that load something, and the text of scripts."""

    VOID = frozenset({"meta", "link", "input", "line", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "action", "poster")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def test_the_page_is_closed_to_everything(bad: Report) -> None:
    text = page.html(bad)
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and tags.loads == ["data:,"] and tags.handlers == [] and len(tags.scripts) == 1
    named = base64.b64encode(hashlib.sha256(tags.scripts[0].encode()).digest()).decode()
    assert f"script-src &#39;sha256-{named}&#39;" in text and "default-src 'none'" in text
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert "http://" not in text and "https://" not in text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_fits_the_schema_can_be_drawn(bad: Report, data: st.DataObject) -> None:
    """Reports come from anywhere: unknown names, strange numbers and hostile texts are shown, or the schema refuses."""
    changed = {**bad, "cases": bad["cases"][:4]}
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from(list(leaves(changed))))
        value = at(changed, path)
        values = st.just(HOSTILE) if isinstance(value, str) else JUNK | st.floats(allow_nan=False) | st.just("inf")
        changed = put(changed, path, data.draw(values | st.just("-inf")))
    if schema.faults(changed):
        return
    tags = Tags()
    tags.feed(page.html(changed))
    assert tags.open == [] and len(tags.scripts) == 1
    ElementTree.fromstring(junit.junit(changed))
    assert "<script>" not in markdown(changed)


@pytest.mark.parametrize("path", [("filter",), ("suite", "version"), ("backend", "name"), ("device", "arch")])
def test_no_text_of_a_report_is_markup(bad: Report, path: tuple[str, ...]) -> None:
    changed = put({**bad, "cases": bad["cases"][:4], "verdict": "none"}, path, "[bold]<script>`|")
    assert "<script>" not in markdown(changed) and "[bold]" not in markdown(changed)
    console = Console(record=True, width=200, force_terminal=True)
    show(changed, console)
    named = path[0] in ("filter", "suite")  # the others are in the Markdown's title only
    assert ("[bold]<script>`|" in console.export_text()) == named


def test_histograms_are_drawn_to_scale() -> None:
    assert page.histogram([0] * 12) == ""
    assert page.histogram([9, *[0] * 10, 99]) == "M1 40v-20.0h8v20.0zM111 40v-40.0h8v40.0z"
    assert page.percent(None) == 0 and page.percent(0.25) == 25 and page.percent("inf") == page.percent("nan") == 100


def test_the_matrix_tells_claims_from_results(good: Report, bad: Report) -> None:
    operations, rows = page.matrix(good)
    cell = dict(rows)[ONLY][operations.index("gemm")]
    assert cell["shown"] == "full" and cell["passed"] == cell["total"] > 15
    operations, rows = page.matrix(bad)
    shown = {(operations[i], subject): cell["shown"] for subject, cells in rows for i, cell in enumerate(cells) if cell}
    assert "fail" in {what for (operation, _), what in shown.items() if operation == "gemm"}
    assert shown["gemm", "int8.row*fp32~int8.tensor*fp32"] == "refused"
    assert shown["attention", "bf16"] == "fail" and shown["quant_kv", "int8.row*fp32"] == "full"
    assert sum(count for _, count in page.groups(bad["cases"])) == bad["counts"]["fail"] + bad["counts"]["error"]


def test_junit_says_what_ci_reads(bad: Report) -> None:
    root = ElementTree.fromstring(junit.junit(bad))
    tests = root.findall("testsuite/testcase")
    assert len(tests) == len(bad["cases"]) == int(root.get("tests", "0"))
    for tag, count in (
        ("failure", bad["counts"]["fail"]),
        ("error", bad["counts"]["error"]),
        ("skipped", bad["counts"]["unsupported"]),
    ):
        assert len(root.findall(f"testsuite/testcase/{tag}")) == count
    assert int(root.get("failures", "0")) == bad["counts"]["fail"]
    failure = root.find("testsuite/testcase/failure")
    assert failure is not None and failure.get("type") == "numeric" and "qhal conformance repro '" in str(failure.text)
    found = {p.get("name"): p.get("value") for p in root.findall("testsuite")[0].findall("properties/property")}
    assert found["evidence"] == "L3 device" and found["digest"] == bad["digest"]
    assert [suite.get("name") for suite in root] == [name for name in sorted(PROFILES) if name in _profiles(bad)]


def _profiles(found: Report) -> set[str]:
    return {case["profile"] for case in found["cases"]}


def test_markdown_cannot_be_broken_by_a_reason(bad: Report) -> None:
    lines = [line for line in markdown(bad).splitlines() if "alert(1)" in line]
    assert lines and all(line.count("|") == 4 and "<script>" not in line and "\x1b" not in line for line in lines)


def test_render_draws_the_files_of_the_run(bad: Report, tmp_path: Path) -> None:
    first = rendering.save(bad, tmp_path / "run")
    assert [path.name for path in first] == ["report.json", "report.md", "report.html", "junit.xml"]
    made = {"--html": tmp_path / "a/p.html", "--md": tmp_path / "m.md", "--junit": tmp_path / "j.xml"}
    options = [str(word) for pair in made.items() for word in pair]
    done = cli.invoke(app, ["render", str(first[0]), *options])
    assert done.exit_code == 0, done.output
    assert [p.read_bytes() for p in made.values()] == [first[i].read_bytes() for i in (2, 1, 3)]
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps({**bad, "verdict": "pass"}))
    assert cli.invoke(app, ["render", str(edited), "--html", str(tmp_path / "no.html")]).exit_code == 2
    assert cli.invoke(app, ["render", str(first[0])]).exit_code == 2
    assert cli.invoke(app, ["render", str(first[0]), "--md", "/proc/no/such.md"]).exit_code == 2
    assert not (tmp_path / "no.html").exists() and not list(tmp_path.rglob("*.part"))


# ---- two reports, and a sample run again


def test_the_same_run_differs_in_nothing(good: Report, tmp_path: Path) -> None:
    ops = qhal.select("cpu_reference")
    again = report.build(ops, "cpu_reference", run_cases(ops, chosen(ONLY)), 0, ONLY, 1.0)
    assert diff.compare(good, again)["same"]
    paths = written(tmp_path, good, again)
    done = cli.invoke(app, ["diff", *paths])
    assert done.exit_code == 0 and "same results" in done.output


def test_diff_names_what_changed(bad: Report, tmp_path: Path) -> None:
    changed = copy.deepcopy(bad)
    failing = next(c for c in changed["cases"] if c["status"] == "fail")
    failing.update(status="error", kind=None, reason=HOSTILE)
    passing = next(c for c in changed["cases"] if c["status"] == "pass" and c["headroom"])
    passing["headroom"] += 0.01
    changed["backend"]["files"] = {**changed["backend"]["files"], "new.py": "0" * 64}
    gone = changed["cases"].pop()
    changed["support"][0]["level"] = "conditional"
    changed["profiles"]["mx"]["verdict"] = "fail"
    changed = sealed(changed)
    found = diff.compare(bad, changed)
    assert not found["same"] and found["only_a"] == [gone["id"]] and found["only_b"] == []
    assert [case["id"] for case in found["cases"]] == [failing["id"]]
    assert found["facts"] == {"backend.files.new.py": [None, "0" * 64]}
    (number,) = found["numbers"]
    assert number["id"] == passing["id"] and number["number"] == "headroom"
    assert diff.compare(bad, changed, within=0.02)["numbers"] == []
    assert found["support"] and found["profiles"] == {"mx": ["none", "fail"]} and found["verdict"] is None
    paths = written(tmp_path, bad, changed)
    done = cli.invoke(app, ["diff", *paths])
    assert done.exit_code == 1 and "1 numbers differ" in done.output and "\x1b[31m" not in done.output
    assert json.loads(cli.invoke(app, ["diff", *paths, "--json"]).stdout) == json.loads(json.dumps(found))


def test_diff_refuses_other_questions(good: Report, bad: Report, tmp_path: Path) -> None:
    assert cli.invoke(app, ["diff", *written(tmp_path, good, bad)]).exit_code == 2
    for path, what in ((("suite", "mustpass"), "list of required cases"), (("suite", "version"), "suite version")):
        value = "9.9" if path[1] == "version" else "0" * 64
        changed = sealed(put(good, path, value))
        assert what in diff.incomparable(good, changed) and value in diff.incomparable(good, changed)
        done = cli.invoke(app, ["diff", *written(tmp_path, good, changed)])
        assert done.exit_code == 2 and value in done.output
    edited = put(good, ("counts", "pass"), 1)
    assert cli.invoke(app, ["diff", *written(tmp_path, good, edited)]).exit_code == 2


def test_a_sample_runs_again(good: Report, bad: Report, tmp_path: Path) -> None:
    ids = [case["id"] for case in rerun.sample(good, 5)]
    assert ids == [case["id"] for case in rerun.sample(copy.deepcopy(good), 5)] and len(set(ids)) == 5
    assert ids != [case["id"] for case in rerun.sample({**good, "digest": "0" * 64}, 5)]
    (path,) = written(tmp_path, good)
    done = cli.invoke(app, ["verify", path, "--rerun", "5", "--backend", "cpu_reference", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["rerun"] == ids, done.output
    (path,) = written(tmp_path, bad)  # the backend that it claims is sound: its failures cannot be repeated
    done = cli.invoke(app, ["verify", path, "--rerun", "999", "--backend", "cpu_reference"])
    assert done.exit_code == 1 and "the report says 'fail'" in done.output
    assert cli.invoke(app, ["verify", path, "--rerun", "5"]).exit_code == 2
    assert cli.invoke(app, ["verify", path, "--backend", "cpu_reference"]).exit_code == 2
