"""The wire of `comm_quant`: what a part of a tensor is between two ranks, byte for byte.

A part [rows, K] is quantized on its own (`qhal.encoding`: blocks never reach into another part). Its bytes are every
plane in the order of `QTensor.planes()`, nested planes in place: codes, scale (its codes, then its scales), zero,
offset. A plane is its elements row by row as one little-endian bit stream: element i of b bits fills the bits i * b to
i * b + b - 1 of the stream, bit j being bit j % 8 of byte j // 8; the last byte is filled up with zeros. Elements of 16
and 32 bits are little-endian floats; integers are two's complement. With `Codec.planes` the codes are one such stream
per bit plane, low bits first. Nothing else travels: both sides know shape and codec (`qhal/collectives.py`, header).

`order=parity`: within 64 columns of a row, even ones share a scale and odd ones share the next: the scale grid is
[rows, 2 * ceil(K / 64)], a last short run has both. Codes stay in column order, so the order is a `group_index`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from qhal.codecs import Codec
from qhal.elements import Element, element, lookup
from qhal.encoding import encode
from qhal.formats import Format
from qhal.tensors import QTensor

_RUN = 64  # columns whose even and odd members are the two groups of order=parity


Quantize = Callable[[Tensor, Format], QTensor]
"""What makes codes and scales: `encode`, or something with its bits."""


def encode_part(x: Tensor, codec: Codec, quantize: Quantize = encode) -> QTensor:
    """Rows [rows, K] as codes and scales: `quantize`, with the groups of codec.order."""
    if codec.order == "sequential":
        return quantize(x, codec.format)
    rows, k = x.shape
    wide = pad(x, (0, -k % _RUN))  # zeros change no scale
    runs = wide.shape[1] // _RUN
    q = quantize(wide.reshape(rows, runs, _RUN // 2, 2).transpose(-1, -2).reshape(wide.shape), codec.format)
    codes = q.codes.reshape(rows, runs, 2, _RUN // 2).transpose(-1, -2).reshape(wide.shape)[:, :k].contiguous()
    return replace(q, codes=codes, group_index=_parity(k, codes.device))


def wire_bytes(q: QTensor, codec: Codec) -> Tensor:
    """What travels for a part that `encode_part` made: uint8 [wire_size(codec, rows, K)], laid out as said above."""
    streams = [
        _pack(plane, e, codec.planes if name == "codes" else ())
        for (name, plane), e in zip(_planes(q), _elements(q.format), strict=True)
    ]
    return torch.cat(streams)


def read_wire(data: Tensor, codec: Codec, rows: int, k: int) -> QTensor:
    """The part [rows, K] that these bytes stand for: the inverse of `wire_bytes`, bit for bit."""
    at = 0

    def take(e: Element, n: int, columns: int, widths: tuple[int, ...]) -> Tensor:
        nonlocal at
        size = _size(e, n * columns, widths)
        at += size
        return _unpack(data[at - size : at], e, n * columns, widths).reshape(n, columns)

    index = None if codec.order == "sequential" else _parity(k, data.device)
    return _build(codec.format, rows, k, _columns(codec, k), take, codec.planes, index)


@lru_cache(maxsize=4096)
def wire_size(codec: Codec, rows: int, k: int) -> int:
    """Bytes of a part [rows, K]."""
    return _bytes(codec.format, rows, k, _columns(codec, k), codec.planes)


def _columns(codec: Codec, k: int) -> int:
    """How many columns the scale grid covers."""
    return k if codec.order == "sequential" else k + -k % _RUN


def _parity(k: int, device: torch.device) -> Tensor:
    column = torch.arange(k, device=device)
    return (column // _RUN * 2 + column % 2).int()


def _planes(q: QTensor) -> list[tuple[str, Tensor]]:
    kept = ("group_index", "table")  # both sides know them
    return [(name, plane) for name, plane in q.planes().items() if name.rpartition(".")[2] not in kept]


def _elements(f: Format) -> Iterator[Element]:
    """The element of every plane, in the order of `QTensor.planes()`."""
    for level in f.levels():
        yield element(level.element)


def _bytes(f: Format, n: int, k: int, columns: int, widths: tuple[int, ...] = ()) -> int:
    total = _size(element(f.element), n * k, widths)
    if f.block is not None:
        grid = f.block.grid(n, columns)
        total += sum(_bytes(plane, *grid, grid[1]) for plane in (f.scale, f.zero, f.offset) if plane is not None)
    return total


def _build(
    f: Format,
    n: int,
    k: int,
    columns: int,
    take: Callable[[Element, int, int, tuple[int, ...]], Tensor],
    widths: tuple[int, ...] = (),
    index: Tensor | None = None,
) -> QTensor:
    codes = take(element(f.element), n, k, widths)
    table = lookup(f.element) if f.element == "lut8" else None
    table = table if table is None else table.to(codes.device)
    if f.block is None:
        return QTensor(f, codes, table=table)
    grid = f.block.grid(n, columns)

    def plane(inner: Format | None) -> Tensor | QTensor | None:
        if inner is None:
            return None
        return take(element(inner.element), *grid, ()) if inner.plain else _build(inner, *grid, grid[1], take)

    scale, zero, offset = plane(f.scale), plane(f.zero), plane(f.offset)
    return QTensor(f, codes, scale, zero, offset, table=table, group_index=index)


def _size(e: Element, count: int, widths: tuple[int, ...] = ()) -> int:
    return sum(-(-count * bits // 8) for bits in widths or (e.bits,))


def _pack(codes: Tensor, e: Element, widths: tuple[int, ...] = ()) -> Tensor:
    raw = codes.contiguous().flatten().view(torch.uint8)
    if e.bits > 8:
        return raw
    streams, shift = [], 0
    for bits in widths or (e.bits,):
        streams.append(_pack_bits((raw >> shift) & ((1 << bits) - 1), bits))
        shift += bits
    return torch.cat(streams)


def _unpack(data: Tensor, e: Element, count: int, widths: tuple[int, ...] = ()) -> Tensor:
    if e.bits > 8:
        return data.clone().view(e.storage)  # a copy: a view needs an aligned start
    raw, shift, at = torch.zeros(count, dtype=torch.uint8, device=data.device), 0, 0
    for bits in widths or (e.bits,):
        size = -(-count * bits // 8)
        raw |= _unpack_bits(data[at : at + size], bits, count) << shift
        shift, at = shift + bits, at + size
    if e.kind == "int":
        half = 1 << (e.bits - 1)
        return ((raw.int() ^ half) - half).to(e.storage)
    return raw.view(e.storage)


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits as a bit stream: eight codes are a word of `bits` bytes."""
    if bits == 8:
        return codes
    count = codes.numel()
    within, bytes_ = _steps(8, bits, codes.device), _steps(bits, 8, codes.device)
    words = pad(codes, (0, -count % 8)).reshape(-1, 8).long() << within
    stream = (words.sum(1, keepdim=True) >> bytes_) & 255
    return stream.to(torch.uint8).flatten()[: -(-count * bits // 8)]


def _unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    if bits == 8:
        return stream
    within, bytes_ = _steps(8, bits, stream.device), _steps(bits, 8, stream.device)
    whole = pad(stream, (0, -stream.numel() % bits)).reshape(-1, bits).long()
    words = (whole << bytes_).sum(1, keepdim=True)
    return ((words >> within) & ((1 << bits) - 1)).to(torch.uint8).flatten()[:count]


def _steps(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * step, step, device=device)
