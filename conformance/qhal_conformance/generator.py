"""Random inputs from integer arithmetic alone: the same bytes on every platform, in every version of every library.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, SC 2011) is counter-based: value i of a stream needs
no other value. A stream is keyed by (suite major version, case id, stream name), so no case can disturb another, and an
input that is added to a case does not change the others. No logarithm, no cosine: numbers that reach a case are
integers times powers of two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from qhal_conformance import SUITE_VERSION

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


_CHUNK = 4096  # counters whose rounds stay in the processor's cache: many at once take up to three times as long each


def philox(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Ten rounds of Philox4x32 on counters [n, 4] (32-bit values in uint64); returns [n, 4]."""
    found = np.empty_like(counter)
    for start in range(0, len(counter), _CHUNK):
        _rounds(counter[start : start + _CHUNK], key, found[start : start + _CHUNK])
    return found


def _rounds(counter: npt.NDArray[np.uint64], key: tuple[int, int], found: npt.NDArray[np.uint64]) -> None:
    c0, c1, c2, c3 = (counter[:, i].copy() for i in range(4))
    k0, k1 = key
    low, shift = np.uint64(_MASK), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(_MULTIPLIERS[0]), c2 * np.uint64(_MULTIPLIERS[1])
        c1 ^= p1 >> shift
        c1 ^= np.uint64(k0)
        c3 ^= p0 >> shift
        c3 ^= np.uint64(k1)
        p0 &= low
        p1 &= low
        c0, c1, c2, c3 = c1, p1, c3, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    for i, column in enumerate((c0, c1, c2, c3)):
        found[:, i] = column


class Stream:
    """One named sequence of a case's random numbers; every method continues where the last one stopped."""

    def __init__(self, case_id: str, name: str) -> None:
        major = SUITE_VERSION.split(".")[0]
        digest = hashlib.sha256(f"qhal-conformance {major}|{case_id}|{name}".encode()).digest()
        self._key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
        self._block = 0

    def bits(self, n: int) -> npt.NDArray[np.uint64]:
        """n 32-bit values."""
        blocks = -(-n // 4)
        index = np.arange(self._block, self._block + blocks, dtype=np.uint64)
        counter = np.zeros((blocks, 4), dtype=np.uint64)
        counter[:, 0], counter[:, 1] = index & np.uint64(_MASK), index >> np.uint64(32)
        self._block += blocks
        return philox(counter, self._key).reshape(-1)[:n]

    def integers(self, low: int, high: int, shape: Sequence[int]) -> I64:
        """Integers low <= i < high, by the high word of a product (bias below 2^-20 for spans under 4096)."""
        scaled = (self.bits(prod(shape)) * np.uint64(high - low)) >> np.uint64(32)
        return np.asarray((scaled.astype(np.int64) + low).reshape(tuple(shape)))

    def normal(self, shape: Sequence[int]) -> F32:
        """Nearly normal (sum of twelve 16-bit uniforms, so within 6 sigma), variance 1, exact multiples of 2^-17."""
        found = np.empty(prod(shape), dtype=np.float32)
        for start in range(0, found.size, _CHUNK):  # 6 _CHUNK words are whole blocks: the same stream as all at once
            part = found[start : start + _CHUNK]
            words = self.bits(6 * part.size).reshape(-1, 6)
            halves = (words & np.uint64(0xFFFF)) + (words >> np.uint64(16))
            total = halves.sum(axis=1).astype(np.int64)
            part[:] = (2 * total - 12 * 65535).astype(np.float64) * 2.0**-17
        return found.reshape(tuple(shape))

    def mantissas(self, bits: int, shape: Sequence[int]) -> F32:
        """Numbers 1 <= v < 2 with `bits` random fraction bits (at most 23)."""
        fraction = self.integers(0, 1 << bits, shape).astype(np.float64)
        return (1.0 + fraction * 2.0**-bits).astype(np.float32)

    def signs(self, shape: Sequence[int]) -> F32:
        """+1 or -1."""
        return (2.0 * self.integers(0, 2, shape) - 1.0).astype(np.float32)

    def permutation(self, n: int) -> I64:
        """A permutation of range(n)."""
        return np.asarray(self.permutations(1, n)[0])

    def permutations(self, count: int, n: int) -> I64:
        """[count, n]: independent permutations of range(n), each the order of 64 random bits per entry."""
        words = self.bits(2 * count * n).reshape(count, n, 2)
        keys = (words[..., 0] << np.uint64(32)) | words[..., 1]
        return np.argsort(keys, axis=1, kind="stable").astype(np.int64)


def fingerprint(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """sha256 over names, dtypes, shapes and little-endian bytes of a case's inputs."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        a = a.astype(a.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}:{a.dtype.str}:{a.shape};".encode())
        digest.update(a.tobytes())
    return digest.hexdigest()
