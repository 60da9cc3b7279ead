"""The suite's own rotations against the contract's: tables by construction, chains as matrices, planted faults."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qhal
from qhal import hadamard_tables
from qhal.requests import NumericsClass
from qhal.rotations import Hadamard, Rotation, matrix
from qhal_conformance import rotation_chains
from qhal_conformance.decode import numbers
from qhal_conformance.hadamard_check import bound_of, build
from qhal_conformance.mutants import MUTANTS, hunt
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import FailKind
from qhal_conformance.problem import DTYPES
from qhal_conformance.tolerance import compare

CASES = [c for c in catalogue(1) if c.operation == "hadamard" and c.size("n") < 1024]
SUBJECTS = sorted({(c.subject, c.size("n")) for c in CASES})


@pytest.mark.parametrize("name", sorted(hadamard_tables.TABLE_SHA256))
def test_tables_are_the_contracts(name: str) -> None:
    assert np.array_equal(rotation_chains.hadamard(name), hadamard_tables.load(name).numpy())


@pytest.mark.parametrize(("subject", "n"), SUBJECTS)
def test_chains_are_the_contracts(subject: str, n: int) -> None:
    turns = rotation_chains.chain(subject, "key", n)
    x = np.eye(n)
    back = np.eye(n)
    for t in turns:
        x = t.apply(x)
    for t in reversed(turns):
        back = t.transposed().apply(back)
    wanted = matrix([t.rotation for t in turns], n).numpy()
    assert np.allclose(x, wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())
    assert np.allclose(back, wanted.T, rtol=0, atol=1e-13 * np.abs(wanted).max())


def test_every_table_is_asked_at_level_one() -> None:
    parts = [part for subject, _ in SUBJECTS for part in subject.split("+") if "-" in part.partition("x")[0]]
    tables = {part.removesuffix("^T").partition("x")[0] for part in parts} - {"kronecker-"}
    assert tables >= set(hadamard_tables.TABLE_SHA256) - {"quip-20"}, "quip-20 is quarot-20 by another name"


@pytest.mark.parametrize("subject", sorted({c.subject for c in catalogue(0) if c.operation == "hadamard"}))
def test_thebound_of_from_both_sides(subject: str) -> None:
    case = next(c for c in catalogue(0) if c.operation == "hadamard" and c.subject == subject and c.size("m"))
    p = build(case)
    bound = bound_of(case, p, NumericsClass.FP32_ACC, p.x)
    for share, wrong in ((0.99, None), (1.01, FailKind.NUMERIC)):
        assert compare(p.ref + share * bound, p.ref, bound, case.out).kind == wrong


def _in_float32(chain: list[Rotation], x: torch.Tensor) -> torch.Tensor:
    """Butterflies with a scaling at the end, tables and factors as float32 products."""
    y = x.float()
    for r in chain:
        if isinstance(r, Hadamard):
            y = y.reshape(len(x), -1, r.k, r.n // r.k)
            step = 1
            while step < y.shape[-1]:
                a, b = y.reshape(*y.shape[:-1], -1, 2, step).unbind(-2)
                y = torch.stack([a + b, a - b], -2).reshape(y.shape)
                step *= 2
            if r.k > 1:
                t = hadamard_tables.load(r.table).float()
                y = (t.T if r.transpose else t) @ y
            y = y.reshape(x.shape) * torch.tensor(r.n**-0.5)
        else:
            y = y @ r.matrix(x.shape[1]).float()
    return y


@pytest.mark.parametrize("seed", range(2))
def test_sums_in_float32_are_within_thebound_of(seed: int) -> None:
    """Honest kernels: no alarm over chains, data sets and seeds."""
    for case in [c.reseeded(seed) for c in CASES if c.data != "quantized" and c.size("m")]:
        p = build(case)
        y = _in_float32(p.chain, torch.from_numpy(p.x)).to(DTYPES[case.out])
        bound = bound_of(case, p, NumericsClass.FP32_ACC, p.x)
        found = compare(numbers(y).astype(np.float64), p.ref, bound, case.out)
        assert found.kind is None, (case.id, found.detail)


def test_every_planted_fault_is_killed() -> None:
    found = hunt(qhal.select("cpu_reference"), [m for m in MUTANTS if m.group == "rotation"], 0)
    assert [m["name"] for m in found["mutants"] if not m["killed"]] == [] and found["total"] >= 15
