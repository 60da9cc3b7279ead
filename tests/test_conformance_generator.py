"""Random inputs are the same bytes everywhere: known answers, not properties of this machine."""

from __future__ import annotations

import numpy as np

from qhal_conformance.generator import Stream, fingerprint


def test_philox_known_answer() -> None:
    """A vector that the authors of Random123 publish for philox4x64-10: numpy's generator is theirs."""
    before_zero = np.random.Philox(key=0, counter=(1 << 256) - 1)  # numpy counts first
    assert before_zero.random_raw(4).tolist() == KNOWN_WORDS


def test_bits_are_the_halves_of_words() -> None:
    words, bits = Stream("case", "name").words(3), Stream("case", "name").bits(5)
    assert bits.tolist() == [half for w in words.tolist() for half in (w & 0xFFFFFFFF, w >> 32)][:5]


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
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02 and 2.5 < abs(x).max() < 3
    assert (x * 2**21 % 2 == 1).all()


def test_fingerprint_sees_names_shapes_and_bytes() -> None:
    a = np.arange(6, dtype=np.float32)
    base = fingerprint({"a": a})
    assert base == fingerprint({"a": a.copy()})
    assert (
        base != fingerprint({"b": a}) and base != fingerprint({"a": a.reshape(2, 3)}) and base != fingerprint({"a": -a})
    )


KNOWN_WORDS = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
KNOWN = "1401882c061784dfab89266843ed0630cd9ff70c776ca7d5af076ec4c07136b1"
