"""Rotations drawn at random: orthogonal where they must be, undone by their inverse, applied as their matrix says.

Bounds are sums of rounding errors: a float64 product of n terms errs by n * 2^-53 of the sum of their magnitudes.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qhal
from qhal import (
    Dense,
    Diagonal,
    Format,
    Hadamard,
    HadamardRequest,
    Kronecker,
    Operand,
    Permutation,
    Rotation,
    ShardError,
)
from qhal import hadamard_tables as tables
from qhal import rotations as rot

ORDERS = {1: "", **{source.order: name for name, source in sorted(tables.SOURCES.items(), reverse=True)}}
BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@pytest.fixture(scope="module")
def ops() -> qhal.QuantOps:
    return qhal.select("cpu_reference")


def test_every_order_is_drawn() -> None:
    assert sorted(ORDERS) == [1, 12, 20, 28, 36, 40, 44, 52, 60, 108, 140, 156, 172]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


SIZES = sorted({k << power for k in ORDERS for power in range(5)} | {3 * k for k in ORDERS} | {2, 344})
SIZES = [n for n in SIZES if n <= 352]
"""Feature counts that some transform fits once or several times."""


@st.composite
def rotation(draw: st.DrawFn, n: int) -> Rotation:
    """Any rotation that fits n features."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def square(size: int) -> torch.Tensor:
        return (
            torch.eye(size, dtype=torch.float64) * 3 + torch.randn(size, size, generator=g, dtype=torch.float64) / size
        )

    kind = draw(st.sampled_from(["diagonal", "permutation", "hadamard", "hadamard", "kronecker", "dense"]))
    if kind == "diagonal":
        return Diagonal(torch.rand(n, generator=g, dtype=torch.float64) + 0.5)
    if kind == "permutation":
        return Permutation(torch.randperm(n, generator=g))
    small = [d for d in divisors(n) if d <= 48]
    if kind == "dense":
        return Dense(square(draw(st.sampled_from(small))))
    if kind == "kronecker":
        left = draw(st.sampled_from(small))
        form = draw(st.sampled_from(["both", "left", "right"]))
        if form == "left":
            return Kronecker(square(left), None)
        if form == "right":
            return Kronecker(None, square(left))
        return Kronecker(square(left), square(n // left)) if n // left <= 96 else Kronecker(None, square(left))
    fits = [(d, k) for d in divisors(n) for k in ORDERS if d % k == 0 and (d // k) & (d // k - 1) == 0]
    size, k = draw(st.sampled_from(fits))
    return Hadamard(size, k, ORDERS[k], transpose=draw(st.booleans()) and k > 1)


@st.composite
def chains(draw: st.DrawFn) -> tuple[int, tuple[Rotation, ...]]:
    n = draw(st.sampled_from(SIZES))
    return n, tuple(draw(rotation(n)) for _ in range(draw(st.integers(1, 3))))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(chains())
def test_matrices_inverses_and_orthogonality(case: tuple[int, tuple[Rotation, ...]]) -> None:
    n, chain = case
    unit = torch.eye(n, dtype=torch.float64)
    for r in chain:
        m, back = r.matrix(n), r.inverse().matrix(n)
        reach = m.abs() @ back.abs()  # what the terms of the product add up to
        assert bool(((m @ back - unit).abs() <= 16 * n * 2.0**-53 * reach).all()), r.kind
        if isinstance(r, Hadamard | Permutation):
            assert bool(((m @ m.T - unit).abs() <= n * 2.0**-52).all())
            assert torch.equal(back, m.T)
        period = r.blocks(n)
        assert n % period == 0
        blocks = torch.arange(n) // period
        if not isinstance(r, Permutation):
            assert bool((m[blocks[:, None] != blocks] == 0).all())  # nothing is mixed across the period
    inverse = tuple(r.inverse() for r in reversed(chain))
    whole, undone = rot.matrix(chain, n), rot.matrix(inverse, n)
    size = unit
    for r in (*chain, *inverse):
        size = size @ r.matrix(n).abs()
    assert bool(((whole @ undone - unit).abs() <= 32 * n * 2.0**-53 * size).all())


@settings(max_examples=150, derandomize=True, deadline=None)
@given(chains(), st.sampled_from(list(BITS)), st.sampled_from(["int8.row*fp32", "int4.row*fp32", "e4m3fn.g4*fp32"]))
def test_the_operation_is_the_matrix_and_the_fusion_its_two_steps(
    ops: qhal.QuantOps, case: tuple[int, tuple[Rotation, ...]], dtype: torch.dtype, name: str
) -> None:
    n, chain = case
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    request = HadamardRequest(kinds=rot.kinds(chain), n=n, x=dtype)
    assert ops.supports(request).level == "full"
    y = ops.hadamard(x, chain)
    want, size = x.double(), x.double().abs()
    for r in chain:
        m = r.matrix(n)
        want, size = want @ m, size @ m.abs()
    tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    bound = 2.0 ** -BITS[dtype] * want.abs() * (1 + 2.0**-20) + 4 * n * len(chain) * 2.0**-53 * size + tiny
    assert bool(((y.double() - want).abs() <= bound).all())
    p = ops.prepare(chain, request)
    assert torch.equal(ops.hadamard(x, p), y)
    operand = Operand(Format.parse(name))
    assert ops.supports(HadamardRequest(kinds=rot.kinds(chain), n=n, x=dtype, quantize=operand.format))
    for given_chain in (chain, p):
        fused = ops.hadamard(x, given_chain, quantize=operand)
        assert isinstance(fused, qhal.QTensor)
        assert fused.equal(ops.quantize(y, operand))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(chains(), st.integers(0, 1000), st.integers(0, 1000))
def test_parts_of_a_chain_act_on_their_own_features(
    ops: qhal.QuantOps, case: tuple[int, tuple[Rotation, ...]], a: int, b: int
) -> None:
    """Cutting every rotation and applying the parts gives the columns of the whole, or the cut is refused."""
    n, chain = case
    steps = [r.blocks(n) for r in chain]
    period = math.lcm(*steps)
    start, stop = sorted((a % (n + 1) // period * period, b % (n + 1) // period * period))
    if start == stop:
        return
    parts = tuple(rot.narrow(r, n, start, stop) for r in chain)
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(a))
    assert torch.equal(ops.hadamard(x[:, start:stop].contiguous(), parts), ops.hadamard(x, chain)[:, start:stop])
    widest = max(range(len(chain)), key=lambda i: steps[i])
    if steps[widest] > 1 and not isinstance(chain[widest], Diagonal):
        with pytest.raises(ShardError, match="lies inside a"):
            rot.narrow(chain[widest], n, start, stop - 1)


@pytest.mark.parametrize("k", [k for k in sorted(ORDERS) if k > 1])
@pytest.mark.parametrize("power", [0, 1, 3])
def test_every_order_times_a_power_of_two(ops: qhal.QuantOps, k: int, power: int) -> None:
    """An impulse gives a row of the matrix, rounded once; the inverse brings it back."""
    n = k << power
    r = Hadamard(n, k, ORDERS[k])
    m = torch.kron(tables.load(ORDERS[k]).double().t().contiguous(), rot.sylvester(1 << power))
    assert torch.equal(ops.hadamard(torch.eye(n), (r,)), (m / math.sqrt(n)).float())
    assert torch.equal(ops.hadamard(torch.eye(n), (r.inverse(),)), (m.t() / math.sqrt(n)).float())
    x = torch.randint(-8, 9, (4, n), generator=torch.Generator().manual_seed(n)).float()
    bound = 2.0**-24 * x.abs() + 8 * n * 2.0**-53 * x.abs().sum(1, keepdim=True)
    assert bool(((ops.hadamard(x, (r, r.inverse())).double() - x).abs() <= bound).all())
