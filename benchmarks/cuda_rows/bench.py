"""How a row is measured: our call and its peers as captured graphs in one process, medians, weights that rotate."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qhal.formats import Format
from qhal.interface import QuantOps
from qhal.requests import Support
from qhal.tensors import QTensor

Call = Callable[[], Any]
ROTATE = 256 << 20  # bytes: several times the L2 cache of every GPU that this runs on
_SHORT = 0.5  # milliseconds
_READ = {"H200": 4.45e12, "H100": 3.35e12}
"""Bytes per second: H200 as a read-only sum was measured (notes of the project), H100 by the data sheet."""
_PEAK = {"bf16": 771e12, "fp8": 1386e12, "int8": 883e12}
"""Operations per second of 8192^3 products of torch on an H200; an H100 has the same matrix units."""


@dataclass
class Measured:
    """One row of the report. Times are microseconds; a peer is a time, or the reason why there is none.

    looser   peers whose arithmetic is looser than what ours is asked for: they are shown and not judged
    value    for rows that are no time against a peer
    """

    row: str
    us: float | None
    executes: str = ""
    numerics: str = ""
    peers: dict[str, float | str] = field(default_factory=dict)
    looser: dict[str, str] = field(default_factory=dict)
    floor_us: float | None = None
    bytes: int | None = None
    value: float | None = None
    note: str = ""

    def best(self) -> tuple[str, float] | None:
        """The fastest peer of the same arithmetic."""
        fair = {name: t for name, t in self.peers.items() if isinstance(t, float) and name not in self.looser}
        return min(fair.items(), key=lambda item: item[1]) if fair else None


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that share weights.

    rows  their names, known without a GPU
    run   measures those that are wanted
    warm  by peer: what its library compiles, done for all groups at once before anything is timed
    """

    rows: tuple[str, ...]
    run: Callable[[Bench, Sequence[str]], Iterator[Measured]]
    warm: Mapping[str, Callable[[], object]] = field(default_factory=dict)


class Bench:
    """The device, our operations on it, and the clock."""

    def __init__(self, ops: QuantOps, without: Sequence[str] = (), budget_ms: float = 60.0) -> None:
        self.ops, self.device, self._without, self._budget = ops, ops.device, tuple(without), budget_ms
        self.gpu = torch.cuda.get_device_name(self.device)

    def floor(self, nbytes: float, flop: float, unit: str) -> float | None:
        """Microseconds below which nothing can be."""
        read = next((rate for name, rate in _READ.items() if name in self.gpu), None)
        return None if read is None else max(nbytes / read, flop / _PEAK[unit]) * 1e6

    def time(self, calls: Sequence[Call]) -> float:
        """Median microseconds of one call, captured one after the other in a graph.

        A graph that is over soon is captured again with the calls repeated: starting it takes microseconds too.
        """
        graph, calls = self._captured(calls), list(calls)
        once = min(self._replay(graph) for _ in range(3))
        if once < _SHORT:
            calls *= min(-int(-_SHORT // max(once, 1e-3)), 64)
            graph = self._captured(calls)
            once = min(self._replay(graph) for _ in range(3))
        times = [self._replay(graph) for _ in range(max(min(int(self._budget / max(once, 1e-3)), 200), 7))]
        return statistics.median(times) * 1e3 / len(calls)

    def _captured(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()  # compiles, chooses, allocates
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for call in calls:
                    call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def compile(self, groups: Sequence[Group]) -> None:
        """What peers compile, side by side; one that breaks says so in its row."""
        jobs = [job for g in groups for name, job in g.warm.items() if not name.startswith(self._without or "\0")]
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.exception()

    def ours(self, answer: Support, calls: Callable[[], Sequence[Call]]) -> tuple[float | None, str]:
        """Our time, and why there is none: an operation that waits for the host is not timed against kernels."""
        if not answer:
            return None, f"refused: {answer.reason}"
        if not answer.graph:
            return None, f"no kernel: {answer.executes}"
        try:
            return self.time(calls()), ""
        except Exception as error:
            return None, f"failed: {said(error)}"

    def peers(self, peers: dict[str, Callable[[], Sequence[Call]]]) -> dict[str, float | str]:
        """Each peer's time, or "no peer: why"; a library that is missing or breaks ends its own row only."""
        found: dict[str, float | str] = {}
        for name, make in peers.items():
            if name.startswith(self._without or "\0"):
                found[name] = "no peer: left out"
                continue
            try:
                found[name] = self.time(make())
            except Exception as error:
                found[name] = f"no peer: {said(error)}"
            torch.cuda.synchronize(self.device)
        return found


def said(error: Exception) -> str:
    """The error in one line, with the place where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({last.name}:{last.lineno})"


def copies(nbytes: int) -> int:
    """How many copies of a weight are more than the cache holds."""
    return max(-(-ROTATE // max(nbytes, 1)), 1)


def codes(f: Format, shape: tuple[int, ...], device: torch.device) -> QTensor:
    """A quantized tensor with random codes and positive scales, made where it is needed."""
    lead, (n, k) = shape[:-2], shape[-2:]
    values = _codes(f, shape, device)

    def plane(p: Format | None, grid: tuple[int, int], *, zero: bool = False) -> Tensor | QTensor | None:
        if p is None:
            return None
        at = (*lead, *grid)
        if not p.plain:
            inner = p.block.grid(*grid) if p.block is not None else (1, 1)
            return QTensor(p, _positive(_codes(p, at, device)), plane(p.scale, inner))
        if p.element in ("bf16", "fp16", "fp32"):
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[p.element]
            return ((torch.rand(at, device=device) + 0.5) * 0.01).to(dtype)
        if p.element == "e8m0":
            return torch.randint(118, 124, at, dtype=torch.uint8, device=device)
        return _codes(p, at, device) if zero else _positive(_codes(p, at, device))

    grid = f.block.grid(n, k) if f.block is not None else (1, 1)
    return QTensor(f, values, plane(f.scale, grid), plane(f.zero, grid, zero=True))


def _positive(t: Tensor) -> Tensor:
    """Without a sign; torch has no `abs` for floats of 8 bits on a GPU."""
    return (t.view(torch.uint8) & 127).view(t.dtype) if t.is_floating_point() and t.itemsize == 1 else t.abs()


def _codes(f: Format, shape: tuple[int, ...], device: torch.device) -> Tensor:
    name = f.element
    if name.startswith("int"):
        half = 1 << (int(name[3:]) - 1)
        return torch.randint(-half, half, shape, dtype=torch.int8, device=device)
    if name.startswith("uint"):
        return torch.randint(0, 1 << int(name[4:]), shape, dtype=torch.uint8, device=device)
    if name in ("bf16", "fp16", "fp32"):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
        return torch.randn(shape, device=device, dtype=dtype)
    if name in ("e4m3fn", "e5m2"):
        dtype = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)
    bits = {"e2m1": 4, "e3m2": 6, "e2m3": 6, "nf4": 4}[name]
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, device=device)
