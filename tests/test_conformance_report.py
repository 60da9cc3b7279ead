"""Reports are believed where they hold together: schema, derived fields, random edits, and what is drawn from them."""

from __future__ import annotations

import copy
import json
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_cases import JUNK, Report, at, chosen, leaves, other, put, sealed, sound, spoiled
from typer.testing import CliRunner

import qhal
from qhal.requests import Request, Support
from qhal.selection import Available, Device
from qhal_conformance import provenance, report, schema, support
from qhal_conformance.commands import app
from qhal_conformance.outcome import FailKind, Status
from qhal_conformance.runner import run_cases
from qhal_conformance.table import markdown
from qhal_conformance.verify import verify
from qhal_conformance.wrapping import Wrapped

cli = CliRunner()


@pytest.fixture(scope="module")
def good() -> Report:
    return sound()


@pytest.fixture(scope="module")
def bad() -> Report:
    return spoiled()


def test_both_reports_hold(good: Report, bad: Report) -> None:
    assert verify(good, inputs=True) == [] and verify(bad) == []
    assert good["counts"]["pass"] == len(good["cases"]) > 30
    assert all(bad["counts"][status] for status in ("pass", "fail", "error", "unsupported")), bad["counts"]


# ---- schema


def test_the_schema_is_one_and_says_what_the_code_says(good: Report, bad: Report) -> None:
    found = schema.schema()
    jsonschema.Draft202012Validator.check_schema(found)
    for each in (good, bad):
        jsonschema.validate(json.loads(json.dumps(each)), found)
        assert schema.faults(each) == []
    case = found["$defs"]["case"]["properties"]
    assert found["properties"]["schema"]["const"] == report.SCHEMA
    assert case["status"]["enum"] == [status.value for status in Status]
    assert case["kind"]["enum"] == [*(kind.value for kind in FailKind), None]
    assert found["properties"]["support"]["items"]["properties"]["level"]["enum"] == list(support.LEVELS)
    assert found["properties"]["device"]["properties"]["evidence"]["enum"] == list(provenance.EVIDENCE.values())


def test_the_schema_uses_only_what_the_check_knows() -> None:
    known = {"$schema", "$id", "$ref", "$defs", "title", "description", "type", "enum", "const", "anyOf", "pattern"}
    known |= {"required", "additionalProperties", "properties", "items", "minItems", "maxItems", "minLength", "minimum"}

    def keywords(rule: Any, names: bool = False) -> Iterator[str]:
        for key, value in rule.items() if isinstance(rule, dict) else ():
            if not names:
                yield key
            for item in value if isinstance(value, list) else [value]:
                yield from keywords(item, not names and key in ("properties", "$defs"))

    assert set(keywords(schema.schema())) <= known


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_check_agrees_with_jsonschema(bad: Report, data: st.DataObject) -> None:
    small = {**bad, "cases": bad["cases"][:2], "support": bad["support"][:1]}
    path = data.draw(st.sampled_from(list(leaves(small))))
    path = path[: data.draw(st.integers(1, len(path)))]
    changed = copy.deepcopy(put(small, path, data.draw(JUNK)))
    if data.draw(st.booleans()):
        at(changed, path[:-1] if isinstance(path[-1], str) else ())["surplus"] = 1
    valid = jsonschema.Draft202012Validator(schema.schema()).is_valid(changed)
    assert (schema.faults(changed) == []) == valid, schema.faults(changed)


@pytest.mark.parametrize(
    "value", [1.0, True, 10**400, "a" * 64 + "\n", float("inf"), [], "\N{ARABIC-INDIC DIGIT ONE}" * 64]
)
def test_what_looks_right_and_is_not(good: Report, value: Any) -> None:
    assert schema.faults({**good, "level": value}) and schema.faults({**good, "seconds": str(value)})
    assert schema.faults({**good, "digest": value}) and verify({**good, "counts": value}) != []


