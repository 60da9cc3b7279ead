"""Triton's interpreter, several times as fast: it prepares its language anew for every call of a device function.

`_patch_lang` replaces some two hundred members of `triton.language` by interpreted ones, at every launch and at every
call of a device function inside it, and takes them back after a launch. Nothing here needs them back: once is enough.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _Kept:
    """Stands for the record of what was replaced."""

    def restore(self) -> None:
        """Nothing is taken back."""


def prepare_once() -> None:
    """From now on the language is prepared once in this process, for kernels that see `tl` and library functions."""
    original, done = interpreter._patch_lang, set[int]()

    def prepare(fn: Any) -> Any:
        seen = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if not seen or not seen <= done:  # none: the original says what is wrong
            original(fn)
            done.update(seen)
        return _Kept()

    interpreter._patch_lang = prepare
