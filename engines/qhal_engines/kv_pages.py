"""The pages of a batch of sequences: which slots new tokens go to, and which pages every sequence reads.

One object serves the caches of all layers. Engines that pad a batch to a rectangle of columns keep its shape outside;
inside, only real tokens have slots, so padding is neither stored nor seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qhal.caches import AttentionBatch, Limits
from qhal.interface import QuantOps
from qhal.requests import AttentionRequest
from qhal_engines import EngineError


@dataclass(frozen=True, eq=False)
class Step:
    """The new columns of one forward pass, the same for every layer.

    slots       int64 [B * T] on the device, sequence after sequence: page * S + position, -1 for padding
    keep        int64 [real tokens]: their rows among B * T; None: all
    query_lens  int32 [B] on the host: real new tokens; kv_lens, int32 [B]: real tokens with them
    table       int32 [B, pages] on the device
    """

    start: int
    columns: int
    slots: Tensor
    keep: Tensor | None
    query_lens: Tensor
    kv_lens: Tensor
    table: Tensor


class Sequences:
    """Lengths and pages of a batch. Columns are what the engine counts, padding included; `real` says which are not.

    real  bool [B, columns] on the host
    """

    def __init__(self, page: int, device: torch.device) -> None:
        self.page, self.device = page, device
        self.real = torch.zeros(0, 0, dtype=torch.bool)
        self.pages: list[list[int]] = []
        self.count = 0
        self._step: Step | None = None

    @property
    def columns(self) -> int:
        """Columns so far."""
        return self.real.shape[1]

    def step(self, start: int, batch: int, columns: int, real: Tensor | None) -> Step:
        """The step of `columns` new columns from column `start`; the first layer that asks makes room, the rest share.

        real  bool [B, start + columns], which columns hold tokens; None: all. EngineError if it contradicts what
              earlier steps said, or if the batch changed
        """
        if self._step is not None and (self._step.start, self._step.columns) == (start, columns):
            return self._step
        if start != self.columns:
            raise EngineError(f"the cache holds {self.columns} columns, a layer continues at {start}")
        seen = torch.ones(batch, start + columns, dtype=torch.bool) if real is None else real.to("cpu", torch.bool)
        if not self.pages:
            self.real, self.pages = torch.zeros(batch, 0, dtype=torch.bool), [[] for _ in range(batch)]
        if batch != len(self.pages):
            raise EngineError(f"the cache holds {len(self.pages)} sequences, this step has {batch}")
        if not torch.equal(seen[:, :start], self.real):
            raise EngineError(
                "attention_mask hides other columns than in the calls before: what is in the cache cannot be masked "
                "afterwards.\n  do: pass the same mask, longer by the new columns, in every call"
            )
        self._step = self._extend(seen, start, columns)
        return self._step

    def _extend(self, seen: Tensor, start: int, columns: int) -> Step:
        before, new = self.real.sum(1), seen[:, start:]
        self.real, lens = seen, seen.sum(1)
        for own, length in zip(self.pages, lens.tolist(), strict=True):
            while len(own) * self.page < length:
                own.append(self.count)
                self.count += 1
        table = self._table()
        position = (before[:, None] + new.cumsum(1) - 1).clamp(min=0)
        slots = table.gather(1, position // self.page) * self.page + position % self.page
        slots = torch.where(new, slots, -1).flatten()
        keep = None if bool(new.all()) else new.flatten().nonzero().flatten().to(self.device)
        return Step(
            start,
            columns,
            slots.to(self.device),
            keep,
            new.sum(1).to(torch.int32),
            lens.to(torch.int32),
            table.to(self.device, torch.int32),
        )

    def crop(self, columns: int) -> None:
        """Forgets the last `columns` columns; their pages stay with their sequences."""
        self.real = self.real[:, : self.columns - columns].clone()
        self._step = None

    def select(self, indices: Tensor) -> Tensor:
        """Sequence i becomes a copy of the old sequence indices[i]; returns int64 [pages]: new page -> old page."""
        chosen = indices.tolist()
        old = [page for i in chosen for page in self.pages[i]]
        fresh = iter(range(len(old)))
        self.pages = [[next(fresh) for _ in self.pages[i]] for i in chosen]
        self.real, self.count, self._step = self.real[chosen], len(old), None
        return torch.tensor(old, dtype=torch.int64, device=self.device)

    def _table(self) -> Tensor:
        """int64 [B, pages] on the host; entries past a sequence's pages are 0 and are not read."""
        longest = max((len(own) for own in self.pages), default=0)
        rows = [own + [0] * (max(longest, 1) - len(own)) for own in self.pages]
        return torch.tensor(rows, dtype=torch.int64)


class Batches:
    """The attention batches of a model: one for every kind of request, planned once a step for all layers."""

    def __init__(self, ops: QuantOps) -> None:
        self._ops = ops
        self._made: dict[AttentionRequest, tuple[Limits, AttentionBatch]] = {}
        self._planned: dict[AttentionRequest, Step] = {}

    def get(self, request: AttentionRequest, step: Step) -> AttentionBatch:
        """The batch of this request, planned with the lengths and pages of this step."""
        need = (len(step.query_lens), int(step.query_lens.sum()), step.table.shape[1])
        found = self._made.get(request)
        if found is None or any(
            n > m for n, m in zip(need, (found[0].batch, found[0].tokens, found[0].pages), strict=True)
        ):
            limits = Limits(need[0], max(need[1], 1), 2 * need[2])  # pages grow with every token: ask rarely
            found = self._made[request] = (limits, self._ops.attention_batch(request, limits))
            self._planned.pop(request, None)
        if self._planned.get(request) is not step:
            found[1].plan(step.query_lens, step.kv_lens, step.table)
            self._planned[request] = step
        return found[1]