# ---- edits


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edit_is_seen(bad: Report, data: st.DataObject) -> None:
    """Values changed, removed, added, moved: nothing but whitespace and the order of keys is free."""
    changed = copy.deepcopy(bad)
    path = data.draw(st.sampled_from(list(leaves(bad))))
    path = path[: data.draw(st.integers(1, len(path)))]
    holder, key = at(changed, path[:-1]), path[-1]
    match data.draw(st.sampled_from(["other", "junk", "remove", "surplus", "swap"])):
        case "other":
            holder[key] = other(holder[key])
        case "junk":
            holder[key] = data.draw(JUNK)
        case "remove":
            del holder[key]
        case "surplus":
            holder.insert(key, holder[key]) if isinstance(holder, list) else holder.update(surplus=holder[key])
        case "swap":
            one, two = data.draw(st.permutations(range(len(bad["cases"]))))[:2]
            changed["cases"][one], changed["cases"][two] = changed["cases"][two], changed["cases"][one]
    same = json.dumps(changed, sort_keys=True) == json.dumps(bad, sort_keys=True)
    assert (verify(changed) == []) == same


def test_whitespace_and_order_are_free(bad: Report, tmp_path: Path) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(item) for key, item in reversed(value.items())}
        return [turned(item) for item in value] if isinstance(value, list) else value

    path = tmp_path / "report.json"
    path.write_text(json.dumps(turned(bad), indent=7, ensure_ascii=True))
    assert cli.invoke(app, ["verify", str(path)]).exit_code == 0


OBSERVED = [
    *("date", "seconds", r"suite\.(commit|dirty)", r"backend\.(name|interface\.\d|distribution|version|files\..*)"),
    *(r"device\.(type|memory|count|facts\..*)", r"environment\..*", r"support\.\d+\.(level|class|detail)"),
    *(r"cases\.\d+\.(reason|rms|bias|n|seconds|notes\.\d+|worst\.index\.\d+|input_sha|class|kind)",),
    r"cases\.\d+\.histogram\.\d+",  # within what n and headroom leave open
]
"""What was seen once and follows from nothing; `docs/conformance.md` says so. input_sha: without --inputs."""


def test_what_follows_from_something_is_computed_again(good: Report, bad: Report) -> None:
    """Each field changed on its own, and the digest made again: seen, or one that only the device could tell."""
    unseen = set()
    for found in (good, bad):
        kinds = {(case["status"], case["histogram"] is None): i for i, case in enumerate(found["cases"])}
        for path in leaves(found):
            chosen_one = path[1] in (*kinds.values(), 0) if path[0] in ("cases", "support") else found is bad
            if not chosen_one or path == ("digest",):
                continue
            if verify(sealed(put(found, path, other(at(found, path))))) == []:
                unseen.add(".".join(str(key) for key in path))
    wrong = [path for path in unseen if not any(re.fullmatch(pattern, path) for pattern in OBSERVED)]
    assert not wrong, wrong


def _pass_everything(r: Report) -> None:
    for case in r["cases"]:
        case.update(status="pass", kind=None)


def _lower_the_worst(r: Report) -> None:
    case = next(c for c in r["cases"] if c["status"] == "fail")
    case.update(status="pass", kind=None, headroom=0.5)
    case["worst"].update(error=case["worst"]["bound"] / 2)


def _another_class(r: Report) -> None:
    next(c for c in r["cases"] if c["status"] == "pass" and c["id"].startswith("quant_kv"))["class"] = "dequant-16"


def _another_command(r: Report) -> None:
    r["cases"][0]["repro"] = "rm -rf ~"


def _claimed_and_refused(r: Report) -> None:
    case = next(c for c in r["cases"] if c["status"] == "unsupported")
    operation, subject = case["id"].split("/")[:2]
    next(s for s in r["support"] if (s["operation"], s["subject"]) == (operation, subject))["level"] = "full"


def _stronger_evidence(r: Report) -> None:
    r["evidence"]["attention"] = {"x86_64": "L3 device"}
    r["device"]["evidence"] = "L2 emulated"


