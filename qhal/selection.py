"""Finding the accelerator: light backend descriptions from entry points, probes that explain themselves, one choice.

Entry-point group `qhal.backends`: each value is a function that returns a BackendInfo without importing any device
library. Probe errors are shown, never swallowed. Same inputs and environment, same answer, on every rank.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Literal

from qhal.errors import BackendError, InterfaceError, NoBackendError, QhalError
from qhal.interface import INTERFACE_VERSION, QuantOps
from qhal.requests import Request
from qhal.versions import mismatch

GROUP = "qhal.backends"
REPORT = "report this to the backend's authors"
ENVIRONMENT = "QHAL_BACKEND"
REFERENCE = "cpu_reference"
"""The backend that defines the numbers: never preferred by "auto", taken with a word where there is no other."""


@dataclass(frozen=True)
class Device:
    """One device that a probe found.

    facts     library versions and what each adds, for people
    evidence  what a result on it proves: "L3" the device itself, "L2" an emulator or interpreter of it
    """

    index: int
    arch: str
    memory: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)
    evidence: Literal["L2", "L3"] = "L3"


@dataclass(frozen=True)
class Available:
    """The backend can be used on these devices."""

    devices: tuple[Device, ...]


@dataclass(frozen=True)
class Unavailable:
    """The backend cannot be used here. hint: a command or an action that changes it."""

    reason: str
    hint: str


@dataclass(frozen=True)
class BackendInfo:
    """What a backend says about itself before anything heavy is imported.

    order    for "auto": accelerators below 100, a serving CPU backend 100 to 199, the reference 1000
    probe    Available(devices) or Unavailable(reason, hint); touches no device context
    load     the backend on one device
    offline  by architecture name: supports, kv_planes and layouts answer with no device and no library
    archs    the names that offline knows; empty: it takes any
    build    (architecture, requests, new folder, called before each request) -> what was written, for JSON: compiles
             ahead of time what the requests will run, with no device. None: nothing there to compile
    """

    name: str
    interface: tuple[int, int]
    order: int
    probe: Callable[[], Available | Unavailable]
    load: Callable[[Device], QuantOps]
    offline: Callable[[str], QuantOps]
    archs: tuple[str, ...] = ()
    build: Callable[[str, Sequence[Request], Path, Callable[[Request], None]], Mapping[str, object]] | None = None


@dataclass(frozen=True)
class Broken:
    """An entry point that could not be read: the error is part of every listing."""

    name: str
    reason: str
    hint: str


@cache
def backends() -> dict[str, BackendInfo | Broken]:
    """Every installed backend by name, in the order of "auto". Importing none of their libraries."""
    found: dict[str, BackendInfo | Broken] = {}
    for point in entry_points(group=GROUP):
        entry = _read(point)
        if point.name in found:
            entry = Broken(
                point.name, f"two distributions register the backend {point.name!r}", "uninstall one of them"
            )
        found[point.name] = entry
    last = 10_000
    return dict(sorted(found.items(), key=lambda kv: (kv[1].order if isinstance(kv[1], BackendInfo) else last, kv[0])))


def _read(point: EntryPoint) -> BackendInfo | Broken:
    reinstall = f"reinstall or uninstall {point.dist.name if point.dist else point.value}"
    try:
        info = point.load()()
    except Exception as error:
        return Broken(point.name, f"{point.value} failed: {_text(error)}", reinstall)
    if not isinstance(info, BackendInfo) or info.name != point.name:
        return Broken(point.name, f"{point.value} must return a BackendInfo named {point.name!r}", reinstall)
    if not (isinstance(info.interface, tuple) and [type(n) for n in info.interface] == [int, int]):
        return Broken(point.name, f"{point.value}: interface is {info.interface!r}, must be (major, minor)", reinstall)
    return info


def probe(info: BackendInfo | Broken) -> Available | Unavailable:
    """What a backend finds here; whatever goes wrong in its probe becomes its reason."""
    if isinstance(info, Broken):
        return Unavailable(info.reason, info.hint)
    mismatch = _interface_mismatch(info)
    if mismatch:
        return Unavailable(mismatch, f"install a {info.name} backend for this version of qhal")
    try:
        state = info.probe()
    except Exception as error:
        return Unavailable(f"its probe failed: {_text(error)}", REPORT)
    if isinstance(state, Available) and state.devices and all(isinstance(d, Device) for d in state.devices):
        return state
    if isinstance(state, Unavailable):
        return state
    return Unavailable(f"its probe answered {state!r}, which is neither devices nor a reason", REPORT)


def load(info: BackendInfo, device: Device) -> QuantOps:
    """The operations of one device; whatever goes wrong while loading becomes one BackendError."""
    return _made(info, f"{info.name}:{device.index} ({device.arch})", lambda: info.load(device))


def offline(info: BackendInfo, arch: str) -> QuantOps:
    """The operations of an architecture that need no device: supports, kv_planes, layouts."""
    if info.archs and arch not in info.archs:
        raise NoBackendError(f"backend {info.name!r} knows no architecture {arch!r}; it knows {', '.join(info.archs)}")
    return _made(info, f"{info.name} for {arch}", lambda: info.offline(arch))


def _made(info: BackendInfo, what: str, make: Callable[[], QuantOps]) -> QuantOps:
    try:
        ops = make()
    except QhalError:
        raise
    except Exception as error:
        raise BackendError(f"backend {what} cannot be loaded: {_text(error)}\n  do: {REPORT}") from error
    if not isinstance(ops, QuantOps):
        raise InterfaceError(f"backend {what} gave a {type(ops).__name__}, must be a QuantOps")
    if type(ops).interface != info.interface:
        raise InterfaceError(
            f"backend {what} says interface {info.interface} in its BackendInfo and {type(ops).interface} in its "
            "class; state one version in both"
        )
    return ops


def select(spec: str = "auto", *, require: Collection[str] = (), arch: str | None = None) -> QuantOps:
    """The operations of one device.

    spec     "auto", a backend's name, or "name:index"; with "auto" the variable QHAL_BACKEND is used if it is set
    require  names of the interface that the backend must have a body for: "grouped_gemm", "attention", "restore"
    arch     with a backend's name: the offline form for that architecture, which answers `supports` with no device

    "auto" prefers an accelerator that executes something; where there is none it takes the reference, with a warning.
    NoBackendError lists every candidate, its reason and what to do.
    >>> select("cpu_reference").name
    'cpu_reference'
    """
    name, index, asked = wanted(spec)
    _check_required(require)
    if name == "auto":
        if arch is not None:
            raise NoBackendError(f"an architecture ({arch}) needs a backend's name; installed: {', '.join(backends())}")
        return _auto(require)
    info = _installed(name, asked)
    if arch is not None:
        if index is not None:
            raise NoBackendError(f"{asked}: a device's number has no meaning with arch={arch!r}")
        return _having(offline(info, arch), require)
    state = probe(info)
    if isinstance(state, Unavailable):
        raise NoBackendError(
            f"backend {name!r} (asked: {asked}) is not usable here: {state.reason}\n  do: {state.hint}"
        )
    device = next((d for d in state.devices if index is None or d.index == index), None)
    if device is None:
        known = ", ".join(f"{name}:{d.index}" for d in state.devices)
        raise NoBackendError(f"no device {name}:{index} (asked: {asked}); this machine has: {known}")
    return _having(load(info, device), require)


def wanted(spec: str = "auto") -> tuple[str, int | None, str]:
    """(name, device number, what was asked) of a spec; QHAL_BACKEND is read for "auto". NoBackendError if unclear."""
    if not isinstance(spec, str):
        raise NoBackendError(f"a backend is named by a string such as 'auto' or 'name:0', not by {spec!r}")
    text, origin = spec.strip() or "auto", ""
    variable = os.environ.get(ENVIRONMENT, "").strip()
    if text == "auto" and variable:
        text, origin = variable, f" (from {ENVIRONMENT})"
    name, colon, number = text.partition(":")
    if (colon and not (number.isascii() and number.isdecimal())) or (colon and name == "auto"):
        raise NoBackendError(f"{text!r}{origin} is no backend: write auto, a backend's name, or name:0")
    return name, int(number) if colon else None, f"{text}{origin}"


def _installed(name: str, asked: str) -> BackendInfo:
    info = backends().get(name)
    if info is None:
        near = difflib.get_close_matches(name.lower(), backends(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise NoBackendError(f"no backend named {name!r} is installed (asked: {asked}){hint}\n{describe_all()}")
    if isinstance(info, Broken):
        raise BackendError(f"backend {name!r} is broken: {info.reason}; {info.hint}")
    mismatch = _interface_mismatch(info)
    if mismatch:
        raise InterfaceError(f"backend {name!r}: {mismatch}")
    return info


OPERATIONS = ("gemm", "grouped_gemm", "quant_kv", "attention", "hadamard", "vq_decode", "comm_quant")
"""The seven operations of the interface."""
_REFUSING = (*OPERATIONS, "quantize", "prepare", "restore", "attention_batch", "capture")
"""Everything whose body in the interface is a refusal; the rest works, or defines itself, on every backend."""


def operations(ops: QuantOps) -> tuple[str, ...]:
    """The operations that a backend has a body for; which formats and shapes is `supports`' answer."""
    return tuple(name for name in OPERATIONS if getattr(type(ops), name) is not getattr(QuantOps, name))


