"""Rotations as data: matrices against their definitions, inverses, periods, and cuts that must be refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal import Dense, Diagonal, FormatError, Hadamard, Kronecker, Permutation, Rotation, ShardError
from qhal import rotations as rot

# The Paley construction of order 12 over GF(11): the smallest order that is no power of two.
SQUARES = {i * i % 11 for i in range(1, 11)}


def paley12() -> torch.Tensor:
    h = torch.ones(12, 12)
    for i in range(11):
        for j in range(11):
            h[i + 1, j + 1] = 1.0 if i == j or (i - j) % 11 in SQUARES else -1.0
    h[1:, 0] = -1.0
    return h


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rot.TABLES, "paley12", paley12)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EVERY: list[tuple[Rotation, int, int]] = [
    (Diagonal(random(8) + 3), 8, 1),
    (Permutation(torch.randperm(8, generator=torch.Generator().manual_seed(1))), 8, 8),
    (Hadamard(16), 16, 16),
    (Hadamard(4), 16, 4),
    (Hadamard(24, 12, "paley12"), 48, 24),
    (Hadamard(24, 12, "paley12", transpose=True), 24, 24),
    (Kronecker(random(2, 2), random(3, 3)), 6, 6),
    (Kronecker(None, random(3, 3)), 12, 3),
    (Kronecker(random(4, 4), None), 12, 12),
    (Dense(random(4, 4)), 12, 4),
]


@pytest.mark.parametrize(("r", "n", "period"), EVERY, ids=lambda v: str(getattr(v, "kind", v)))
def test_matrix_inverse_and_period(r: Rotation, n: int, period: int) -> None:
    m = r.matrix(n)
    assert m.shape == (n, n)
    assert m.dtype == torch.float64
    torch.testing.assert_close(m @ r.inverse().matrix(n), torch.eye(n, dtype=torch.float64), atol=1e-9, rtol=0)
    assert r.blocks(n) == period
    assert hash(r.kind) == hash(r.kind)
    if period < n and not isinstance(r, Diagonal):  # nothing outside the diagonal blocks
        outside = 1 - torch.kron(torch.eye(n // period), torch.ones(period, period))
        assert bool((m * outside == 0).all())


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_sylvester_is_the_natural_order_matrix(n: int) -> None:
    h = rot.sylvester(n)
    expected = [[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    assert h.tolist() == expected
    assert torch.equal(h @ h.t(), n * torch.eye(n, dtype=torch.float64))


def test_hadamard_acts_table_first_sylvester_last() -> None:
    r = Hadamard(24, 12, "paley12")
    x = random(5, 24)
    by_hand = paley12().double() @ x.reshape(5, 12, 2) @ rot.sylvester(2) / math.sqrt(24)
    torch.testing.assert_close(x @ r.matrix(24), by_hand.reshape(5, 24))
    torch.testing.assert_close(x @ r.matrix(24) @ r.inverse().matrix(24), x)
    assert not torch.equal(r.matrix(24), r.inverse().matrix(24))


def test_kronecker_is_left_transposed_x_right() -> None:
    left, right, x = random(3, 3, seed=1), random(4, 4, seed=2), random(5, 12)
    by_hand = left.T @ x.reshape(5, 3, 4) @ right
    torch.testing.assert_close(x @ Kronecker(left, right).matrix(12), by_hand.reshape(5, 12))
    torch.testing.assert_close(x @ Kronecker(None, right).matrix(12), (x.reshape(5, 3, 4) @ right).reshape(5, 12))
    torch.testing.assert_close(x @ Kronecker(left, None).matrix(12), (left.T @ x.reshape(5, 3, 4)).reshape(5, 12))


def test_permutation_and_diagonal_by_definition() -> None:
    x, index, values = random(2, 6), torch.tensor([3, 1, 0, 5, 4, 2]), random(6)
    torch.testing.assert_close(x @ Permutation(index).matrix(6), x[:, index])
    torch.testing.assert_close(x @ Diagonal(values).matrix(6), x * values)


def test_chains_apply_left_to_right() -> None:
    chain: tuple[Rotation, ...] = (Diagonal(random(8)), Hadamard(4), Permutation(torch.arange(7, -1, -1)))
    x = random(3, 8)
    step = x
    for r in chain:
        step = step @ r.matrix(8)
    torch.testing.assert_close(x @ rot.matrix(chain, 8), step)
    back = tuple(r.inverse() for r in reversed(chain))
    torch.testing.assert_close(x @ rot.matrix(chain, 8) @ rot.matrix(back, 8), x)
    assert rot.kinds(chain) == (("diagonal", 8), ("hadamard", 4, 1, "", False), ("permutation", 8))
    assert rot.same(chain, chain)
    assert not rot.same(chain, (Diagonal(random(8, seed=9)), *chain[1:]))
    assert not rot.same(chain, chain[:2])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.sampled_from(EVERY), st.integers(0, 48), st.integers(0, 48))
def test_a_cut_acts_on_its_own_features_or_is_refused(case: tuple[Rotation, int, int], a: int, b: int) -> None:
    r, n, period = case
    start, stop = sorted((a % (n + 1), b % (n + 1)))
    if start == stop:
        return
    if isinstance(r, Diagonal) or (start % period == 0 and stop % period == 0):
        part = rot.narrow(r, n, start, stop)
        torch.testing.assert_close(part.matrix(stop - start), r.matrix(n)[start:stop, start:stop])
    else:
        with pytest.raises(ShardError, match=f"lies inside a {type(r).__name__} rotation of {period} features"):
            rot.narrow(r, n, start, stop)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Hadamard(12), "n / k must be a power of two"),
        (lambda: Hadamard(24, 0), "n / k must be a power of two"),
        (lambda: Hadamard(8).matrix(12), "Hadamard of size 8 does not fit 12 features"),
        (
            lambda: Hadamard(20, 20, "nowhere").matrix(20),
            "no Hadamard table 'nowhere' of order 20; known tables:.*paley12",
        ),
        (lambda: Diagonal(torch.ones(3)).matrix(6), "Diagonal of size 3 does not fit 6 features"),
        (lambda: Permutation(torch.arange(3)).matrix(6), "Permutation of size 3 does not fit 6"),
        (lambda: Dense(torch.eye(4)).matrix(6), "Dense of size 4 does not fit 6"),
        (lambda: Permutation(torch.tensor([0, 3, 1])).matrix(3), "must name each of them once"),
        (lambda: Permutation(torch.tensor([0, 1, 1])).matrix(3), "must name each of them once"),
        (lambda: Permutation(torch.ones(3)), "a permutation is int64"),
        (lambda: Dense(torch.ones(4, 2)), "Dense needs a square float matrix"),
        (lambda: Kronecker(torch.ones(4, 2), None), "Kronecker needs a square float matrix"),
        (lambda: rot.sylvester(6), "power of two as order, not 6"),
    ],
)
def test_senseless_rotations_are_refused(make: Any, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        make()