@pytest.mark.parametrize(
    "edit",
    [_pass_everything, _lower_the_worst, _another_class, _another_command, _claimed_and_refused, _stronger_evidence],
)
def test_an_edit_with_its_traces_removed(bad: Report, edit: Callable[[Report], None]) -> None:
    """Also counts and profiles made again: the cases themselves do not fit."""
    changed = copy.deepcopy(bad)
    edit(changed)
    changed["counts"] = report.counts(changed["cases"])
    changed["profiles"] = report.profiles(changed["cases"], 0, changed["filter"])
    changed["verdict"] = report.verdict(changed["cases"], 0, changed["filter"])
    assert verify(sealed(changed)) != []


def test_other_inputs_are_seen_when_asked(good: Report) -> None:
    changed = sealed(put(good, ("cases", 0, "input_sha"), "0" * 64))
    assert verify(changed) == []
    assert any("other inputs" in text for text in verify(changed, inputs=True))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"verdict": "pass", "verdict": "fail"}', "stands twice"),
        ('{"seconds": NaN}', "no JSON"),
        ("[" * 100_000, "nested too deep"),
        ("\udcff", "cannot read"),
        ("", "cannot read"),
        (f'{{"schema": {"9" * 5000}}}', "cannot read"),
    ],
)
def test_what_is_no_report(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for command in (["verify", str(path)], ["render", str(path), "--md", "x"], ["diff", str(path), str(path)]):
        done = cli.invoke(app, command)
        assert done.exit_code == 2 and says in done.output and "Traceback" not in done.output


# ---- where it comes from


def test_evidence_is_by_operation_and_architecture(bad: Report) -> None:
    arch = bad["device"]["arch"]
    assert bad["evidence"]["gemm"] == {arch: "L3 device"}
    assert bad["evidence"]["attention"] == {arch: "not run"}  # every case of it raised


def test_an_emulator_never_counts_as_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = qhal.select("cpu_reference")
    emulated = Available((Device(0, "chip9", facts={"emulator": "1.2"}, evidence="L2"),))
    monkeypatch.setattr(provenance, "probe", lambda info: emulated)
    found = report.build(ops, "cpu_reference", run_cases(ops, chosen("hadamard/sylvester64")), 0, "x", 1.0)
    assert found["evidence"] == {"hadamard": {"chip9": "L2 emulated"}} and "L2 emulated" in markdown(found)
    assert provenance.device(ops, "no_such_backend")["evidence"] == "L2 emulated"  # no probe found it


@pytest.mark.parametrize(
    ("arch", "level"), [("chip9", "L2 emulated"), ("cpu", "L2 emulated"), (f"{platform.machine()} wide", "L3 device")]
)
def test_a_processor_is_no_accelerator_whatever_a_probe_says(
    arch: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vendor's code that a switch sends to the processor, with a probe that forgot to say so."""
    monkeypatch.setattr(provenance, "probe", lambda info: Available((Device(0, arch, evidence="L3"),)))
    assert provenance.device(qhal.select("cpu_reference"), "cpu_reference")["evidence"] == level


def test_the_backend_is_known_by_its_files(good: Report) -> None:
    files = good["backend"]["files"]
    assert "qhal_cpu_reference/__init__.py" in files and not any("__pycache__" in name for name in files)
    assert provenance.files_sha("no_such_module_anywhere") == {}
    assert provenance.files_sha("cli_that_is_one_file") == {} and len(provenance.files_sha("typing")) == 1
    assert re.fullmatch("[0-9a-f]{40}", good["suite"]["commit"] or "0" * 40)


def test_auto_is_written_as_the_backend_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QHAL_BACKEND", "")
    ops = qhal.select("cpu_reference")
    assert provenance.resolved(ops, "auto") == "cpu_reference"
    assert provenance.resolved(ops, "cpu_reference:0") == "cpu_reference:0"


def test_claims_of_a_backend_that_cannot_answer() -> None:
    class Raises(Wrapped):
        def supports(self, request: Request) -> Support:
            raise KeyError("what?")

    (row,) = support.rows(Raises(qhal.select("cpu_reference")), chosen("hadamard/sylvester64"))
    assert row["level"] == "broken" and "KeyError" in row["detail"]
