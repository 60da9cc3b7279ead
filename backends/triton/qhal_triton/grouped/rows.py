"""Groups as the product's kernel takes them: where every expert's rows start, and bounds for the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from qhal.errors import BatchError, FormatError
from qhal.groups import Groups, Indexed, Masked, Offsets
from qhal_triton.gemm.launch import Rows
from qhal_triton.grouped.kernels.order import order
from qhal_triton.launching import Launcher


def rows_of(groups: Groups, shape: tuple[int, ...], experts: int) -> Rows:
    """The rows of x [T, K] (masked: [E, M, K]) by expert; BatchError or FormatError for sizes that do not fit.

    Counts stay on the device: numbers outside of what the contract allows are cut to it, not found.
    """
    if isinstance(groups, Masked):
        return _masked(groups, shape, experts)
    return _indexed(groups, shape, experts) if isinstance(groups, Indexed) else _offsets(groups, shape, experts)


def _offsets(groups: Offsets, shape: tuple[int, ...], experts: int) -> Rows:
    if groups.offsets.numel() != experts + 1:
        raise BatchError(f"offsets are {groups.offsets.numel()} numbers, must be {experts + 1} for {experts} experts")
    return Rows("offsets", groups.offsets.contiguous(), None, _at_most(shape[0], experts), shape[0], shape[0], 1)


def _masked(groups: Masked, shape: tuple[int, ...], experts: int) -> Rows:
    if len(shape) != 3:
        raise FormatError(f"x is {shape}; masked groups need [E, M, K]")
    if groups.counts.numel() != experts or shape[0] != experts:
        raise BatchError(
            f"counts are {groups.counts.numel()} numbers and x is {shape}; the weight has {experts} experts"
        )
    most = shape[1]
    return Rows(
        "masked", groups.counts.contiguous(), None, lambda bm: experts * -(-most // bm), experts * most, most, 1
    )


def _indexed(groups: Indexed, shape: tuple[int, ...], experts: int) -> Rows:
    tokens, top = groups.ids.shape
    pairs = tokens * top
    if shape[0] != (pairs if groups.pairs else tokens):
        raise BatchError(f"x has {shape[0]} rows, ids {(tokens, top)} need {pairs if groups.pairs else tokens}")
    starts, sorted_pairs = _sorted(groups, experts)
    return Rows("indexed", starts, sorted_pairs, _at_most(pairs, experts), pairs, pairs, 1 if groups.pairs else top)


def _sorted(groups: Indexed, experts: int) -> tuple[Tensor, Tensor]:
    """(starts [experts + 1], pairs sorted by expert), kept with the groups where that can be known to be still right.

    A replay of a graph must sort the numbers that the ids have then, and a tensor of inference mode has no version that
    would tell of a change.
    """
    ids = groups.ids
    lasting = not ids.is_inference() and not (ids.is_cuda and torch.cuda.is_current_stream_capturing())
    key = f"sorted {experts} {ids._version} {ids.data_ptr()}" if lasting else ""
    if lasting and key in groups.cache:
        found: tuple[Tensor, Tensor] = groups.cache[key]
        return found
    flat = ids.reshape(-1)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=ids.device)
    pairs = torch.empty(flat.numel(), dtype=torch.int32, device=ids.device)
    _ordering()((experts + 1, 1, 1), (flat, starts, pairs), (flat.numel(), experts))
    if lasting:
        groups.cache[key] = (starts, pairs)
    return starts, pairs


@lru_cache(maxsize=1)
def _ordering() -> Launcher:
    names = ("ids", "starts", "sorted_pairs"), ("pairs", "experts")
    return Launcher(order, *names, {"BLOCK": 1024}, num_warps=4)


def _at_most(rows: int, experts: int) -> Callable[[int], int]:
    """Tiles of sorted rows: those of every expert, and of none, may end in a short one; no tile is empty."""
    return lambda bm: min(rows // bm + experts + 1, rows)
