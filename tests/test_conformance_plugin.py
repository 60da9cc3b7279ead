"""The pytest plugin, as a vendor runs it: a test per case, reasons, the worst element, one verdict, xdist."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
PLUGIN = ("-p", "qhal_conformance.plugin", "--qhal-backend", "cpu_reference", "-p", "no:cacheprovider")

# the profiles core and rotation stand for the whole catalogue, so that a whole run takes seconds
SMALL = """
from qhal_conformance import plugin
from qhal_conformance.operations import catalogue

plugin.catalogue = lambda level: tuple(c for c in catalogue(level) if c.profile in ("core", "rotation"))
"""
WRONG = """
import qhal
from qhal_conformance.wrapping import Wrapped

class Wrong(Wrapped):
    def hadamard(self, x, rotation, *, quantize=None, for_=None, out=None):
        y = super().hadamard(x, rotation, quantize=quantize, for_=for_, out=out)
        return y if quantize or not y.numel() or x.shape[-1] != 256 else y.mul_(1.25)

reference = qhal.select("cpu_reference")
qhal.select = lambda spec: Wrong(reference)
"""
NARROW = """
import qhal
from qhal_conformance.wrapping import Wrapped

class Narrow(Wrapped):
    def supports(self, request):
        if isinstance(request, qhal.HadamardRequest):
            return qhal.Support("not_implemented", "no rotations yet")
        return super().supports(request)
    def hadamard(self, x, rotation, *, quantize=None, for_=None, out=None):
        raise qhal.UnsupportedError(qhal.Support("not_implemented", "no rotations yet"))

reference = qhal.select("cpu_reference")
qhal.select = lambda spec: Narrow(reference)
"""


@pytest.fixture
def vendor(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with the vendor's one file, and a short catalogue."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    for name in [n for n in os.environ if n.startswith("PYTEST_XDIST")]:  # this process may be a worker itself
        monkeypatch.delenv(name)
    pytester.makepyfile(test_acme="from qhal_conformance.suite import *  # noqa: F403\n")
    pytester.makeconftest(SMALL)
    return pytester


def run(vendor: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return vendor.runpytest_subprocess(*PLUGIN, *arguments)


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_a_whole_run_has_one_verdict(vendor: pytest.Pytester, workers: tuple[str, ...], tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    result = run(vendor, f"--junitxml={junit}", *workers)
    result.stdout.fnmatch_lines(
        ["verdict of level 0: pass", "core *pass *", "rotation *pass *", "weight-int4 *incomplete*"]
    )
    assert result.ret == 0
    names = [case.get("name", "") for case in ElementTree.parse(junit).iter("testcase")]
    assert names.count("verdict") == 1 and "test_case[contract/supports-is-total/m16_n64_k256/bf16/normal/0]" in names
    properties = {p.get("name") for p in ElementTree.parse(junit).iter("property")}
    assert {"qhal status", "qhal class", "qhal headroom"} <= properties


def test_a_wrong_result_shows_where_and_how_to_see_it_again(vendor: pytest.Pytester) -> None:
    vendor.makeconftest(SMALL + WRONG)
    result = run(vendor, "-n", "2")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "fail (numeric): *",
            "worst at [[]*]: got *, reference *",
            "  error *, bound *, class *",
            "qhal conformance repro 'hadamard/sylvester256/*' --backend cpu_reference",
            "verdict of level 0: fail*",
            "rotation *fail*",
        ]
    )
    assert "Traceback" not in result.stdout.str() and "def test_case" not in result.stdout.str()


def test_what_is_refused_is_skipped_and_costs_the_profile(vendor: pytest.Pytester) -> None:
    vendor.makeconftest(SMALL + NARROW)
    result = run(vendor, "-rs", "--qhal-require", "core")
    assert result.ret == 0  # core is whole, and nothing is wrong
    result.stdout.fnmatch_lines(["verdict of level 0: pass", "rotation *incomplete*"])
    result.stdout.fnmatch_lines(["*unsupported (required by rotation): not_implemented: no rotations yet*"])
    result = run(vendor, "--qhal-require", "rotation")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["verdict of level 0: pass, but rotation is required and not whole"])


@pytest.mark.parametrize("filtered", [("-k", "sylvester64"), ("--qhal-profile", "rotation")], ids=["-k", "profile"])
def test_a_filtered_run_has_no_verdict(vendor: pytest.Pytester, filtered: tuple[str, ...]) -> None:
    result = run(vendor, "-rs", "--qhal-require", "rotation", *filtered)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*no verdict: * cases of level 0 were not run*"])
    assert "verdict of level" not in result.stdout.str()


def test_stopping_early_has_no_verdict(vendor: pytest.Pytester) -> None:
    vendor.makeconftest(SMALL + WRONG)
    result = run(vendor, "-x")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["no verdict: *"])


def test_an_unknown_backend_is_one_error(vendor: pytest.Pytester) -> None:
    result = run(vendor, "--qhal-backend", "acme_of_nowhere")
    result.assert_outcomes(errors=1)
    text = result.stdout.str() + result.stderr.str()
    assert "no backend named 'acme_of_nowhere'" in text and "Traceback" not in text
    assert result.ret == pytest.ExitCode.INTERRUPTED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--qhal-backend", ""), "--qhal-backend NAME is needed"),
        (("--qhal-profile", "kvv"), "--qhal-profile kvv: choose one of core"),
        (("--qhal-require", "kvv"), "--qhal-require kvv: choose one of core"),
    ],
)
def test_wrong_words_are_one_error(pytester: pytest.Pytester, arguments: tuple[str, ...], words: str) -> None:
    pytester.makepyfile(test_acme="from qhal_conformance.suite import *  # noqa: F403\n")
    result = pytester.runpytest_inprocess(*PLUGIN, *arguments)
    text = result.stdout.str() + result.stderr.str()
    assert words in text and "Traceback" not in text and "plugin.py" not in text
    assert result.ret in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED)


def test_other_projects_do_not_see_it(pytester: pytest.Pytester) -> None:
    """No pytest11 entry point: without -p neither the options nor the verdict exist."""
    pytester.makepyfile("def test_one(): pass")
    assert pytester.runpytest_subprocess("--qhal-backend", "x").ret == pytest.ExitCode.USAGE_ERROR
    result = pytester.runpytest_subprocess(*PLUGIN)
    assert result.ret == 0 and "qhal conformance" not in result.stdout.str()