def _auto(require: Collection[str]) -> QuantOps:
    """The first accelerator that executes something and has what is required, else the reference."""
    passed: list[str] = []
    for info in backends().values():
        state = probe(info)
        if isinstance(info, Broken) or isinstance(state, Unavailable):
            continue
        if state.devices[0].evidence != "L3":
            passed.append(f"{info.name} is emulated here, which only its name selects")
            continue
        try:
            ops = load(info, state.devices[0])
        except BackendError as error:
            passed.append(str(error).splitlines()[0])
            continue
        missing = _missing(ops, require)
        if info.name == REFERENCE and not missing:
            why = "; ".join(passed) or "no accelerator is usable here"
            warnings.warn(
                f"{why}, so {REFERENCE} runs on the processor: right, but slow. See `qhal devices` for each backend",
                stacklevel=3,
            )
            return ops
        if operations(ops) and not missing:
            return ops
        lack = f"lacks {', '.join(missing)}" if missing else "this version executes none of its operations"
        passed.append(f"{info.name} finds {state.devices[0].arch}, but {lack}")
    noted = "".join(f"\n  passed over: {text}" for text in passed)
    raise NoBackendError(f"no backend is usable here{noted}\n{describe_all()}")


def _check_required(require: Collection[str]) -> None:
    if isinstance(require, str):
        raise NoBackendError(f"require={require!r}: give a collection of names, such as [{require!r}]")
    for name in require:
        if name.startswith("_") or not hasattr(QuantOps, name):
            near = difflib.get_close_matches(name, [n for n in dir(QuantOps) if not n.startswith("_")], n=1)
            raise NoBackendError(
                f"require: the interface has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )


def _missing(ops: QuantOps, require: Collection[str]) -> list[str]:
    return [n for n in require if n in _REFUSING and getattr(type(ops), n) is getattr(QuantOps, n)]


def _having(ops: QuantOps, require: Collection[str]) -> QuantOps:
    missing = _missing(ops, require)
    if missing:
        raise NoBackendError(f"backend {ops.name!r} does not implement what is required: {', '.join(missing)}")
    return ops


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _interface_mismatch(info: BackendInfo) -> str:
    """Why the backend's interface version does not fit, or ""."""
    return mismatch(INTERFACE_VERSION, info.interface)


def describe_all() -> str:
    """One line per installed backend: usable, or why not and what to do."""
    lines = []
    for name, info in backends().items():
        state = probe(info)
        if isinstance(state, Available):
            lines.append(f"  {name}: usable on {', '.join(f'{name}:{d.index} ({d.arch})' for d in state.devices)}")
        else:
            lines.append(f"  {name}: {state.reason}\n    do: {state.hint}")
    return "\n".join(lines) or "  no backend is installed\n    do: make dev, or pip install a qhal backend"
