"""The conformance page in a real browser, at phone and desktop width: `make test-browser`.

Not named test_*.py: it needs Chromium, which `make test` does not. Reports are made by real runs of level 0, of the
reference and of one that fails in every way: a planted fault, exceptions, refusals, and texts that try to be markup.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.chromium import Browser

import qhal
from qhal.interface import QuantOps
from qhal.requests import AttentionRequest, Request, Support
from qhal_conformance import page, rendering, report
from qhal_conformance.faults_weight import WEIGHT_FAULTS
from qhal_conformance.operations import catalogue
from qhal_conformance.runner import run_cases
from qhal_conformance.verify import verify
from qhal_conformance.wrapping import Wrapped

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "build/browser"
WIDTHS = {"phone": 390, "desktop": 1280}
HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> ' \" & \x1b[31m"
_FAULT = {name: make for name, _, _, make in WEIGHT_FAULTS}["scale-last-block"]

CONTRAST = """
(() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = (c) => { const f = c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
  const behind = (e) => { for (let at = e; at; at = at.parentElement) {
    const c = parse(getComputedStyle(at).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const bad = [];
  let seen = 0;
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["SCRIPT", "OPTION"].includes(e.tagName) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const a = light(parse(e.closest("svg") ? style.fill : style.color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (ratio < 4.5) bad.push([e.tagName, e.className.baseVal ?? e.className, e.textContent.slice(0, 40), ratio]);
  }
  return {seen, bad: bad.slice(0, 10)};
})()
"""
BARS = """
[...document.querySelectorAll(".bar")].filter((e) => e.getClientRects().length).map((e) => [
  e.dataset.value, e.getBoundingClientRect().width / e.parentElement.getBoundingClientRect().width,
  getComputedStyle(e).backgroundColor !== getComputedStyle(e.parentElement).backgroundColor])
"""
OVERFLOW = """
(() => {
  const width = document.documentElement.clientWidth;
  const outside = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".wide, svg")
    && e.getClientRects().length && e.getBoundingClientRect().right > width + 0.5);
  const cut = [...document.querySelectorAll("svg text")].filter((e) => e.getClientRects().length)
    .filter((e) => e.getBBox().x < 0 || e.getBBox().x + e.getBBox().width > e.ownerSVGElement.viewBox.baseVal.width);
  return {page: document.documentElement.scrollWidth - width,
    outside: [...outside, ...cut].map((e) => e.outerHTML.slice(0, 90))};
})()
"""
OPEN = 'for (const e of [...document.querySelectorAll("#cases > details")].slice(0, {0})) e.open = true'


class Named(Wrapped):
    """Under the reference's name: what a page shows does not depend on how the test made the backend."""

    name = "cpu_reference"


class Failing(Named):
    """Attention that raises, no 4-bit floats; and none of its texts can be trusted."""

    def supports(self, request: Request) -> Support:
        if "e2m1" in str(request):
            return Support("unsupported", HOSTILE)
        return self._inner.supports(request)

    def attention_batch(self, request: AttentionRequest, limits: Any) -> Any:
        raise RuntimeError(HOSTILE)


BACKENDS: dict[str, Callable[[QuantOps], QuantOps]] = {
    "reference": Named,
    "planted": lambda ops: Named(_FAULT(ops)),
    "failing": lambda ops: Failing(_FAULT(ops)),
}


def make(name: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """A whole run of one of BACKENDS, its report and its page."""
    ops = BACKENDS[name](qhal.select("cpu_reference"))
    found = report.build(ops, "cpu_reference", run_cases(ops, catalogue(0)), 0, "", 30.0)
    assert verify(found) == []
    return found, rendering.save(found, folder / name)[2]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = Browser()
    yield found
    found.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Path]]:
    folder = tmp_path_factory.mktemp("reports")
    return {name: make(name, folder) for name in ("reference", "failing")}


Made = dict[str, tuple[dict[str, Any], Path]]


def test_the_two_reports_are_what_they_should_be(made: Made) -> None:
    """Otherwise the rest looks at a page without bars or without failures."""
    good, bad = made["reference"][0], made["failing"][0]
    assert good["verdict"] == "pass" and bad["verdict"] == "fail"
    assert all(bad["counts"][status] > 5 for status in ("pass", "fail", "error", "unsupported")), bad["counts"]


@pytest.mark.parametrize("name", ["reference", "failing"])
@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page(made: Made, browser: Browser, name: str, device: str, dark: bool) -> None:
    found, path = made[name]
    browser.open(path, WIDTHS[device], dark=dark)
    title = f"{name}-{device}-{'dark' if dark else 'light'}"
    browser.picture(PICTURES / f"{title}.png")
    browser.value(OPEN.replace("{0}", "40"))
    assert browser.value(OVERFLOW) == {"page": 0, "outside": []}
    contrast = browser.value(CONTRAST)
    assert contrast["seen"] > 500 and contrast["bad"] == []
    _bars(browser, found)
    browser.value("document.getElementById('cases').scrollIntoView()")
    browser.picture(PICTURES / f"{title}-cases.png")
    assert browser.complaints() == []
    assert browser.value("document.title") == f"cpu_reference: {found['verdict']}"  # no text became a script


def _bars(browser: Browser, found: dict[str, Any]) -> None:
    """Each drawn bar is as long as its number says; every case that has a number has a bar."""
    drawn = browser.value(BARS)
    numbers = [case["headroom"] for case in found["cases"] if case["headroom"] is not None]
    assert len(drawn) == len(numbers) + len(page.bars(found["cases"]))
    for value, share, seen in drawn:
        assert share == pytest.approx(min(float(value), 1.0), abs=0.006) and seen
    tallest = browser.value(
        "[...document.querySelectorAll('details[open] svg path')].map((e) => [e.getBBox().height, e.getBBox().width])"
    )
    shown = [case for case in found["cases"][:40] if case["histogram"] is not None and case["n"]]
    assert len(tallest) >= len(shown) > 10
    for height, width in tallest:
        assert (height, width) == (0, 0) or (height == pytest.approx(page.HEIGHT, abs=0.1) and width >= page.COLUMN - 2)


def test_the_filter(made: Made, browser: Browser) -> None:
    found, path = made["failing"]
    browser.open(path, 1280)

    def visible(query: str, status: str) -> list[str]:
        browser.value(
            f"query.value = {json.dumps(query)}; status.value = {json.dumps(status)};"
            "query.dispatchEvent(new Event('input')); status.dispatchEvent(new Event('change'))"
        )
        shown = browser.value(
            "[...document.querySelectorAll('#cases > details')].filter((e) => e.getClientRects().length)"
            ".map((e) => e.querySelector('summary code').textContent)"
        )
        assert browser.value("shown.textContent") == f"{len(shown)} of {len(found['cases'])}"
        return list(shown)

    ids = [case["id"] for case in found["cases"]]
    assert visible("", "") == ids
    assert visible("ONEHOT int4", "") == [i for i in ids if "onehot" in i and "int4" in i]
    assert visible("", "fail") == [case["id"] for case in found["cases"] if case["status"] == "fail"]
    errors = [case for case in found["cases"] if case["status"] == "error" and "m" in case["id"]]
    assert visible("m", "error") == [case["id"] for case in errors]
    assert visible("no such words", "") == []
    assert browser.complaints() == []


def test_the_commands_can_be_copied(made: Made, browser: Browser) -> None:
    found, path = made["failing"]
    browser.open(path, 1280)
    first = next(case for case in found["cases"] if case["status"] in page.BAD)
    browser.value("document.querySelector('#bad button.copy').click()")
    assert browser.value("getSelection().toString()") == first["repro"]


def test_the_page_is_whole_without_scripts(made: Made, browser: Browser) -> None:
    """The number of cases, the verdict and a failure's command are there; the filter and its buttons are not."""
    found, path = made["failing"]
    browser.open(path, 390, script=False)
    tree = browser.call("DOM.getDocument", depth=1)["root"]["nodeId"]

    def count(selector: str) -> int:
        return len(browser.call("DOM.querySelectorAll", nodeId=tree, selector=selector)["nodeIds"])

    assert count("#cases > details") == len(found["cases"])
    assert count("#filter[hidden]") == 1 and count("button.copy:not([hidden])") == 0
    assert count(".bad .command code") == min(len(page.groups(found["cases"])), 30) > 5  # the page says how many more


def test_a_printed_page_has_the_verdict_and_no_controls(made: Made, browser: Browser) -> None:
    browser.open(made["reference"][1], 800)
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    hidden = "[...document.querySelectorAll('#filter, .copy')].every((e) => !e.getClientRects().length)"
    assert browser.value(hidden) and browser.value("document.querySelector('.verdict').innerText") == "pass"
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
