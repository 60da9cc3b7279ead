"""Ranks that end, hang and talk, for test_conformance_comm.py: made again by name in processes of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from qhal.codecs import Codec, Collective
from qhal.requests import CommRequest, Request, Support
from qhal_conformance.wrapping import Wrapped


class _Before(Wrapped):
    """Does something before a collective."""

    def _act(self, rank: int) -> None:
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
        self._act(dist.get_rank(group))
        return self._inner.comm_quant(x, collective, codec, group, splits=splits, decode=decode, out=out)


class Dies(_Before):
    def _act(self, rank: int) -> None:
        if rank == 1:
            os._exit(17)


class Hangs(_Before):
    def _act(self, rank: int) -> None:
        if rank == 1:
            time.sleep(600)


class Prints(_Before):
    def _act(self, rank: int) -> None:
        print('{"elements": 1}', flush=True)


class Raises(_Before):
    def _act(self, rank: int) -> None:
        raise RuntimeError("no such kernel")


class Refuses(Wrapped):
    """A backend that has no collectives."""

    def supports(self, request: Request) -> Support:
        if isinstance(request, CommRequest):
            return Support("not_implemented", "no collectives yet")
        return super().supports(request)

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
        raise self._refusal("comm_quant")
