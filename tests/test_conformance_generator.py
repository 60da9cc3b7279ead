"""Random inputs are the same bytes everywhere: known answers, not properties of this machine."""

from __future__ import annotations

import numpy as np

from qhal_conformance.generator import Stream, fingerprint, philox


def test_philox_known_answers() -> None:
    """The vectors that the authors of Random123 publish for philox4x32-10."""
    zeros = np.zeros((1, 4), dtype=np.uint64)
    ones = np.full((1, 4), 0xFFFFFFFF, dtype=np.uint64)
    pi = np.array([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]], dtype=np.uint64)
    assert philox(zeros, (0, 0)).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    assert philox(ones, (0xFFFFFFFF, 0xFFFFFFFF)).tolist() == [[0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]]
    assert philox(pi, (0xA4093822, 0x299F31D0)).tolist() == [[0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]]


def test_streams_have_known_hashes() -> None:
    g = Stream("case", "name")
    arrays = {"n": g.normal((5, 7)), "i": g.integers(-9, 12, (40,)), "p": g.permutation(33), "m": g.mantissas(7, (9,))}
    assert fingerprint(arrays) == KNOWN


def test_streams_are_independent_of_each_other() -> None:
    alone = Stream("case", "b").normal((10,))
    Stream("case", "a").bits(100)
    assert np.array_equal(alone, Stream("case", "b").normal((10,)))
    assert not np.array_equal(alone, Stream("case", "c").normal((10,)))
    assert not np.array_equal(alone, Stream("other", "b").normal((10,)))


def test_normal_is_nearly_normal_and_exact() -> None:
    x = Stream("case", "x").normal((200, 500)).astype(np.float64)
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02 and abs(x).max() < 6
    assert np.array_equal(x * 2**17, np.round(x * 2**17))


def test_fingerprint_sees_names_shapes_and_bytes() -> None:
    a = np.arange(6, dtype=np.float32)
    base = fingerprint({"a": a})
    assert base == fingerprint({"a": a.copy()})
    assert (
        base != fingerprint({"b": a}) and base != fingerprint({"a": a.reshape(2, 3)}) and base != fingerprint({"a": -a})
    )


KNOWN = "bb1bbca625031ef76116096f394bbf249845d0835b512e2a6a8d1ab729bc9a3a"
