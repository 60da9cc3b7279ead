"""Kernels compiled ahead of time: the calls of some requests are made for a chip that is not here, the binaries kept.

`build` writes a folder: Triton's cache of what was compiled, and manifest.json with the chip, the exact Triton, the
hash of the kernels' sources, and the sha256 of every file. `use` checks all of it and puts the binaries into Triton's
cache, where launches find them by source, arguments and options; so a folder can be useless, never wrong. Sizes that
specialize a kernel in another way, and tiles that a tuned table chooses, are still compiled when they are met.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import triton

from qhal.errors import BackendError
from qhal.requests import Request
from qhal_triton.absent import absent, names
from qhal_triton.calls import calls
from qhal_triton.ops import TritonOps
from qhal_triton.target import Target
from qhal_triton.tuning import sources

SCHEMA = 1
MANIFEST = "manifest.json"
ENVIRONMENT = "QHAL_KERNELS"
"""Names a folder that `build` wrote; a backend reads it when it is loaded."""


def build(ops: TritonOps, requests: Sequence[Request], folder: Path, seen: Callable[[Request], None]) -> dict[str, Any]:
    """Compiles what `requests` launch into a new folder; returns the manifest.

    ops   on the processor, for the chip to compile for
    seen  called before each request

    BackendError if the folder is there already, or cannot be written. Nothing half written is left.
    """
    if folder.exists():
        raise BackendError(f"{folder} is there already; name a new folder, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        entries = [_entry(ops, request, made, seen) for request in dict.fromkeys(requests)]
        _forget_places(made)
        manifest = {
            "schema": SCHEMA,
            "backend": ops.name,
            **_identity(ops._target),
            "requests": entries,
            "files": {p.relative_to(made).as_posix(): _sha(p) for p in sorted(made.rglob("*")) if p.is_file()},
        }
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        made.chmod(0o755)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return manifest


def use(folder: Path, target: Target) -> int:
    """Puts the binaries of a folder into Triton's cache: how many are new there. BackendError if it is not for us."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, given = dict(manifest["files"]), {name: manifest[name] for name in ("schema", *_identity(target))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(
            f"{ENVIRONMENT}={folder} holds no kernels that were built ahead ({error}); write it with `qhal build`"
        ) from None
    for name, wanted in {"schema": SCHEMA, **_identity(target)}.items():
        if given[name] != wanted:
            raise BackendError(
                f"{ENVIRONMENT}={folder} was built for {name} {given[name]}, here it is {wanted}; `qhal build` again"
            )
    for name, hash in files.items():
        path = folder / name
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not path.is_file() or _sha(path) != hash:
            raise BackendError(f"{path} is not the file that was built; `qhal build` again")
    cache = Path(triton.knobs.cache.dir)
    new = 0
    for entry in dict.fromkeys(Path(name).parts[0] for name in files):
        if not (cache / entry).exists():
            new += 1
            _place(folder, entry, [name for name in files if Path(name).parts[0] == entry], cache)
    return new


def require_cache() -> None:
    """BackendError where Triton could not keep what it compiles: every kernel would end in its error."""
    cache = Path(triton.knobs.cache.dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise BackendError(
            f"Triton keeps compiled kernels in {cache}, which cannot be written ({error.strerror}); "
            "set TRITON_CACHE_DIR to a folder that can be"
        ) from None


def used(target: Target) -> None:
    """`use` of the folder that the environment names; nothing if it names none."""
    folder = os.environ.get(ENVIRONMENT)
    if folder:
        use(Path(folder), target)


def _entry(ops: TritonOps, request: Request, cache: Path, seen: Callable[[Request], None]) -> dict[str, Any]:
    seen(request)
    if ops._path(request) is None:
        return {"request": str(request), "kernels": [], "note": ops.supports(request).executes or "refused"}
    with absent(ops._target, cache) as driver:
        made = calls(ops, request)
    note = "" if made else "its calls are not made ahead: compiled when they are met"
    return {"request": str(request), "kernels": names(driver.launches), "note": note}


def _identity(target: Target) -> dict[str, str]:
    """What binaries belong to. wheel: Triton's own hash of its compiler, as its cache has it."""
    from triton.runtime.cache import triton_key

    wheel = sha256(triton_key().encode()).hexdigest()[:16]
    return {"arch": target.arch, "triton": triton.__version__, "wheel": wheel, "sources": sources()}


def _forget_places(cache: Path) -> None:
    """Triton's records of what belongs together name files by their place, which will be another: names remain."""
    for path in cache.glob("*/__grp__*"):
        group: Mapping[str, str] = json.loads(path.read_text())["child_paths"]
        path.write_text(json.dumps({"child_paths": {name: Path(place).name for name, place in group.items()}}))
    for lock in cache.glob("*/lock"):
        lock.unlink()


def _place(folder: Path, entry: str, files: Sequence[str], cache: Path) -> None:
    """One entry into the cache, whole or not at all; another process may be doing the same."""
    cache.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".qhal-", dir=cache))
    try:
        for name in files:
            source, target = folder / name, made / Path(name).name
            if target.name.startswith("__grp__"):
                group = json.loads(source.read_text())["child_paths"]
                placed = {name: str(cache / entry / Path(file).name) for name, file in group.items()}
                target.write_text(json.dumps({"child_paths": placed}))
            else:
                shutil.copyfile(source, target)
        made.chmod(0o755)
        try:
            made.rename(cache / entry)
        except OSError:
            if not (cache / entry).exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _sha(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
