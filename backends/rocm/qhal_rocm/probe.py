"""Is an AMD GPU usable here? Read from the kernel driver's topology files, before any HIP runtime exists.

The driver says what a chip is; the runtime numbers devices, and believes environment variables: both are looked at, so
that a device's number and name are those that torch will use.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from qhal.selection import Available, Device, Unavailable
from qhal_rocm.aiter_calls import INSTALL, PACKAGE, installed
from qhal_rocm.targets import CHIPS

TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
DRM = Path("/sys/class/drm")
INTERPRET = "QHAL_ROCM_INTERPRET"
"""Names an architecture: Triton's interpreter plays it on the processor (evidence level L2). "auto" never takes it."""
_OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
_INSTALL = "pip install torch from the ROCm index of your driver (https://pytorch.org/get-started/locally)"


@dataclass(frozen=True)
class Node:
    """One GPU, or a partition of one, as the driver lists it. uuid: "GPU-<hex>"; units: its compute units."""

    arch: str
    memory: int
    uuid: str
    units: int
    partition: str


def probe() -> Available | Unavailable:
    """Every visible AMD device whose architecture is known, or why there is none."""
    if INTERPRET in os.environ:
        return _interpreter(os.environ[INTERPRET])
    found = _topology()
    if not found:
        return Unavailable(
            "no AMD GPU: the kernel driver lists none", "install the amdgpu driver, pass /dev/kfd and /dev/dri"
        )
    if torch.version.hip is None:
        names = ", ".join(node.arch for node in found)
        return Unavailable(f"{names} found, but torch {torch.__version__} has no HIP", _INSTALL)
    hip, cuda = (os.environ.get(f"{n}_VISIBLE_DEVICES") for n in ("HIP", "CUDA"))
    if hip is not None and cuda is not None and hip != cuda:
        return Unavailable(
            f"HIP_VISIBLE_DEVICES={hip!r} and CUDA_VISIBLE_DEVICES={cuda!r} disagree", "unset one of the two"
        )
    below = _visible(found, os.environ.get("ROCR_VISIBLE_DEVICES"))  # the lower layer numbers anew what it leaves
    visible = _visible(below, hip if hip is not None else cuda)
    if not visible:
        names = ", ".join(n for n in ("ROCR", "HIP", "CUDA") if f"{n}_VISIBLE_DEVICES" in os.environ)
        return Unavailable(f"the visible-devices variables ({names}) hide all {len(found)} GPUs", "unset them")
    devices = []
    for index, node in enumerate(visible):
        if node.arch not in CHIPS:
            return Unavailable(
                f"device {index} is {node.arch}, which is not in the table ({', '.join(CHIPS)})",
                "hide it with HIP_VISIBLE_DEVICES, or report the name so that it can be added",
            )
        lie = _override(node.arch)
        if lie is not None:
            return lie
        facts = {"kind": CHIPS[node.arch].words, "hip": torch.version.hip, "torch": torch.__version__}
        facts |= {"compute units": str(node.units)} if node.units else {}
        facts |= {"partition": node.partition} if node.partition else {}
        facts |= {PACKAGE: installed() or f"missing; {INSTALL}"}
        devices.append(Device(index, node.arch, node.memory, facts))
    return Available(tuple(devices))


def architecture(version: int) -> str:
    """gfx_target_version to a name: 90402 -> gfx942, 90010 -> gfx90a, 110000 -> gfx1100, 120001 -> gfx1201."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _interpreter(arch: str) -> Available | Unavailable:
    if arch not in CHIPS:
        return Unavailable(f"{INTERPRET}={arch!r} names no architecture of the table", f"one of {', '.join(CHIPS)}")
    if os.environ.get("TRITON_INTERPRET") != "1":
        return Unavailable(
            f"{INTERPRET}={arch} asks for Triton's interpreter, but TRITON_INTERPRET is not 1",
            f"TRITON_INTERPRET=1 {INTERPRET}={arch} ..., both before Python starts",
        )
    facts = {"kind": CHIPS[arch].words, "runs on": "the processor, in Triton's interpreter", "torch": torch.__version__}
    return Available((Device(0, arch, 0, facts, evidence="L2"),))


def _override(arch: str) -> Unavailable | None:
    """The runtime can be told that a chip is another one; kernels would then be compiled for what is not there."""
    for name in sorted(n for n in os.environ if n == _OVERRIDE or n.startswith(f"{_OVERRIDE}_")):
        value = os.environ[name]
        parts = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", value.strip())
        told = f"gfx{parts[1]}{int(parts[2]):x}{int(parts[3]):x}" if parts else "no architecture"
        if told != arch:
            return Unavailable(f"{name}={value} says {told}, the driver says {arch}", f"unset {name}")
    return None


def _visible(nodes: list[Node], text: str | None) -> list[Node]:
    """What a visible-devices variable leaves, in its order; an unknown entry ends the list, as the runtime does."""
    if text is None:
        return nodes
    chosen: list[Node] = []
    for part in (p.strip() for p in text.split(",")):
        named = [n for n in nodes if part.startswith("GPU-") and n.uuid.lower() == part.lower()]
        if part.isdecimal() and int(part) < len(nodes):
            chosen.append(nodes[int(part)])
        elif named:
            chosen.append(named[0])
        else:
            break
    return chosen


def _topology() -> list[Node]:
    """Every GPU node, in the driver's order."""
    found = []
    nodes = sorted(TOPOLOGY.glob("*/properties"), key=lambda p: int(p.parent.name)) if TOPOLOGY.is_dir() else []
    for path in nodes:
        try:
            facts = _properties(path)
        except OSError:  # a GPU that the container's device list leaves out: the runtime skips it too
            continue
        if version := facts.get("gfx_target_version", 0):
            found.append(
                Node(
                    architecture(version),
                    sum(_properties(p).get("size_in_bytes", 0) for p in path.parent.glob("mem_banks/*/properties")),
                    f"GPU-{facts.get('unique_id', 0):016x}",
                    facts.get("simd_count", 0) // max(facts.get("simd_per_cu", 4), 1),
                    _partition(facts.get("drm_render_minor", -1)),
                )
            )
    return found


def _properties(path: Path) -> dict[str, int]:
    pairs = (line.split(None, 1) for line in path.read_text().splitlines() if " " in line)
    return {name: int(value) for name, value in pairs if value.strip().isdecimal()}


def _partition(minor: int) -> str:
    """ "CPX/NPS4": how the chip is divided (CDNA3 and newer); the same architecture, fewer units and less memory."""
    device = DRM / f"renderD{minor}" / "device"
    kinds = (device / f"current_{kind}_partition" for kind in ("compute", "memory"))
    return "/".join(p.read_text().strip() for p in kinds if p.is_file())
