"""`python -m qhal_triton.compile --arch gfx942 sm_90`: every tile compiled for chips that are not here, and judged.

Exit codes: 0 every cell holds, 1 some do not, 2 wrong use. A compiler that crashes or hangs is a result of its cell:
tiles are compiled in worker processes, which are replaced. Binaries are kept in Triton's cache (--cache), whose key is
the source, the options, the chip and Triton's version, so that a second run compiles what changed.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from queue import Queue
from typing import IO, Any

from qhal.selection import BackendInfo, backends, offline
from qhal_triton.ops import TritonOps
from qhal_triton.target import Target
from qhal_triton.tiles import Tile

TILES = "qhal_triton.tiles:tiles"
LIMIT = 300.0
"""Seconds for one tile: the slowest that is known (fp8 operands by software on RDNA3) took 93."""

Cell = dict[str, Any]


def target_of(arch: str) -> Target:
    """The target of a chip, from the installed backend that knows it; LookupError names what is known."""
    known: list[str] = []
    for info in backends().values():
        if isinstance(info, BackendInfo) and arch in info.archs:
            ops = offline(info, arch)
            if isinstance(ops, TritonOps):
                return ops._target
        known += info.archs if isinstance(info, BackendInfo) else ()
    raise LookupError(f"no backend compiles for {arch!r}; known: {', '.join(known)}")


def listed(where: str, target: Target) -> dict[str, Tile]:
    """The tiles of a function "module:name", by their names; a name that occurs twice is an error."""
    module, _, name = where.partition(":")
    make: Callable[[Target], Iterable[Tile]] = getattr(import_module(module), name)
    found: dict[str, Tile] = {}
    for tile in make(target):
        if tile.name in found:
            raise ValueError(f"two tiles are called {tile.name!r}")
        found[tile.name] = tile
    return found


def matrix(
    archs: Sequence[str],
    *,
    where: str = TILES,
    names: str = "",
    full: bool = False,
    jobs: int = 2,
    limit: float = LIMIT,
) -> Iterator[Cell]:
    """The cells whose name contains `names`, by architecture; full: variants too."""
    asked = [
        (arch, name)
        for arch in archs
        for name, tile in listed(where, target_of(arch)).items()
        if names in name and (full or not tile.variant)
    ]
    idle: Queue[_Worker] = Queue()
    workers = [_Worker(where, limit) for _ in range(min(jobs, len(asked)))]
    for worker in workers:
        idle.put(worker)

    def one(cell: tuple[str, str]) -> Cell:
        worker = idle.get()
        try:
            return worker.ask(*cell)
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(max(1, len(workers))) as pool:
            yield from pool.map(one, asked)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that compiles; started when it is asked, replaced when it dies or hangs."""

    def __init__(self, where: str, limit: float) -> None:
        self._where, self._limit = where, limit
        self._process: subprocess.Popen[str] | None = None
        self._words: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker

    def ask(self, arch: str, name: str) -> Cell:
        if self._process is None:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "qhal_triton.compile", "--worker", "--tiles", self._where],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                text=True,
                env=environment,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        start = time.monotonic()
        try:
            process.stdin.write(json.dumps([arch, name]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._lost(arch, name, start)
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            if not ready.select(self._limit):
                self.end()
                return _failed(arch, name, f"the compiler took longer than {self._limit:.0f} s", start)
        line = process.stdout.readline()
        return json.loads(line) if line else self._lost(arch, name, start)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _lost(self, arch: str, name: str, start: float) -> Cell:
        assert self._process is not None
        code = self._process.wait()
        self._process = None
        self._words.seek(0)
        last = next((line.strip() for line in reversed(self._words.readlines()) if line.strip()), "")
        self._words.seek(0)
        self._words.truncate()
        return _failed(arch, name, f"the compiler died with code {code}: {last[:200]}", start)


def _failed(arch: str, name: str, problem: str, start: float) -> Cell:
    from qhal_triton.offline import Compiled

    seconds = round(time.monotonic() - start, 2)
    return Compiled(name=name, arch=arch, seconds=seconds, problems=(problem,)).plain()


def _work(where: str) -> None:
    """The worker: a line [arch, name] in, a cell out. What compilers print goes elsewhere."""
    from qhal_triton.offline import compiled

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    known: dict[str, tuple[Target, dict[str, Tile]]] = {}
    for line in sys.stdin:
        arch, name = json.loads(line)
        if arch not in known:
            target = target_of(arch)
            known[arch] = target, listed(where, target)
        target, tiles = known[arch]
        print(json.dumps(compiled(tiles[name], target).plain()), file=answers, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the first lines."""
    parser = argparse.ArgumentParser("python -m qhal_triton.compile", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=[], metavar="ARCH", help="gfx942, sm_90, ...")
    parser.add_argument("--names", default="", help="only tiles whose name contains this")
    parser.add_argument("--full", action="store_true", help="every tile, not one for every kernel and format")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--json", type=Path, help="write the cells here")
    parser.add_argument("--cache", default="build/triton", help="where Triton keeps binaries")
    parser.add_argument("--tiles", default=TILES, help="function that lists tiles: module:name")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        _work(given.tiles)
        return 0
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(given.cache).resolve()))
    try:
        for arch in given.arch:
            target_of(arch)
    except LookupError as error:
        parser.error(str(error))
    import triton

    start, cells = time.monotonic(), []
    for cell in matrix(given.arch, where=given.tiles, names=given.names, full=given.full, jobs=given.jobs):
        cells.append(cell)
        print(_line(cell), flush=True)
    bad = sum(bool(cell["problems"]) for cell in cells)
    seconds = time.monotonic() - start
    print(f"{len(cells) - bad} of {len(cells)} cells hold, Triton {triton.__version__}, {seconds:.0f} s")
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        known = {"triton": triton.__version__, "archs": given.arch, "full": given.full, "seconds": round(seconds, 1)}
        report = {**known, "cells": cells}
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if bad else 0


def _line(cell: Cell) -> str:
    if cell["problems"]:
        return f"{cell['arch']:8} {cell['name']:60} PROBLEM {'; '.join(cell['problems'])}"
    used = ", ".join(cell["instructions"]) or "no matrix instruction"
    figures = f"{cell['registers']} registers, {cell['spills']} spilled, {cell['shared']} B shared"
    return f"{cell['arch']:8} {cell['name']:60} ok {cell['seconds']:6.1f} s  {figures}, {used}"


if __name__ == "__main__":
    sys.exit(main())
