"""Bytes that this process and this machine have: what `memory_stats` and the probe report."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qhal.interface import MemoryStats


def total_memory() -> int:
    """Bytes of physical memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def stats() -> MemoryStats:
    """Resident bytes of this process now, their peak since it started, and the machine's memory."""
    try:
        import resource
    except ImportError:  # not a POSIX system: nothing to read without another dependency
        return MemoryStats(0, 0, total_memory())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
    return MemoryStats(used, max(peak, used), total_memory())
