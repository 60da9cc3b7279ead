"""Random inputs from integer arithmetic alone: the same bytes on every platform, in every version of every library.

Philox4x64-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, SC 2011) is counter-based; numpy has it, and
promises that its raw words stay as they are (of what is drawn from them it promises nothing, so that is done here). A
stream is keyed by (suite major version, case id, stream name), so no case can disturb another, and an input that is
added to a case does not change the others. No logarithm, no cosine: numbers that reach a case are integers
times powers of two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from qhal_conformance import SUITE_VERSION

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]


BELL: F64 = np.arange(-3 * 1023, 3 * 1023 + 1, 2, dtype=np.float64) * 2.0**-10
"""The numbers that `Stream.steps` counts: variance 1, within 3."""


class Stream:
    """One named sequence of a case's random numbers; every method continues where the last one stopped."""

    def __init__(self, case_id: str, name: str) -> None:
        major = SUITE_VERSION.split(".")[0]
        digest = hashlib.sha256(f"qhal-conformance {major}|{case_id}|{name}".encode()).digest()
        self._philox = np.random.Philox(key=np.frombuffer(digest[:16], "<u8"), counter=0)

    def words(self, n: int) -> U64:
        """n words of 64 bits."""
        return self._philox.random_raw(n)

    def bits(self, n: int) -> npt.NDArray[np.uint32]:
        """n values of 32 bits: the low half of each word, then the high one."""
        return self.words(-(-n // 2)).astype("<u8", copy=False).view("<u4")[:n]

    def integers(self, low: int, high: int, shape: Sequence[int]) -> I64:
        """Integers low <= i < high, by the high word of a product (bias below 2^-20 for spans under 4096)."""
        scaled = (self.bits(prod(shape)) * np.uint64(high - low)) >> np.uint64(32)
        return np.asarray((scaled.astype(np.int64) + low).reshape(tuple(shape)))

    def normal(self, shape: Sequence[int]) -> F32:
        """Bell-shaped, variance 1, within 3: a sum of three uniform values from -1 to 1; odd multiples of 2^-21."""
        words = self.words(prod(shape))
        low = np.uint64((1 << 21) - 1)
        total = (words & low) + ((words >> np.uint64(21)) & low) + (words >> np.uint64(43))
        centred = 2 * total.astype(np.int32) - np.int32(3 * ((1 << 21) - 1))
        return np.asarray((centred * np.float32(2.0**-21)).reshape(tuple(shape)), np.float32)

    def steps(self, shape: Sequence[int]) -> I64:
        """Indices into BELL: bell-shaped as `normal`, in few steps, at half the cost."""
        bits = self.bits(prod(shape))
        low = np.uint32((1 << 10) - 1)
        total = (bits & low) + ((bits >> np.uint32(10)) & low) + (bits >> np.uint32(20) & low)
        return np.asarray(total.reshape(tuple(shape)), np.int64)

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
        return np.argsort(self.words(count * n).reshape(count, n), axis=1, kind="stable").astype(np.int64)


def fingerprint(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """sha256 over names, dtypes, shapes and little-endian bytes of a case's inputs."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        a = a.astype(a.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}:{a.dtype.str}:{a.shape};".encode())
        digest.update(a.tobytes())
    return digest.hexdigest()
