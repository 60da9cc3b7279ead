"""One row: prepared, held against the definition, then decoded and prefilled against the clock."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model_rows import definition, weights
from model_rows.decoder import Caches, Decoder, glue
from model_rows.rows import Row
from model_rows.shape import Shape
from qhal.interface import QuantOps
from qhal.layers import requests
from qhal.requests import HadamardRequest, Request, Support
from qhal.specs import LinearSpec

GIB = 1 << 30


@dataclass
class Measured:
    """One row of the report. Times in seconds, sizes in bytes.

    decode      tokens per second by the number of sequences: plan, graph and next token of every step
    device_s    seconds of one step without its plan, by the number of sequences: what the device needs
    error       relative RMS of the last hidden state against the definition: of the prompt, of one decoded token
    weights     what `prepare` keeps, embedding and head not counted
    peak        largest size that all tensors on the device had together while tokens were made
    seconds     what making and measuring took: "prepare" is that of all layers
    graph       whether the steps were replayed from a captured graph
    """

    row: str
    bits: float = 0.0
    weights: int = 0
    caches: int = 0
    peak: int = 0
    decode: dict[int, float] = field(default_factory=dict)
    device_s: dict[int, float] = field(default_factory=dict)
    prefill: float | None = None
    error: tuple[float, float] | None = None
    graph: bool = False
    executes: str = ""
    attention: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    note: str = ""


class Runner:
    """Runs rows one after the other; the caches of the last format are kept, the weights of a row are not."""

    def __init__(self, ops: QuantOps, shape: Shape) -> None:
        self.ops, self.shape = ops, shape
        self._caches: tuple[str, Caches] | None = None
        glue(compiled=ops.device.type == "cuda")  # imports the compiler now, not within the first row's time

    @torch.inference_mode()
    def run(self, row: Row) -> Measured:
        """A row that cannot be run says why in its note."""
        found = Measured(row.name)
        try:
            self._measure(row, found)
        except Exception as error:  # one row that breaks must not take the others with it
            found.note = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if self.ops.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        return found

    def _measure(self, row: Row, found: Measured) -> None:
        ops = self.ops

        def timed(name: str, call: Callable[[], Any]) -> Any:
            found.seconds[name], result = self._timed(call)
            return result

        caches = timed("caches", partial(self._caches_of, row.kv))
        given = timed("quantize", partial(weights.specs, row, self.shape, ops.device))
        model = timed("prepare", partial(Decoder, ops, self.shape, row, given))
        found.bits, found.weights, found.caches = weights.bits(row, given), model.nbytes, caches.nbytes
        products, cache = self._answers(row, given, caches)
        found.executes = " | ".join(dict.fromkeys(a.executes for a in products)) or "torch.nn.functional.linear"
        found.attention = cache[-1].executes
        found.graph = all(a.graph for a in (*products, *cache))
        found.error = timed("check", partial(self._checked, model, given, caches))
        given.clear()
        self._reset_peak()
        for batch in self.shape.batches:
            step = partial(self._decode, model, caches, batch, graph=found.graph)
            whole, found.device_s[batch] = timed(f"decode {batch}", step)
            found.decode[batch] = batch / whole
        found.prefill = timed("prefill", partial(self._prefill, model, caches))
        found.peak = ops.memory_stats().peak

    def _caches_of(self, kv: str) -> Caches:
        if self._caches is None or self._caches[0] != kv:
            self._caches = None
            self._caches = (kv, Caches(self.ops, self.shape, kv))
        return self._caches[1]

    def _answers(self, row: Row, given: dict[str, LinearSpec], caches: Caches) -> tuple[list[Support], list[Support]]:
        """What is executed: products and their rotations; writing and reading of the cache."""
        asked: list[Request] = []
        if row.family != "torch":
            for spec in given.values():
                asked += requests(spec.format, torch.bfloat16, m=(1, self.shape.prompt))
        asked.sort(key=lambda r: isinstance(r, HadamardRequest))  # products first
        cache = [caches.kv, caches.request("decode")]
        return [self.ops.supports(r) for r in asked], [self.ops.supports(r) for r in cache]

    def _checked(self, model: Decoder, given: dict[str, LinearSpec], caches: Caches) -> tuple[float, float]:
        """Errors of the prompt's last row and of one decoded token."""
        count = self.shape.checked
        g = torch.Generator().manual_seed(1)
        ids = torch.randint(0, self.shape.vocab, (count + 1,), generator=g).to(self.ops.device)
        table = caches.flat[None, : -(-(count + 1) // self.shape.page)]
        prompt = caches.batch("prefill", 1, count)
        prompt.plan(_host([count]), _host([count]), table)
        positions = torch.arange(count + 1, device=self.ops.device)
        slots = _slots(table[0], positions, self.shape.page)
        one = caches.batch("decode", 1, 1)
        if table.shape[1] > self.shape.pages:
            raise ValueError(f"{count + 1} tokens are checked, {self.shape.context} are the context")
        first = model.hidden(ids[:-1], positions[:-1], slots[:-1], caches, prompt)[-1]
        one.plan(_host([1]), _host([count + 1]), table)
        second = model.hidden(ids[-1:], positions[-1:], slots[-1:], caches, one)[0]
        exact = definition.hidden(model, given, caches.kv.k, ids)
        return definition.error(first, exact[-2]), definition.error(second, exact[-1])

    def _decode(self, model: Decoder, caches: Caches, batch: int, *, graph: bool) -> tuple[float, float]:
        """Seconds of one step up to the last token of the context: with its plan, and without."""
        shape, device = self.shape, self.ops.device
        planned, table = caches.batch("decode", batch, batch), caches.table[:batch]
        start = shape.context - shape.steps
        ids = torch.zeros(batch, dtype=torch.int64, device=device)
        positions = torch.full((batch,), start - 1, dtype=torch.int64, device=device)

        def step() -> None:
            positions.add_(1)
            pages = table.gather(1, (positions // shape.page)[:, None])[:, 0].long()
            slots = pages * shape.page + positions % shape.page
            ids.copy_(model.next(model.hidden(ids, positions, slots, caches, planned)))

        def plan(length: int) -> None:
            planned.plan(_host([1] * batch), _host([length] * batch), table)

        plan(start + 1)
        replay: Callable[[], Any] = self.ops.capture(step) if graph else step

        def steps(*, planning: bool) -> None:
            positions.fill_(start - 1)
            for i in range(shape.steps):
                if planning:
                    plan(start + 1 + i)
                replay()

        repeat = 3 if graph else 1
        times = [min(self._timed(partial(steps, planning=p))[0] for _ in range(repeat)) for p in (True, False)]
        return times[0] / shape.steps, times[1] / shape.steps

    def _prefill(self, model: Decoder, caches: Caches) -> float:
        """Tokens per second of one prompt, without a graph; the head reads its last row."""
        count, device = self.shape.prompt, self.ops.device
        batch = caches.batch("prefill", 1, count)
        table = caches.flat[None, : -(-count // self.shape.page)]
        positions = torch.arange(count, device=device)
        slots = _slots(table[0], positions, self.shape.page)
        ids = positions % self.shape.vocab

        def once() -> None:
            batch.plan(_host([count]), _host([count]), table)
            model.next(model.hidden(ids, positions, slots, caches, batch)[-1:])

        return count / statistics.median(self._timed(once)[0] for _ in range(3 if device.type == "cuda" else 1))

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self.ops.synchronize()
        began = time.perf_counter()
        result = call()
        self.ops.synchronize()
        return time.perf_counter() - began, result

    def _reset_peak(self) -> None:
        if self.ops.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.ops.device)


def _host(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _slots(pages: Tensor, positions: Tensor, page: int) -> Tensor:
    return pages[positions // page].long() * page + positions % page
