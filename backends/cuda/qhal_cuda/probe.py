"""Is an NVIDIA GPU usable here? Asked of NVML, which creates no CUDA context and survives a fork."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from qhal.selection import Available, Device, Unavailable
from qhal_cuda import libraries

_INSTALL = "pip install torch from the CUDA index of your driver (https://pytorch.org/get-started/locally)"
MINIMUM = (8, 0)
"""Oldest compute capability: bf16 and asynchronous copies, which every planned kernel uses, begin there."""


def probe() -> Available | Unavailable:
    """Every visible NVIDIA device of compute capability 8.0 or newer, or why there is none."""
    if find_spec("pynvml") is None:
        return Unavailable("the package nvidia-ml-py is missing", "pip install nvidia-ml-py")
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Unavailable(f"no NVIDIA driver: {error}", "install the NVIDIA driver, or run where nvidia-smi works")
    try:
        return _devices()
    finally:
        pynvml.nvmlShutdown()


def _devices() -> Available | Unavailable:
    import pynvml

    count = pynvml.nvmlDeviceGetCount()
    if count == 0:
        return Unavailable(
            "the NVIDIA driver is loaded but sees no GPU", "check nvidia-smi and the container's devices"
        )
    if torch.version.cuda is None:  # torch.cuda.is_available() can be faked by other vendors' shims; this cannot
        return Unavailable(f"{count} NVIDIA GPU found, but torch {torch.__version__} has no CUDA", _INSTALL)
    visible = _visible(
        count, [str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(i))) for i in range(count)]
    )
    if not visible:
        value = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Unavailable(f"CUDA_VISIBLE_DEVICES={value!r} hides all {count} GPUs", "unset CUDA_VISIBLE_DEVICES")
    driver = str(pynvml.nvmlSystemGetDriverVersion())
    found, too_old = [], []
    for index, physical in enumerate(visible):
        handle = pynvml.nvmlDeviceGetHandleByIndex(physical)
        capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
        name = str(pynvml.nvmlDeviceGetName(handle))
        if capability < MINIMUM:
            too_old.append(f"{name} (sm_{capability[0]}{capability[1]})")
            continue
        facts = {"name": name, "driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__}
        facts |= libraries.facts()
        memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        found.append(Device(index, f"sm_{capability[0]}{capability[1]}", memory, facts))
    if not found:
        return Unavailable(f"older than sm_80: {', '.join(too_old)}", "use a GPU of the Ampere generation or newer")
    return Available(tuple(found))


def _visible(count: int, uuids: list[str]) -> list[int]:
    """Physical indices in the order CUDA numbers them; an unknown entry ends the list, as the runtime does."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return list(range(count))
    chosen: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        if part.isdigit() and int(part) < count:
            chosen.append(int(part))
        elif part.startswith("GPU-") and (match := [i for i, u in enumerate(uuids) if u.startswith(part)]):
            chosen.append(match[0])
        else:
            break
    return chosen
