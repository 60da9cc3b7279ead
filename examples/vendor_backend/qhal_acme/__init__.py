"""qhal-acme: what `qhal.select` reads first. Importing this imports no device library and no operation."""

from qhal.interface import QuantOps
from qhal.selection import Available, BackendInfo, Device, Unavailable


def backend() -> BackendInfo:
    """The entry point of the group `qhal.backends`."""
    return BackendInfo("acme", interface=(1, 0), order=500, probe=probe, load=load, offline=load, archs=("acme1",))


def probe() -> Available | Unavailable:
    """Which devices are usable here; a real backend asks its driver, without creating a context."""
    try:
        import torch
    except ImportError as missing:
        return Unavailable(f"{missing}", "pip install torch")
    return Available((Device(index=0, arch="acme1", facts={"torch": torch.__version__}),))


def load(device: Device | str) -> QuantOps:
    """The operations of one device, or (offline) of an architecture's name."""
    from qhal_acme.ops import Acme

    return Acme()
