"""Is an AMD GPU usable here? Read from the kernel driver's topology files, before any HIP runtime exists."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from qhal.selection import Available, Device, Unavailable

TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
ARCHITECTURES: dict[str, str] = {
    "gfx90a": "CDNA2, no fp8",
    "gfx942": "CDNA3, fp8 e4m3fnuz",
    "gfx950": "CDNA4, fp8 e4m3fn, MX",
    "gfx1100": "RDNA3, no fp8",
    "gfx1101": "RDNA3, no fp8",
    "gfx1200": "RDNA4, fp8 e4m3fn",
    "gfx1201": "RDNA4, fp8 e4m3fn",
}
"""Exact names: a prefix test would take gfx1250 for a gfx12 that it is not."""
_INSTALL = "pip install torch from the ROCm index of your driver (https://pytorch.org/get-started/locally)"


def probe() -> Available | Unavailable:
    """Every visible AMD device whose architecture is known, or why there is none."""
    found = _topology()
    if not found:
        return Unavailable(
            "no AMD GPU: the kernel driver lists none", "install the amdgpu driver, pass /dev/kfd and /dev/dri"
        )
    if torch.version.hip is None:
        names = ", ".join(arch for arch, _ in found)
        return Unavailable(f"{names} found, but torch {torch.__version__} has no HIP", _INSTALL)
    hip, cuda = (os.environ.get(f"{n}_VISIBLE_DEVICES") for n in ("HIP", "CUDA"))
    if hip is not None and cuda is not None and hip != cuda:
        return Unavailable(
            f"HIP_VISIBLE_DEVICES={hip!r} and CUDA_VISIBLE_DEVICES={cuda!r} disagree", "unset one of the two"
        )
    text = hip if hip is not None else cuda
    visible = list(range(len(found))) if text is None else [int(p) for p in text.split(",") if p.strip().isdigit()]
    devices = []
    for index, physical in enumerate(i for i in visible if i < len(found)):
        arch, memory = found[physical]
        if arch not in ARCHITECTURES:
            return Unavailable(
                f"device {physical} is {arch}, which is not in the table ({', '.join(ARCHITECTURES)})",
                "hide it with HIP_VISIBLE_DEVICES, or report the name so that it can be added",
            )
        facts = {"kind": ARCHITECTURES[arch], "hip": torch.version.hip, "torch": torch.__version__}
        devices.append(Device(index, arch, memory, facts))
    if not devices:
        return Unavailable(f"the visible-devices variable {text!r} hides all {len(found)} GPUs", "unset it")
    return Available(tuple(devices))


def _topology() -> list[tuple[str, int]]:
    """(architecture, bytes of memory) of every GPU node, in the driver's order."""
    found = []
    nodes = sorted(TOPOLOGY.glob("*/properties"), key=lambda p: int(p.parent.name)) if TOPOLOGY.is_dir() else []
    for path in nodes:
        properties = dict(line.split(None, 1) for line in path.read_text().splitlines() if " " in line)
        version = int(properties.get("gfx_target_version", "0"))
        if version:
            found.append((architecture(version), _memory(path.parent)))
    return found


def architecture(version: int) -> str:
    """gfx_target_version to a name: 90402 -> gfx942, 90010 -> gfx90a, 110000 -> gfx1100, 120001 -> gfx1201."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _memory(node: Path) -> int:
    total = 0
    for bank in node.glob("mem_banks/*/properties"):
        sizes = dict(line.split(None, 1) for line in bank.read_text().splitlines() if " " in line)
        total += int(sizes.get("size_in_bytes", "0"))
    return total
