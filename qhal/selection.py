"""Finding the accelerator: light backend descriptions from entry points, probes that explain themselves, one choice.

Entry-point group `qhal.backends`: each value is a function that returns a BackendInfo without importing any device
library. Probe errors are shown, never swallowed. Same inputs and environment, same answer, on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from qhal.errors import BackendError, InterfaceError, NoBackendError
from qhal.interface import INTERFACE_VERSION, QuantOps

GROUP = "qhal.backends"
ENVIRONMENT = "QHAL_BACKEND"
REFERENCE = "cpu_reference"
"""The backend that defines the numbers: never preferred by "auto", taken with a word where there is no other."""


@dataclass(frozen=True)
class Device:
    """One device that a probe found. facts: library versions and what each adds, for people."""

    index: int
    arch: str
    memory: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)


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
    """

    name: str
    interface: tuple[int, int]
    order: int
    probe: Callable[[], Available | Unavailable]
    load: Callable[[Device], QuantOps]
    offline: Callable[[str], QuantOps]


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
        return Broken(point.name, f"{point.value} failed: {type(error).__name__}: {error}", reinstall)
    if not isinstance(info, BackendInfo) or info.name != point.name:
        return Broken(point.name, f"{point.value} must return a BackendInfo named {point.name!r}", reinstall)
    return info


def probe(info: BackendInfo | Broken) -> Available | Unavailable:
    """What a backend finds here; an exception of its probe becomes its reason."""
    if isinstance(info, Broken):
        return Unavailable(info.reason, info.hint)
    mismatch = _interface_mismatch(info)
    if mismatch:
        return Unavailable(mismatch, f"install a {info.name} backend for this version of qhal")
    try:
        return info.probe()
    except Exception as error:
        return Unavailable(f"its probe failed: {type(error).__name__}: {error}", "report this to the backend's authors")


def select(spec: str = "auto", *, require: Collection[str] = (), arch: str | None = None) -> QuantOps:
    """The operations of one device.

    spec     "auto", a backend's name, or "name:index"; with "auto" the variable QHAL_BACKEND is used if it is set
    require  names of capabilities that the backend must have: operations such as "grouped_gemm", "attention"
    arch     an architecture name: the offline form, which answers `supports` with no device

    "auto" prefers an accelerator that executes something; where there is none it takes the reference, with a warning. NoBackendError lists every
    candidate, its reason and what to do.
    >>> select("cpu_reference").name
    'cpu_reference'
    """
    asked = spec
    if spec == "auto" and os.environ.get(ENVIRONMENT):
        spec = os.environ[ENVIRONMENT]
        asked = f"{spec} (from {ENVIRONMENT})"
    name, _, index = spec.partition(":")
    if name == "auto":
        return _auto(require)
    info = backends().get(name)
    if info is None:
        raise NoBackendError(f"no backend named {name!r} is installed (asked: {asked})\n{describe_all()}")
    if isinstance(info, Broken):
        raise BackendError(f"backend {name!r} is broken: {info.reason}; {info.hint}")
    mismatch = _interface_mismatch(info)
    if mismatch:
        raise InterfaceError(f"backend {name!r}: {mismatch}")
    if arch is not None:
        return _checked(info.offline(arch), info, require)
    state = probe(info)
    if isinstance(state, Unavailable):
        raise NoBackendError(
            f"backend {name!r} (asked: {asked}) is not usable here: {state.reason}\n  do: {state.hint}"
        )
    if index and (not index.isdigit() or int(index) not in {d.index for d in state.devices}):
        known = ", ".join(f"{name}:{d.index}" for d in state.devices)
        raise NoBackendError(f"no device {spec!r}; this machine has: {known}")
    device = next(d for d in state.devices if not index or d.index == int(index))
    return _checked(info.load(device), info, require)


OPERATIONS = ("gemm", "grouped_gemm", "quant_kv", "attention", "hadamard", "vq_decode", "comm_quant")
"""The seven operations of the interface."""


def operations(ops: QuantOps) -> tuple[str, ...]:
    """The operations that a backend has a body for; which formats and shapes is `supports`' answer."""
    return tuple(name for name in OPERATIONS if getattr(type(ops), name) is not getattr(QuantOps, name))


def _auto(require: Collection[str]) -> QuantOps:
    idle = []
    for info in backends().values():
        if isinstance(info, Broken) or info.name == REFERENCE:
            continue
        state = probe(info)
        if isinstance(state, Available) and state.devices:
            ops = info.load(state.devices[0])
            if operations(ops):
                return _checked(ops, info, require)
            idle.append(f"{info.name} finds {state.devices[0].arch}, but this version executes none of its operations")
    reference = backends().get(REFERENCE)
    if isinstance(reference, BackendInfo) and isinstance(state := probe(reference), Available):
        import warnings

        why = "; ".join(idle) or "no accelerator is usable here"
        warnings.warn(
            f"{why}, so {REFERENCE} runs on the processor: right, but slow. `qhal devices` says more of each backend",
            stacklevel=3,
        )
        return _checked(reference.load(state.devices[0]), reference, require)
    raise NoBackendError(f"no backend is usable here\n{describe_all()}")


def _checked(ops: QuantOps, info: BackendInfo, require: Collection[str]) -> QuantOps:
    missing = [name for name in require if getattr(type(ops), name, None) in (None, getattr(QuantOps, name, None))]
    if missing:
        raise NoBackendError(f"backend {info.name!r} does not implement what is required: {', '.join(missing)}")
    return ops


def _interface_mismatch(info: BackendInfo) -> str:
    """Why the backend's interface version does not fit, or "". Before 1.0 both numbers must match."""
    ours, theirs = INTERFACE_VERSION, info.interface
    fits = theirs == ours if ours[0] == 0 else theirs[0] in (ours[0], ours[0] - 1) and (theirs <= ours)
    return "" if fits else f"it was written for interface {theirs[0]}.{theirs[1]}, this is qhal {ours[0]}.{ours[1]}"


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
