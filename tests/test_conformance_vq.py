"""The suite's own lattices and codebook decoding, against the contract's; the bounds of vq_decode from both sides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qhal
from qhal import CodebookTensor, lattices
from qhal.requests import NumericsClass
from qhal.tensors import same_bits
from qhal_conformance import vq_kinds, vq_tables
from qhal_conformance.cases import Case
from qhal_conformance.decode import numbers
from qhal_conformance.mutants import MUTANTS, hunt
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import FailKind
from qhal_conformance.problem import DTYPES
from qhal_conformance.tolerance import compare
from qhal_conformance.vq_check import build, error_bound

CASES = [c for c in catalogue(0) if c.profile == "vq"]
ALL = [c for c in catalogue(1) if c.operation == "vq_decode" and c.size("n") < 500]


@pytest.mark.parametrize("name", sorted(lattices.TABLE_SHA256))
def test_lattices_are_the_contracts(name: str) -> None:
    assert np.array_equal(vq_tables.table(name), lattices.load(name).numpy())


def test_e8p_is_what_its_definition_says() -> None:
    """Half-odd numbers with an even sum, moved by a quarter; every vector once."""
    table = vq_tables.table("e8p12").reshape(-1, 8).astype(np.float64)
    plain = table - np.where(table[:, :1] % 1 == 0.75, 0.25, -0.25)
    assert np.all(plain % 1 == 0.5) and np.all(plain.sum(1) % 2 == 0)
    assert len(np.unique(table, axis=0)) == 1 << 16
    shells = np.unique(vq_tables.table("e81b").reshape(-1, 8), axis=0)
    assert len(shells) == 256 and sorted(set((shells.astype(np.float64) ** 2).sum(1))) == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_decoding_is_the_contracts_to_the_bit(case: Case) -> None:
    p = build(case)
    assert same_bits(torch.from_numpy(p.dense.value), p.w.dequantize())


def test_every_index_of_every_book_occurs() -> None:
    for name, kind in vq_kinds.KINDS.items():
        full = next(c for c in CASES if c.subject == name and c.data in ("identity", "codes"))
        for s, part in zip(build(full).w.segments, kind.parts, strict=True):
            if part.columns:
                continue  # outliers and first groups are small; the last part has the largest tables
            for c, book in enumerate(part.books):
                assert len(torch.unique(s.codes[..., c])) == book.entries, (name, c)


@pytest.mark.parametrize("case", CASES[:18], ids=lambda c: c.subject)
def test_the_bound_from_both_sides(case: Case) -> None:
    p = build(case)
    bound = error_bound(case, p.dense, NumericsClass.FP32_ACC)
    for share, wrong in ((0.99, None), (1.01, FailKind.NUMERIC)):
        assert compare(p.dense.exact + share * bound, p.dense.exact, bound, case.out).kind == wrong
    assert not np.any(bound[p.dense.magnitude == 0])


def _backwards(w: CodebookTensor, out: torch.dtype) -> torch.Tensor:
    """Books from the last to the first, residuals times a reciprocal, scales multiplied before they are applied."""
    n, k = w.shape
    parts = []
    for s in w.segments:
        books = range(len(s.tables))
        tables = [s.table(i).float() * (1 / torch.tensor(s.divisors[i] if s.divisors else 1.0)) for i in books]
        total = sum(tables[i][s.codes[..., i].long()] for i in reversed(books))
        rows, vectors, a, b = total.shape
        parts.append(total.permute(0, 2, 1, 3).reshape(rows * a, vectors * b)[:n])
    y = torch.cat(parts, 1)[:, :k]
    order = torch.arange(k) if w.permutation is None else torch.argsort(w.permutation)
    y = y[:, order]
    scale = torch.ones(n, 1) if w.scale is None else w.scale.float().reshape(-1, 1)
    if scale.shape[0] not in (1, n):
        scale = scale.repeat_interleave(w.segments[0].vector[0], 0)[:n]
    scale = scale * (1 if w.column_scale is None else w.column_scale.float())
    y = y * scale
    return (y if w.column_bias is None else y + w.column_bias.float()).to(out)


@pytest.mark.parametrize("seed", range(3))
def test_other_orders_of_the_same_sums_are_within_the_bound(seed: int) -> None:
    """Honest kernels: no alarm over kinds, data sets and seeds."""
    for case in [c.reseeded(seed) for c in ALL[seed::3]]:
        p = build(case)
        got = numbers(_backwards(p.w, DTYPES[case.out])).astype(np.float64)
        found = compare(got, p.dense.exact, error_bound(case, p.dense, NumericsClass.FP32_ACC), case.out)
        assert found.kind is None, (case.id, found.detail)


def test_every_planted_fault_is_killed() -> None:
    found = hunt(qhal.select("cpu_reference"), [m for m in MUTANTS if m.group == "vq"], 0)
    assert [m["name"] for m in found["mutants"] if not m["killed"]] == [] and found["total"] >= 28
