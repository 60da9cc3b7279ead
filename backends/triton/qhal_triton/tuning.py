"""Sizes of tiles that were measured: tables on disk, read when operations are loaded, never measured while they run.

A table belongs to one fingerprint: the GPU, its driver, the versions of torch and Triton, and the sources of the
kernels. Another of any of these is another table. Ranks that read the same folder choose the same tiles; a plan names
the table (`Table.digest`), so ranks can compare. Without a table a family's first candidate is taken.

The folder is `QHAL_TUNED`, else `qhal/tuned` below `XDG_CACHE_HOME` or `~/.cache`. `qhal tune` writes it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, is_dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import triton

from qhal.errors import QhalError
from qhal.interface import Tuned
from qhal.selection import Device

_SCHEMA = 1
_Config = TypeVar("_Config")


class TuneError(QhalError):
    """A table that cannot be read or written: which file, why, and what to do."""


@dataclass(frozen=True)
class Entry:
    """What was measured for a problem: the fastest tile, and every candidate's microseconds (None: it does not run)."""

    best: tuple[Any, ...]
    measured: tuple[tuple[tuple[Any, ...], float | None], ...] = ()

    def words(self, problem: str) -> Tuned:
        """For people and for `qhal tune`."""
        times = dict(self.measured)
        us = times.get(self.best)
        rejected = tuple((str(config), t) for config, t in self.measured if config != self.best)
        return Tuned(problem, str(self.best), float("nan") if us is None else us, rejected)


@dataclass(frozen=True, eq=False)
class Table:
    """Entries by problem ("gemm int4.g128*bf16 x bf16 n=8192 k=8192 m<=16"); facts: the fingerprint in words."""

    facts: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, Entry] = field(default_factory=dict)

    def pick(self, problem: str, candidates: Sequence[_Config]) -> _Config:
        """The measured tile if it is still a candidate, else the first candidate."""
        found = self.entries.get(problem)
        if found is not None:
            for candidate in candidates:
                if fields(candidate) == found.best:
                    return candidate
        return candidates[0]

    @property
    def digest(self) -> str:
        """Eight digits that name the choices of this table; empty without entries."""
        if not self.entries:
            return ""
        return sha256(repr(sorted((k, e.best) for k, e in self.entries.items())).encode()).hexdigest()[:8]


def fields(config: Any) -> tuple[Any, ...]:
    """A candidate's numbers, as tables hold them."""
    return astuple(config) if is_dataclass(config) and not isinstance(config, type) else tuple(config)


def rows(m: int) -> int:
    """The bucket of a row count: the power of two at or above it, 0 for 0."""
    return 1 << (m - 1).bit_length() if m > 0 else 0


@cache
def sources() -> str:
    """Sixteen digits that name the kernels' sources: another kernel has other best tiles."""
    found = sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        if "kernels" in path.parts or path.name in ("kernels.py", "config.py", "bits.py"):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def fingerprint(device: Device) -> dict[str, str]:
    """What a table belongs to, from what the probe knows of a device; what it does not know is left out."""
    known = {key: device.facts[key] for key in ("driver", "cuda", "hip", "torch") if key in device.facts}
    gpu = device.facts.get("name", device.arch)
    return {"gpu": gpu, **known, "triton": triton.__version__, "kernels": sources()}


def folder() -> Path:
    """Where tables lie."""
    given = os.environ.get("QHAL_TUNED")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qhal" / "tuned"


def path_of(facts: Mapping[str, str]) -> Path:
    """The file of a fingerprint."""
    name = "-".join(facts.get("gpu", "gpu").lower().split())
    return folder() / f"{name}-{sha256(repr(sorted(facts.items())).encode()).hexdigest()[:12]}.json"


def load(facts: Mapping[str, str]) -> Table:
    """The table of this fingerprint; an empty one if nothing was measured. TuneError for a file that is damaged."""
    path = path_of(facts)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return Table(facts)
    except OSError as error:
        raise TuneError(f"{path}: {error.strerror}; make it readable, or set QHAL_TUNED to another folder") from error
    try:
        found = json.loads(text)
        if found["schema"] != _SCHEMA or found["facts"] != dict(facts):
            raise ValueError("it was written for another fingerprint or by another version")
        entries = {name: _entry(value) for name, value in found["entries"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuneError(f"{path} is no table of tiles ({error}); delete it and run `qhal tune` again") from None
    return Table(facts, entries)


def save(facts: Mapping[str, str], entries: Mapping[str, Entry]) -> Path:
    """Adds entries to the file of a fingerprint, whole or not at all. TuneError where it cannot be written."""
    path = path_of(facts)
    merged = {**load(facts).entries, **entries}
    document = {"schema": _SCHEMA, "facts": dict(facts), "entries": {k: _shown(e) for k, e in sorted(merged.items())}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(document, indent=1) + "\n")
        Path(file.name).replace(path)
    except OSError as error:
        raise TuneError(
            f"{path} cannot be written ({error.strerror}); set QHAL_TUNED to a folder that can be"
        ) from error
    return path


def measure(candidates: Sequence[_Config], time: Callable[[_Config], float]) -> Entry:
    """Every candidate's time; a candidate that does not run is kept with None. TuneError if none runs."""
    measured: list[tuple[tuple[Any, ...], float | None]] = []
    reason = ""
    for candidate in candidates:
        try:
            measured.append((fields(candidate), round(time(candidate), 2)))
        except Exception as error:  # too much shared memory, no compiler: another candidate may do
            measured.append((fields(candidate), None))
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    ran = [(us, config) for config, us in measured if us is not None]
    if not ran:
        raise TuneError(f"none of {len(candidates)} candidates runs; the last one: {reason}")
    return Entry(min(ran)[1], tuple(measured))


def _entry(value: dict[str, Any]) -> Entry:
    return Entry(tuple(value["best"]), tuple((tuple(config), us) for config, us in value["measured"]))


def _shown(e: Entry) -> dict[str, Any]:
    return {"best": list(e.best), "measured": [[list(config), us] for config, us in e.measured]}
