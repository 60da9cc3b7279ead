"""Giving freed memory back while loading: the C library keeps what it may need again, next to what was just allocated.

Loading makes and frees large temporaries between tensors that stay. glibc serves blocks of up to 32 MB from its heap
once it has seen one freed (mallopt(3), M_MMAP_THRESHOLD), where they leave holes; a checkpoint then takes half as much
again as its tensors. `malloc_trim` returns the holes; elsewhere there is nothing to do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

INTERVAL = 32 << 20  # bytes loaded between two trims: each costs a few milliseconds


def _find() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc (TypeError: Windows has no library named None)
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    found: Callable[[int], int] = trim
    return found


class Loading:
    """Counts loaded bytes and trims the heap every INTERVAL of them."""

    def __init__(self) -> None:
        self._trim = _find()
        self._since = 0

    def add(self, nbytes: int) -> None:
        """Another `nbytes` were loaded and their temporaries freed."""
        self._since += nbytes
        if self._since >= INTERVAL and self._trim is not None:
            self._trim(0)
            self._since = 0
