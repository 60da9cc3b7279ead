"""comm_quant: quantized collectives. What one rank does is one generator; a group or a simulation carries its messages.

A rank yields an Exchange, a byte message for every rank (itself included), and is sent the messages of all ranks, in
rank order. `simulate` drives N such ranks in one process and is the definition; a backend may drive one `Rank` over a
torch.distributed group. Both run the same lines, so their results have the same bits.

Rows: x [..., K] is seen as [T, K]; parts are whole rows, `part_rows` gives them. Rank r owns part r.
Numerics: a part is encoded in fp32 by the rule of the format and decoded in fp32. A sum starts with rank 0's
contribution and adds the others in rank order; every contribution and partial sum is rounded to codec.accumulate (fp32:
one fp32 addition each). all_reduce encodes that sum, unrounded, for the way back; without requantize it is rounded to
x.dtype first, which is then the result. Every result is rounded once to x.dtype (half to even; overflow is Inf).
With quantize_own=False the part that a rank keeps for itself enters as it is: for all_reduce the values then depend on
who owns which rows. Specials are those of `encode`: NaN, and Inf under a computed scale, make their block NaN wherever
it, or a sum with it, arrives.

Header: the first message, 512 + 8 * N bytes, never pickled: SHA-256 of a text that holds version, collective, codec,
dtype, shape and splits (or why this rank cannot take part), that text cut to 480 bytes, and the rows for every rank as
int64. A rank that must refuse still sends it, so no rank waits for one that has left with an error.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from operator import index

import torch
from torch import Tensor

from qhal.codecs import Codec, Collective, refusals
from qhal.elements import WIDE, dtype_name
from qhal.encoding import encode
from qhal.errors import CommError, FormatError, QhalError, UnsupportedError
from qhal.requests import CommRequest, Support
from qhal.tensors import QTensor
from qhal.wire import Quantize, encode_part, read_wire, wire_bytes, wire_size

_TEXT = 480
_HEADER = 32 + _TEXT


@dataclass(frozen=True)
class Exchange:
    """One step between all ranks: a uint8 message for every rank, and how many bytes come from every rank."""

    messages: list[Tensor]
    sizes: list[int]


Result = Tensor | QTensor
Steps = Generator[Exchange, list[Tensor], Result]


def part_rows(rows: int, world: int) -> list[int]:
    """Rows of every rank's part: rows // world each, the first rows % world parts one more (parts may be empty)."""
    return [rows // world + (r < rows % world) for r in range(world)]


def simulate(
    xs: Sequence[Tensor],
    collective: Collective,
    codec: Codec,
    splits: Sequence[Sequence[int]] | None = None,
    *,
    decode: bool = True,
) -> list[Result]:
    """What every rank gets when rank r calls comm_quant(xs[r], splits=splits[r]): the definition, in one process.

    Raises what every rank would raise.
    """
    if splits is not None and len(splits) != len(xs):
        raise FormatError(f"splits has {len(splits)} entries for {len(xs)} ranks: one list of counts per rank")
    ranks = [
        Rank(x, collective, codec, None if splits is None else splits[r], decode, r, len(xs)).steps()
        for r, x in enumerate(xs)
    ]
    pending = [next(rank) for rank in ranks]
    while True:
        received = [[e.messages[r] for e in pending] for r in range(len(ranks))]
        results: list[Result] = []
        for r, rank in enumerate(ranks):
            try:
                pending[r] = rank.send(received[r])
            except StopIteration as done:
                results.append(done.value)
        if results or not ranks:
            return results


class Rank:
    """One rank's part in one collective, of a tensor on `device` (None: the processor); headers are the processor's.

    quantize  what parts are encoded with; the bits are those of `encode`
    """

    def __init__(
        self,
        x: Tensor,
        collective: Collective,
        codec: Codec,
        splits: Sequence[int] | None,
        decode: bool,
        rank: int,
        world: int,
        out: Tensor | None = None,
        device: torch.device | None = None,
        quantize: Quantize = encode,
    ) -> None:
        self.x, self.collective, self.codec, self.decode = x, collective, codec, decode
        self.rank, self.world = rank, world
        self.device = torch.device("cpu") if device is None else device
        self._quantize = quantize
        self.counts: list[int] = [0] * world
        self.fault: QhalError | None = None
        try:
            self._accept(splits, out)
            self.words = self._words(splits is not None)
        except QhalError as fault:
            self.fault, self.words = fault, f"refused: {fault}"

    def steps(self) -> Steps:
        """Agree, then exchange the quantized parts; returns this rank's result."""
        messages, kept = ([], None) if self.fault is not None else self._outgoing()  # reads x now, before any wait
        header = self._header()
        headers = yield Exchange([header] * self.world, [header.numel()] * self.world)
        _agree(headers)
        if self.fault is not None:  # the same on every rank
            raise self.fault
        arriving = self._arriving(headers)
        received = yield Exchange(messages, [wire_size(self.codec, n, self.k) for n in arriving])
        parts = [read_wire(m, self.codec, n, self.k) for m, n in zip(received, arriving, strict=True)]
        if not self.decode:
            return QTensor.concat([p for p in parts if p.shape[0]] or parts[:1], 0)
        values = [p.dequantize() for p in parts]
        if kept is not None:
            values[self.rank] = kept
        if self.collective in ("all_gather", "all_to_all"):
            return torch.cat(values).to(self.x.dtype)
        total = self._sum(values)
        if self.collective == "reduce_scatter":
            return total.to(self.x.dtype)
        return (yield from self._share(total))

    def _outgoing(self) -> tuple[list[Tensor], Tensor | None]:
        """The message for every rank, and this rank's own part if it is not to be quantized."""
        rows = self.x.detach().reshape(self.rows, self.k)
        if self.collective == "all_gather":
            return [wire_bytes(self._encoded(rows), self.codec)] * self.world, None
        parts = rows.split(self.counts)
        messages = [wire_bytes(self._encoded(part), self.codec) for part in parts]
        return messages, None if self.codec.quantize_own else parts[self.rank].clone().float()

    def _encoded(self, rows: Tensor) -> QTensor:
        return encode_part(rows, self.codec, self._quantize)

    def _share(self, total: Tensor) -> Steps:
        """The way back of all_reduce: this rank's reduced part to everyone, and everyone's to this rank."""
        dtype = self.x.dtype
        if self.codec.requantize:
            message = wire_bytes(self._encoded(total), self.codec)
            sizes = [wire_size(self.codec, n, self.k) for n in self.counts]
        else:
            message = total.to(dtype).contiguous().flatten().view(torch.uint8)
            sizes = [n * self.k * dtype.itemsize for n in self.counts]
        received = yield Exchange([message] * self.world, sizes)
        if self.codec.requantize:
            parts = zip(received, self.counts, strict=True)
            reduced = torch.cat([read_wire(m, self.codec, n, self.k).dequantize(dtype) for m, n in parts])
        else:
            reduced = torch.cat([m.clone().view(dtype) for m in received])
        return reduced.reshape(self.x.shape)

    def _sum(self, values: list[Tensor]) -> Tensor:
        kind = WIDE[self.codec.accumulate]
        total = values[0].to(kind)
        for value in values[1:]:
            total = (total.float() + value.to(kind).float()).to(kind)  # fp32 is wide enough to round 16 bits once
        return total.float()

    def _accept(self, splits: Sequence[int] | None, out: Tensor | None) -> None:
        """Check everything that needs no other rank, and find the rows of every part."""
        x, what = self.x, f"comm_quant {self.collective}"
        if not isinstance(x, Tensor):
            raise FormatError(f"{what}: x is a {type(x).__name__}, must be a tensor [T, K]")
        request = CommRequest(
            collective=self.collective,
            codec=self.codec,
            world=self.world,
            x=x.dtype,
            numel=x.numel(),
            decode=self.decode,
        )
        reasons = "; ".join(refusals(request))
        if reasons:
            raise UnsupportedError(Support("unsupported", reasons), f"{what} {x.dtype} as {self.codec}")
        wanted = "[..., K]" if self.collective == "all_reduce" else "[T, K]"
        if x.device != self.device or x.dim() < 1 or (x.dim() != 2 and self.collective != "all_reduce"):
            raise FormatError(f"{what}: x is {tuple(x.shape)} on {x.device}, must be {wanted} on {self.device}")
        if out is not None and not self.decode:
            raise FormatError(f"{what}: out cannot take a QTensor; leave it out with decode=False")
        self.rows, self.k = x.shape[:-1].numel(), x.shape[-1]
        rows = self.rows
        if splits is None:
            self.counts = [rows] * self.world if self.collective == "all_gather" else part_rows(rows, self.world)
            return
        if self.collective == "all_reduce":
            raise FormatError(f"{what}: every rank gets everything, so splits have no meaning")
        try:
            self.counts = [index(n) for n in splits]
        except TypeError:
            raise FormatError(f"{what}: splits must be host integers, got {splits!r}") from None
        found = self.counts[self.rank] if self.collective == "all_gather" and self._fits() else sum(self.counts)
        if not self._fits() or found != rows:
            raise FormatError(
                f"{what}: splits={self.counts} must be {self.world} counts of at least 0 that "
                f"{'say the rows of every rank' if self.collective == 'all_gather' else 'add up to the rows'}; "
                f"x has {rows} rows"
            )

    def _fits(self) -> bool:
        return len(self.counts) == self.world and min(self.counts) >= 0

    def _words(self, split: bool) -> str:
        """What must be the same on every rank."""
        shape: tuple[object, ...] = tuple(self.x.shape)
        if split and self.collective != "reduce_scatter":
            shape = ("*", self.k)  # rows may differ
        splits = f" splits={self.counts}" if split and self.collective != "all_to_all" else " split" * split
        dims = ", ".join(str(n) for n in shape)
        c = self.codec
        return f"version {c.version} {self.collective} {dtype_name(self.x.dtype)} [{dims}]{splits} as {c}"

    def _header(self) -> Tensor:
        text = self.words.encode()
        head = sha256(text).digest() + text[:_TEXT].ljust(_TEXT, b"\0")
        counts = self.counts if self.fault is None else [0] * self.world
        tail = torch.tensor(counts, dtype=torch.int64, device="cpu").view(torch.uint8)
        return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), tail])

    def _arriving(self, headers: list[Tensor]) -> list[int]:
        """Rows that come from every rank."""
        if self.collective == "all_gather":
            return self.counts
        if self.collective != "all_to_all":
            return [self.counts[self.rank]] * self.world
        return [int(h[_HEADER:].clone().view(torch.int64)[self.rank]) for h in headers]


def _agree(headers: list[Tensor]) -> None:
    """Nothing if every rank wants the same, else one CommError with the same text on every rank."""
    said: dict[bytes, list[int]] = {}
    for rank, header in enumerate(headers):
        said.setdefault(bytes(header[:_HEADER].tolist()), []).append(rank)
    if len(said) > 1:
        lines = []
        for head, ranks in said.items():
            text = head[32:].rstrip(bytes(1)).decode(errors="replace")
            lines.append(f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {text}")
        listing = "\n  ".join(lines)
        raise CommError(f"comm_quant: the ranks of the group disagree; nothing was sent\n  {listing}")
