"""Is the `qhal` that Python found this project? The package index has an unrelated distribution of the same name."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

ADVICE = (
    "the unrelated distribution 'qhal' is installed and owns the same import name; this project is 'qhal-core': "
    "pip uninstall -y qhal && pip install --force-reinstall --no-deps qhal-core"
)


def check() -> None:
    """ImportError with what to do if the unrelated distribution `qhal` is installed beside this one."""
    try:
        other = distribution("qhal")
    except PackageNotFoundError:
        return
    raise ImportError(f"{ADVICE} (found {other.metadata['Name']} {other.version} at {other.locate_file('')})")
