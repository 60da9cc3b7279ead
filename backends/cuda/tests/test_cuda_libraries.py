"""Optional libraries: missing, of another version, broken; the backend goes on with a reason."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from qhal_cuda import libraries


def test_a_missing_library_is_named_with_the_line_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(libraries, "version", nothing)
    assert libraries.usable() == frozenset()
    facts = libraries.facts()
    assert facts["humming-kernels"].startswith("missing; pip install humming-kernels==0.1.19 adds weights")
    assert set(facts) == {x.package for x in libraries.LIBRARIES}


def test_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "version", lambda name: "9.9")
    assert libraries.usable() == frozenset()
    assert "9.9 is not the version that was read" in libraries.facts()["flashinfer-python"]


def test_a_broken_library_is_a_warning_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = {x.package: x.pinned for x in libraries.LIBRARIES}

    def broken(name: str) -> object:
        if name.startswith("humming"):
            raise OSError("libcuda.so.1: cannot open shared object file")
        return sys

    monkeypatch.setattr(libraries, "version", pinned.__getitem__)
    monkeypatch.setattr(libraries, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="goes without humming-kernels 0.1.19: .*OSError: libcuda"):
        assert libraries.usable() == frozenset({"flashinfer"})


def test_the_pins_are_those_of_the_extras() -> None:
    lines = (Path(__file__).parents[1] / "pyproject.toml").read_text().splitlines()
    extras = dict(line.split(" = ", 1) for line in lines if line.startswith(("humming =", "flashinfer =", "cu1")))
    assert set(extras) == {"humming", "flashinfer", "cu12", "cu13"}
    for library in libraries.LIBRARIES:
        assert extras[library.name] == f'["{library.package}=={library.pinned}"]'
        assert all(f"=={library.pinned}" in extras[e] and library.package in extras[e] for e in ("cu12", "cu13"))
