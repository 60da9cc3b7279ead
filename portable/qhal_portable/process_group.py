"""comm_quant over a torch.distributed group: carry the messages of one `collectives.Rank` with `all_to_all_single`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from qhal.codecs import Codec, Collective
from qhal.collectives import Exchange, Rank, Result, Steps
from qhal.errors import CommError, QhalError
from qhal.wire import Quantize
from qhal_portable.current_device import current
from qhal_portable.gemm import write


class Pending:
    """A collective under way over a group. `wait` finishes it: the result, or the error, every time it is called."""

    def __init__(self, steps: Steps, what: str, group: Any, out: Tensor | None, device: torch.device) -> None:
        self._steps, self._what, self._group, self._out, self._device = steps, what, group, out, device
        self._result: Result | None = None
        self._fault: QhalError | None = None
        self._buffers: tuple[Tensor, ...] = ()  # the work under way reads and writes them
        self._work: dist.Work | None = None
        self._launch(next(steps))

    def wait(self) -> Result:
        """Block until every message has arrived; CommError if a rank died or disagrees."""
        with current(self._device):
            while self._result is None and self._fault is None:
                try:
                    self._finish()
                except QhalError as fault:
                    self._fault = fault
        if self._fault is not None:
            raise self._fault
        assert self._result is not None
        return self._result

    def _finish(self) -> None:
        try:
            if self._work is not None:
                self._work.wait()
        except RuntimeError as lost:
            self._lost(lost)
        try:
            self._launch(self._steps.send(list(self._buffers[0].split(self._sizes))))
        except StopIteration as done:
            result: Result = done.value
            self._result = write(result, self._out) if isinstance(result, Tensor) else result

    def _launch(self, e: Exchange) -> None:
        sent = torch.cat(e.messages).to(self._device)
        arriving = torch.empty(sum(e.sizes), dtype=torch.uint8, device=self._device)
        self._buffers, self._sizes = (arriving, sent), e.sizes
        sizes = [m.numel() for m in e.messages]
        try:
            self._work = dist.all_to_all_single(arriving, sent, e.sizes, sizes, group=self._group, async_op=True)
        except RuntimeError as lost:
            self._lost(lost)

    def _lost(self, error: RuntimeError) -> NoReturn:
        raise CommError(
            f"{self._what}: a rank died, or did not answer within the group's timeout, or the group carries no tensors "
            f"on {self._device} (gloo carries the processor's): {str(error).splitlines()[0]}; end all ranks and start "
            "them again"
        ) from error


def start(
    x: Tensor,
    collective: Collective,
    codec: Codec,
    group: Any,
    splits: Sequence[int] | None,
    decode: bool,
    out: Tensor | None,
    device: torch.device,
    quantize: Quantize,
) -> Pending:
    """Begin a collective: x is read and the header is on its way when this returns. The rest happens in `wait`.

    quantize  what parts are encoded with; the bits are those of `qhal.encoding.encode`
    """
    if not dist.is_available() or not dist.is_initialized():
        raise CommError(f"comm_quant {collective}: there is no group; call torch.distributed.init_process_group first")
    outside = f"comm_quant {collective}: this process is not in the group; call it on the group's ranks only"
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gives the others
        raise CommError(outside)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise CommError(f"comm_quant {collective}: group is a {type(group).__name__}, must be a ProcessGroup or None")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise CommError(outside)
    steps = Rank(x, collective, codec, splits, decode, rank, world, out, device, quantize).steps()
    return Pending(steps, f"comm_quant {collective} on rank {rank} of {world}", group, out, device)
