"""Indices of codebooks, as files hold them, to int32 with an axis for the codebooks of a vector. Exact."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from qhal_schemes.compiled import loops
from qhal_schemes.lanes import interleave
from qhal_schemes.packing import unpack_wide


def from_stream(packed: Tensor, fields: Sequence[int], count: int) -> Tensor:
    """int32 [..., count, C] from one dense bit stream int32 [..., words(count, sum(fields))].

    A code has fields[c] bits for codebook c, the first one's lowest; all of them together have 32 bits at most.
    """
    bits = sum(fields)
    compiled = loops("fields", packed)
    if compiled is not None and gcd(count, 16) * bits % 8 == 0:
        return _read(compiled, packed, bits, tuple(fields), count).view(*packed.shape[:-1], count, len(fields))
    codes, stages = unpack_wide(packed, bits, count), []
    if len(fields) == 1:
        return codes.unsqueeze(-1)
    for field in fields:
        stages.append(codes & ((1 << field) - 1))
        codes = codes >> field
    return interleave(stages)


def from_containers(stored: Tensor, bits: int) -> Tensor:
    """int32 [..., count]: the lowest `bits` bits of int8 or int16 [..., count], whose sign is one of them."""
    compiled = loops("fields", stored)
    if compiled is not None:
        return _read(compiled, stored, 8 * stored.itemsize, (bits,), stored.shape[-1]).view(stored.shape)
    return stored.int().bitwise_and_((1 << bits) - 1)


def _read(compiled: Any, stored: Tensor, step: int, fields: tuple[int, ...], count: int) -> Tensor:
    """int32 [rows, count * C] from rows that hold a code every `step` bits."""
    group = gcd(count, 16)
    rows, width = stored.shape[:-1].numel(), stored.shape[-1] * stored.itemsize
    raw = stored.contiguous().view(-1).view(torch.uint8).view(rows, width)
    codes: Tensor = _records(compiled, group, step, fields).unpack(raw, count // group)[0]
    return codes.view(torch.int32)


@lru_cache(maxsize=64)
def _records(compiled: Any, group: int, step: int, fields: tuple[int, ...]) -> Any:
    """Runs of `group` codes."""
    starts = [sum(fields[:c]) for c in range(len(fields))]
    lanes = [[(i * step + at, (1 << n) - 1, 0)] for i in range(group) for at, n in zip(starts, fields, strict=True)]
    return compiled.Records(group * step // 8, [compiled.Plane(4, lanes)])
