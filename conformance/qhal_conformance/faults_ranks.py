"""Faults of collectives: every rank computes what all get from all ranks' numbers, or hands over and spoils the answer.

The spoiled collective is the contract's own simulation with one thing changed. Subclasses live in modules, because
every rank makes them again by their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from qhal.codecs import Codec, Collective
from qhal.collectives import simulate
from qhal_conformance.wrapping import Wrapped

_MOVED = ("all_gather", "all_to_all")


@dataclass
class Call:
    """What all ranks ask for, and who this is."""

    xs: list[Tensor]
    collective: Collective
    codec: Codec
    splits: list[Sequence[int]] | None
    decode: bool
    rank: int

    def results(self) -> list[Any]:
        """What every rank gets."""
        return simulate(self.xs, self.collective, self.codec, self.splits, decode=self.decode)

    def changed(self, **fields: Any) -> list[Any]:
        """The same with other fields."""
        return replace(self, **fields).results()

    @property
    def sums(self) -> bool:
        """Whether ranks are added up."""
        return self.collective not in _MOVED


class Together(Wrapped):
    """Every rank computes everyone's result, spoiled."""

    def _spoil(self, call: Call) -> Any:
        """This rank's result."""
        raise NotImplementedError

    def comm_quant(
        self,
        x: Tensor,
        collective: Collective,
        codec: Codec,
        group: Any,
        *,
        splits: Sequence[int] | None = None,
        decode: bool = True,
        out: Tensor | None = None,
        async_op: bool = False,
    ) -> Any:
        """Gather what everyone asks for, spoil, simulate."""
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        asked: list[Any] = [None] * world
        dist.all_gather_object(asked, (x.detach().cpu().contiguous(), splits), group=group)
        counts = None if splits is None else [s for _, s in asked]
        y = self._spoil(Call([t for t, _ in asked], collective, codec, counts, decode, rank))
        y = y.to(x.device) if isinstance(y, Tensor) else y
        if out is not None and isinstance(y, Tensor):
            y = out.copy_(y)
        return Done(y) if async_op else y


@dataclass
class Done:
    """The handle of a collective that is finished."""

    result: Any

    def wait(self) -> Any:
        """The result."""
        return self.result


class Kept(Wrapped):
    """The right collective, asked or answered in another way."""

    _out, _async = True, True

    def _after(self, x: Tensor, y: Any) -> Any:
        return y

    def comm_quant(
        self,
        x: Tensor,
        collective: Collective,
        codec: Codec,
        group: Any,
        *,
        out: Tensor | None = None,
        async_op: bool = False,
        **how: Any,
    ) -> Any:
        """Hand over, then spoil."""
        y = self._inner.comm_quant(x, collective, codec, group, out=out if self._out else None, **how)
        y = self._after(x, y)
        return Done(y) if async_op and self._async else y
