"""The optional libraries: which are here, what each adds, and why one is not used. Versions are pinned exactly.

Nothing is imported before the backend is loaded. A library that is missing, of another version or broken leaves a
poorer table of paths and a reason; it never takes the backend with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from qhal.errors import BackendError, QhalError


@dataclass(frozen=True)
class Library:
    """name: the module; package: the distribution; pinned: the only version that was read; adds: for people."""

    name: str
    package: str
    pinned: str
    imports: tuple[str, ...]
    adds: str

    @property
    def install(self) -> str:
        """The command that brings it."""
        return f"pip install {self.package}=={self.pinned}"


LIBRARIES = (
    Library(
        "flashinfer",
        "flashinfer-python",
        "0.7.2.post1",
        ("flashinfer.prefill",),
        "prefill over bf16 and fp16 caches (sm_90)",
    ),
    Library(
        "humming",
        "humming-kernels",
        "0.1.19",
        ("humming.forward", "humming.config"),
        "weights of 2 to 8 bits times many rows of 16-bit activations (sm_90)",
    ),
)


def missing(library: Library) -> str | None:
    """Why its metadata rules it out; None if the pinned version is installed."""
    try:
        found = version(library.package)
    except PackageNotFoundError:
        return f"missing; {library.install}"
    return None if found == library.pinned else f"{found} is not the version that was read; {library.install}"


def facts() -> dict[str, str]:
    """For `qhal devices`: what each library adds, or would. Imports none of them."""
    return {
        x.package: f"{x.pinned}: {x.adds}" if (why := missing(x)) is None else f"{why} adds {x.adds}" for x in LIBRARIES
    }


@contextmanager
def making(name: str, what: object) -> Iterator[None]:
    """Inside, a library compiles and loads a kernel; whatever goes wrong there is one BackendError."""
    library = next(x for x in LIBRARIES if x.name == name)
    try:
        yield
    except QhalError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise BackendError(
            f"{library.package} {library.pinned} could not make its kernel for {what} ({text}); "
            "it needs a CUDA compiler and a cache that can be written; uninstall it to go without"
        ) from error


def usable() -> frozenset[str]:
    """Names of the libraries that are installed as pinned and can be imported; one that breaks is warned about."""
    found = set()
    for library in LIBRARIES:
        if missing(library) is not None:
            continue
        try:
            for module in library.imports:
                import_module(module)
        except Exception as error:  # whatever it raises: the backend works without it
            text = " ".join(str(error).split())[:200]
            warnings.warn(
                f"qhal-cuda goes without {library.package} {library.pinned}: its import failed "
                f"({type(error).__name__}: {text}); reinstall or uninstall it",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            found.add(library.name)
    return frozenset(found)
