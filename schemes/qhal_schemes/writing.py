"""Writing: folders that appear whole or not at all, and safetensors files whose bytes arrive one tensor at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from qhal.errors import CheckpointError
from qhal_schemes.source import DTYPES
from qhal_schemes.strict_json import is_file

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_MARGIN = 1 << 20  # bytes beside the tensors: headers, configuration


class TensorLayout(NamedTuple):
    """What a header says of a tensor: its dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file, bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def layout_of(t: Tensor) -> TensorLayout:
    """The layout of a tensor in memory."""
    return TensorLayout(_NAMES[t.dtype], tuple(t.shape))


def apart(out: Path, checkpoint: Path) -> None:
    """CheckpointError for an output that is the checkpoint that is read, or lies in its folder, however deep."""
    try:
        place, read = out.resolve(), checkpoint.resolve()
    except (OSError, ValueError) as bad:  # a name that no file can have
        raise CheckpointError(f"{str(out)[:300]!r}: cannot be written: {bad}") from None
    if read in (place, *place.parents):
        if is_file(out):
            raise CheckpointError(f"{out}: is a file of the checkpoint that is read; name another one")
        raise CheckpointError(f"{out}: lies in the checkpoint's own folder; a checkpoint is never written to")


class AtomicDirectory:
    """A folder that appears under its name only when the `with` block ends well.

    Inside the block files go to `path`, a hidden folder beside the target, which is renamed at the end. Any exception,
    KeyboardInterrupt, SIGTERM or SIGHUP removes it and leaves the target as it was. CheckpointError if the target
    exists and is not an empty folder, if fewer than `needed` bytes are free, or if the disk fills up.
    """

    def __init__(self, target: Path, *, needed: int = 0) -> None:
        self.target = target
        self.needed = needed
        self.path = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.partial"
        self._made: list[Path] = []
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> AtomicDirectory:
        try:
            self._check_target()
        except (OSError, ValueError) as bad:  # a name too long, or one that no file can have
            raise CheckpointError(f"{str(self.target)[:300]!r}: cannot be written: {bad}") from None
        self._catch_signals()
        try:
            self._make_parents()
            self._check_space()
            self._create()
        except BaseException as bad:
            self._undo()
            if isinstance(bad, OSError):
                raise self._error(bad) from None
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, bad: BaseException | None, _: TracebackType | None) -> None:
        if bad is None:
            try:
                for file in self._contents():
                    _sync(file)
                self.path.replace(self.target)  # an empty target folder is replaced too
                _sync(self.target.parent)
                self._restore_signals()
                return
            except BaseException as failed:
                bad = failed
                self._undo()
                if not isinstance(bad, OSError):
                    raise
        else:
            self._undo()
        if isinstance(bad, OSError):
            raise self._error(bad) from bad

    def _check_target(self) -> None:
        os.fsencode(str(self.target))
        if "\0" in str(self.target):
            raise ValueError("a NUL character in the name")
        if self.target.is_symlink():
            raise CheckpointError(f"{self.target}: is a link; name the folder itself")
        if self.target.exists() and not (self.target.is_dir() and not any(self.target.iterdir())):
            what = "a folder that is not empty" if self.target.is_dir() else "a file"
            raise CheckpointError(f"{self.target}: exists already and is {what}; name another one, or remove it first")

    def _create(self) -> None:
        self.path.mkdir()

    def _contents(self) -> Iterable[Path]:
        return self.path.rglob("*")

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _undo(self) -> None:
        self._remove()
        for parent in reversed(self._made):
            if not any(parent.iterdir()):
                parent.rmdir()
        self._restore_signals()

    def _make_parents(self) -> None:
        missing = [p for p in (self.target.parent, *self.target.parent.parents) if not p.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self._made.append(parent)

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if free < self.needed + _MARGIN:
            raise CheckpointError(
                f"{self.target}: {size_text(self.needed)} are needed and {size_text(free)} are free on its disk; "
                f"nothing was written. Free some space or name a folder on another disk"
            )

    def _error(self, bad: OSError) -> CheckpointError:
        if bad.errno in _FULL:
            return CheckpointError(
                f"{self.target}: the disk is full ({size_text(self.needed)} are needed); nothing was left behind. "
                f"Free some space or name a folder on another disk"
            )
        return CheckpointError(f"{self.target}: cannot be written: {bad}; nothing was left behind")

    def _catch_signals(self) -> None:
        """Termination becomes an exception, so that the folder is removed; only where nobody else handles it."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                self._handlers[number] = signal.signal(number, _terminate)

    def _restore_signals(self) -> None:
        for number in self._handlers:
            signal.signal(number, signal.SIG_DFL)
        self._handlers.clear()


class AtomicFile(AtomicDirectory):
    """The same for one file: `path` is written inside the block and takes the target's name at its end.

    An older file of that name is replaced, or stays as it was if the block fails; CheckpointError if it is a folder,
    a link or a device.
    """

    def _check_target(self) -> None:
        if self.target.is_symlink():
            raise CheckpointError(f"{self.target}: is a link to {self.target.resolve()}; name that file itself")
        if self.target.exists() and not self.target.is_file():
            what = "a folder" if self.target.is_dir() else "no regular file (a device, a pipe?)"
            raise CheckpointError(f"{self.target}: is {what}; name a file")

    def _create(self) -> None:
        self.path.touch()

    def _contents(self) -> Iterable[Path]:
        return (self.path,)

    def _remove(self) -> None:
        self.path.unlink(missing_ok=True)


class StreamingSafetensors:
    """A safetensors file whose header is written first, since every dtype and shape is known, then tensors one by one.

    Tensors may come in any order; each goes to its place. The file has them in the order of `layout`, or, where that
    would leave one unaligned (holes are not allowed), sorted by the size of their elements, largest first. Use in a
    `with` block: leaving it well requires every tensor to have been written once.
    """

    def __init__(self, path: Path, layout: Mapping[str, TensorLayout]) -> None:
        self.path = path
        self.layout = layout
        self._missing = set(layout)
        self._file: BinaryIO | None = None
        ordered = list(layout) if _aligned(layout) else sorted(layout, key=lambda name: -_itemsize(layout[name]))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._place: dict[str, int] = {}
        at = 0
        for name in ordered:
            one = layout[name]
            header[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [at, at + one.nbytes]}
            self._place[name] = at
            at += one.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        self._header = text + b" " * (-len(text) % 8)

    def __enter__(self) -> StreamingSafetensors:
        self._file = self.path.open("wb", buffering=0)
        _write_all(self._file, len(self._header).to_bytes(8, "little") + self._header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor at its place; ValueError if the header announced another dtype or shape, or a second one."""
        assert self._file is not None
        if name not in self._missing or layout_of(tensor) != self.layout[name]:
            raise ValueError(f"{name}: the header has {self.layout.get(name)}, got {layout_of(tensor)}")
        self._file.seek(8 + len(self._header) + self._place[name])
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        _write_all(self._file, memoryview(raw.numpy()))  # type: ignore[arg-type]  # an array is a buffer
        self._missing.discard(name)

    def __exit__(self, kind: type[BaseException] | None, bad: BaseException | None, _: TracebackType | None) -> None:
        assert self._file is not None
        self._file.close()
        if bad is None and self._missing:
            raise ValueError(f"{self.path}: {len(self._missing)} tensors were not written, first {min(self._missing)}")


def _itemsize(one: TensorLayout) -> int:
    return DTYPES[one.dtype].itemsize


def _aligned(layout: Mapping[str, TensorLayout]) -> bool:
    """Whether every tensor starts at a multiple of its element size when they follow each other."""
    at = 0
    for one in layout.values():
        if at % _itemsize(one):
            return False
        at += one.nbytes
    return True


def size_text(count: int) -> str:
    """Bytes for people: 1536 -> "1.5 KiB"."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view.nbytes:
        written = file.write(view)  # an unbuffered file may take a part only
        view = view[written:]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _terminate(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
