"""Is an Ascend NPU usable here? Asked in the order that initialises nothing: driver files, torch_npu, CANN, devices.

Importing torch_npu without CANN fails, and asking for the device's name takes the device (aclInit). So the probe
imports torch_npu only where the driver, the package and CANN are all present, and asks for the device count alone.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from qhal.selection import Available, Device, Unavailable

DEVICES = Path("/dev")
_CANN_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")


def probe() -> Available | Unavailable:
    """Every Ascend device, or the first thing that is missing."""
    nodes = sorted(p.name for p in DEVICES.glob("davinci*") if re.fullmatch(r"davinci\d+", p.name))
    if not nodes:
        return Unavailable("no Ascend NPU: no /dev/davinci* device", "install the Ascend driver, pass /dev/davinci*")
    try:
        package = version("torch_npu")
    except PackageNotFoundError:
        return Unavailable(f"{len(nodes)} NPU found, but torch_npu is not installed", "pip install torch_npu")
    homes = [os.environ[name] for name in _CANN_HOMES if os.environ.get(name)]
    if not homes:
        return Unavailable(
            f"torch_npu {package} is installed, but CANN is not set up", "source the set_env.sh of your CANN toolkit"
        )
    if find_spec("torch_npu") is None:
        return Unavailable(f"torch_npu {package} is registered but cannot be found", "reinstall torch_npu")
    try:
        import torch_npu
    except (ImportError, RuntimeError) as error:
        return Unavailable(f"torch_npu {package} does not load: {error}", "match torch, torch_npu and CANN versions")
    count = int(torch_npu.npu.device_count())
    if count == 0:
        return Unavailable("torch_npu loads but sees no device", "check ASCEND_RT_VISIBLE_DEVICES and npu-smi info")
    facts = {"torch_npu": package, "cann": homes[0]}
    return Available(tuple(Device(i, "unknown until loaded", 0, facts) for i in range(count)))
