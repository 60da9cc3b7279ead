"""From a codebook weight to the kernel's arguments: one launch for every segment."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qhal.codebooks import STRUCTURED, CodebookFormat, CodebookSegment, CodebookTensor
from qhal.elements import WIDE
from qhal.named_tables import revision
from qhal.requests import NumericsClass, VQRequest
from qhal_portable import gemm
from qhal_portable.prepared import PreparedWeight
from qhal_triton.launching import Launcher
from qhal_triton.paths import Path
from qhal_triton.target import Target
from qhal_triton.vq.kernels import decode_kernel

BOOKS = 4
"""The most codebooks of a segment."""
LARGEST = 64
"""Elements of a vector."""
SHARE = 4096
"""Elements of a program."""
THREADS = 256
"""Of a program: with fewer, an element's address, scale and place take more registers than a thread has."""


def choose(request: VQRequest, target: Target) -> Path | None:
    """The kernel that takes the request; None: no kernel does."""
    if not isinstance(request.w, CodebookFormat) or request.out not in WIDE.values():
        return None
    if any(len(s.codebooks) > BOOKS or s.vector[0] * s.vector[1] > LARGEST for s in request.w.segments):
        return None
    return Path(
        kernel="decode",
        executes="Triton: codebook entries gathered, summed in fp32 in the order of the books, rounded once",
        numerics=NumericsClass.FP32_ACC,
        invariant=True,
    )


def run(path: Path, target: Target, p: PreparedWeight, rows: slice | None, out: Tensor | None) -> Tensor:
    """Dense rows."""
    w, request = p.stored, p.request
    assert isinstance(request, VQRequest)
    if not isinstance(w, CodebookTensor) or not readable(w):
        return gemm.vq_decode(p, rows, out)
    n, k = w.shape
    first, last, step = (0, n, 1) if rows is None else rows.indices(n)
    if step != 1:
        return gemm.vq_decode(p, rows, out)
    last = max(first, last)
    shape = (last - first, k)
    given = out is not None and (tuple(out.shape), out.dtype, out.device) == (shape, request.out, w.device)
    direct = out is not None and given and out.stride(-1) == 1
    y = out if out is not None and direct else torch.empty(shape, dtype=request.out, device=w.device)
    decode(w, y, target, first)
    return y if y is out else gemm.write(y, out)


def decode(w: CodebookTensor, y: Tensor, target: Target, first: int = 0) -> None:
    """Rows of the weight, from the first one on, into y [rows, K] of any float type."""
    before, last = 0, first + y.shape[0]
    for segment in w.segments:
        if y.shape[0]:
            _launch(w, segment, y, target, first, last, before)
        before += segment.codes.shape[1] * segment.vector[1]


def readable(w: object) -> bool:
    """Whether this is a codebook weight whose planes are floats that kernels load."""
    return isinstance(w, CodebookTensor) and all(t.dtype in WIDE.values() for t in _floats(w))


def _floats(w: CodebookTensor) -> list[Tensor]:
    tables = [t for s in w.segments for t in s.tables if isinstance(t, Tensor)]
    return tables + [t for t in (w.scale, w.column_scale, w.column_bias) if t is not None]


def _launch(
    w: CodebookTensor, s: CodebookSegment, y: Tensor, target: Target, first: int, last: int, before: int
) -> None:
    a, b = s.vector
    vectors = s.codes.shape[1]
    lines = range(first // a, -(-last // a))
    count = len(lines) * vectors
    padded = 1 << (a * b - 1).bit_length()
    share = max(SHARE // padded, 1)
    tables = book_tables(s, y.device)

    def plane(t: Tensor | None) -> Tensor:
        return tables[0] if t is None else t.contiguous()

    given = (w.scale, w.permutation, w.column_scale, w.column_bias)
    constants = (a, b, len(s.tables), divisors(s), share, padded, *(t is not None for t in given))
    _launcher(constants, THREADS // target.warp)(
        (-(-count // share), 1, 1),
        (s.codes.contiguous(), y, *tables, *(plane(t) for t in given)),
        (first, last, lines.start * vectors, count, vectors, w.shape[1], before, y.stride(0), rows_per_scale(w)),
    )


@lru_cache(maxsize=256)
def _launcher(constants: tuple[Any, ...], warps: int) -> Launcher:
    names = ("A", "B", "BOOKS", "DIVISORS", "P", "E", "SCALE", "PERMUTED", "COLUMN_SCALE", "COLUMN_BIAS")
    planes = ("scale", "permutation", "column_scale", "column_bias")
    tensors = ("codes", "out", *(f"table{i}" for i in range(BOOKS)), *planes)
    numbers = ("first", "last", "start", "count", "vectors", "columns", "before", "ostride", "per")
    fixed = dict(zip(names, constants, strict=True))
    return Launcher(decode_kernel, tensors, numbers, fixed, num_warps=warps, enable_fp_fusion=False)


def book_tables(s: CodebookSegment, device: torch.device) -> list[Tensor]:
    """As many tables as a kernel has arguments."""
    tables = [_table(t, device) for t in s.tables]
    return tables + tables[:1] * (BOOKS - len(tables))


def divisors(s: CodebookSegment) -> tuple[float, ...]:
    """One for every book."""
    return s.divisors or (1.0,) * len(s.tables)


def rows_per_scale(w: CodebookTensor) -> int:
    """One scale for all rows, one for each, or one for each row of vectors: `CodebookTensor` checked that."""
    count = 1 if w.scale is None else w.scale.numel()
    return w.shape[0] if count == 1 else 1 if count == w.shape[0] else w.segments[0].vector[0]


def _table(t: Tensor | str, device: torch.device) -> Tensor:
    return t.contiguous() if isinstance(t, Tensor) else _structured(t, revision(), device)


@lru_cache(maxsize=64)
def _structured(name: str, tables: int, device: torch.device) -> Tensor:
    """A named table on the device, in fp16 where that holds it; `tables`: the revision of all names."""
    table = STRUCTURED[name]()
    narrow = table.half()
    return (narrow if torch.equal(narrow.float(), table) else table).to(device)
