"""Where a report comes from: which suite, which backend files, which device, which libraries."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qhal.interface import QuantOps
from qhal.selection import GROUP, Available, backends, probe, wanted
from qhal_conformance import SUITE_VERSION, mustpass

EVIDENCE = {"L2": "L2 emulated", "L3": "L3 device"}
"""What an executed case proves. L0 (layout) and L1 (compiles) execute nothing: a run of cases never gives them."""
NOT_RUN = "not run"


def suite(level: int) -> dict[str, Any]:
    """Version, list of required cases, and the commit where the suite runs from a git tree (else None)."""
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", Path(__file__).name) else None
    dirty = None if commit is None else bool(_git("status", "--porcelain", "--", "."))
    return {"version": SUITE_VERSION, "commit": commit, "dirty": dirty, "mustpass": mustpass.sha(level)}


def _git(*words: str) -> str | None:
    """What git prints in the suite's folder; None where there is no git tree."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def resolved(ops: QuantOps, spec: str) -> str:
    """`name` or `name:index`, also where "auto" was asked."""
    name, index, _ = wanted(spec)
    return (ops.name or name) if name == "auto" else name if index is None else f"{name}:{index}"


def kind(ops: QuantOps) -> str:
    """Module and name of the class that the operations are an object of."""
    return f"{type(ops).__module__}.{type(ops).__qualname__}"


def backend(ops: QuantOps, spec: str) -> dict[str, Any]:
    """The distribution that registers the backend, and the sha256 of every file of its package as it lies on disk."""
    name = spec.partition(":")[0]
    found: dict[str, Any] = {
        "name": ops.name or name,
        "spec": spec,
        "interface": list(type(ops).interface),
        "distribution": None,
        "version": None,
        "files": {},
    }
    for point in entry_points(group=GROUP):
        if point.name == name and point.dist is not None:
            files = files_sha(point.module)
            found.update(distribution=point.dist.name, version=point.dist.version, files=files)
    return found


def files_sha(module: str) -> dict[str, str]:
    """sha256 by path of the files of the package that holds a module; compiled Python is left out."""
    spec = find_spec(module.partition(".")[0])
    if spec is None:
        return {}
    folders = [Path(p) for p in spec.submodule_search_locations or ()]
    files = [(p, p.relative_to(f.parent)) for f in folders for p in f.rglob("*") if "__pycache__" not in p.parts]
    if not folders and spec.origin is not None:
        files = [(Path(spec.origin), Path(Path(spec.origin).name))]
    return {name.as_posix(): _sha(path) for path, name in sorted(files) if path.is_file()}


def _sha(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def device(ops: QuantOps, spec: str) -> dict[str, Any]:
    """The device as the interface and the backend's probe tell it. Driver and runtime versions are among the facts.

    The evidence is "L3 device" only if the probe found the device on this machine and does not call it an emulator.
    Where tensors live on the processor, it must also be the processor that the probe found: an accelerator's code that
    runs there is emulated, whatever its probe says.
    """
    name, _, index = spec.partition(":")
    found: dict[str, Any] = {
        "type": ops.device.type,
        "arch": "",
        "memory": ops.memory_stats().total,
        "count": 0,
        "evidence": EVIDENCE["L2"],
        "facts": {},
    }
    info = backends().get(name)
    state = None if info is None else probe(info)
    if isinstance(state, Available):
        for d in state.devices:
            if not index or str(d.index) == index:
                stands_in = found["type"] == "cpu" and not d.arch.startswith(platform.machine())
                level = "L2" if stands_in else d.evidence
                facts = {str(key): str(value) for key, value in d.facts.items()}
                found.update(arch=d.arch, count=len(state.devices), facts=facts)
                found["evidence"] = EVIDENCE.get(level, EVIDENCE["L2"])
                found["memory"] = found["memory"] or d.memory
                break
    return found


def environment() -> dict[str, Any]:
    """Versions and settings of this process that numbers may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
