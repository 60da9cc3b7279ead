"""The report as JUnit XML, as CI systems read it: a suite per profile, a test per case, failures with their command."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as Xml

from qhal_conformance import report
from qhal_conformance.outcome import Status


def junit(found: dict[str, Any]) -> str:
    """The XML document. unsupported and skip are `skipped`, an exception of the backend is an `error`."""
    root = Xml.Element("testsuites", name=_text(f"qhal-conformance {found['suite']['version']}"))
    _totals(root, found["cases"])
    for profile, judged in found["profiles"].items():
        cases = [case for case in found["cases"] if case["profile"] == profile]
        if cases:
            root.append(_suite(found, profile, judged["verdict"], cases))
    Xml.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Xml.tostring(root, encoding="unicode") + "\n"


def _suite(found: dict[str, Any], profile: str, verdict: str, cases: list[dict[str, Any]]) -> Xml.Element:
    suite = Xml.Element("testsuite", name=profile, timestamp=_text(found["date"][:19]))
    _totals(suite, cases)
    device = found["device"]
    properties = Xml.SubElement(suite, "properties")
    for name, value in (
        ("backend", found["backend"]["spec"]),
        ("backend.version", f"{found['backend']['distribution']} {found['backend']['version']}"),
        ("device", device["arch"] or device["type"]),
        ("evidence", device["evidence"]),
        ("interface", ".".join(str(n) for n in found["interface"])),
        ("level", found["level"]),
        ("mustpass", found["suite"]["mustpass"]),
        ("profile.verdict", verdict),
        ("digest", found["digest"]),
    ):
        Xml.SubElement(properties, "property", name=name, value=_text(value))
    suite.extend(_case(case, found["backend"]["spec"]) for case in cases)
    return suite


def _totals(element: Xml.Element, cases: list[dict[str, Any]]) -> None:
    count = report.counts(cases)
    element.set("tests", str(len(cases)))
    element.set("failures", str(count["fail"]))
    element.set("errors", str(count["error"]))
    element.set("skipped", str(count["unsupported"] + count["skip"]))
    element.set("time", f"{sum(case['seconds'] for case in cases):.3f}")


def _case(case: dict[str, Any], spec: str) -> Xml.Element:
    operation, _, rest = case["id"].partition("/")
    test = Xml.Element(
        "testcase", classname=_text(f"{case['profile']}.{operation}"), name=_text(rest), time=f"{case['seconds']:.4f}"
    )
    status = case["status"]
    if status in (Status.FAIL.value, Status.ERROR.value):
        tag = "failure" if status == Status.FAIL.value else "error"
        end = Xml.SubElement(test, tag, type=_text(case["kind"] or status), message=_text(case["reason"]))
        end.text = _text(f"{case['reason']}\n{report.repro(case['id'], spec)}")
    elif status != Status.PASS.value:
        Xml.SubElement(test, "skipped", message=_text(f"{status}: {case['reason']}"))
    return test


def _text(value: object) -> str:
    """Text without the characters that XML 1.0 cannot hold (control characters, lone surrogates)."""
    return "".join(c if _legal(ord(c)) else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def _legal(code: int) -> bool:
    return (
        code in (0x9, 0xA, 0xD)
        or 0x20 <= code <= 0xD7FF
        or 0xE000 <= code <= 0xFFFD
        or code >= 0x10000  # the planes above the first
    )
