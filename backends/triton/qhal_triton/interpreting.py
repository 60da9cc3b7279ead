"""Triton's interpreter, several times as fast, and from several threads.

For every launch and every call of a device function inside it, `_patch_lang` replaces some two hundred members of
`triton.language` by interpreted ones, and takes them back after a launch. Nothing here needs them back: once is enough.
And the program that is running is one variable of the process, so launches take turns.
"""

from __future__ import annotations

import threading
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _Kept:
    """Stands for the record of what was replaced."""

    def restore(self) -> None:
        """Nothing is taken back."""


def prepare_once() -> None:
    """From now on the language is prepared once in this process, for kernels that see `tl` and library functions.

    Launches of different threads wait for each other.
    """
    original, done = interpreter._patch_lang, set[int]()
    launch, turn = interpreter.GridExecutor.__call__, threading.RLock()

    def prepare(fn: Any) -> Any:
        seen = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if not seen or not seen <= done:  # none: the original says what is wrong
            original(fn)
            done.update(seen)
        return _Kept()

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with turn:
            return launch(self, *args, **kwargs)

    interpreter._patch_lang = prepare
    interpreter.GridExecutor.__call__ = launched
