"""Hadamard tables: hashes, orthogonality, which table a project takes for a size, and the projects' own outputs."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import qhal
from qhal import Dense, Diagonal, Format, FormatError, Hadamard, HadamardRequest, Operand, UnsupportedError
from qhal import hadamard_tables as tables
from qhal import rotations as rot

NAMES = sorted(tables.SOURCES, key=lambda name: (tables.SOURCES[name].order, name))
ORDERS = (12, 20, 28, 36, 40, 44, 52, 60, 108, 140, 156, 172)
SYMMETRIC = (28, 36)
QUAROT_SIZES = (64, 80, 96, 112, 144, 160, 208, 240, 432, 560, 624, 688)
BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@pytest.fixture(scope="module")
def ops() -> qhal.QuantOps:
    return qhal.select("cpu_reference")


def case(golden: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    folder = golden / name
    if not (folder / "expected.safetensors").is_file():
        pytest.skip(f"{name} is not among the golden data in {golden} (set QHAL_GOLDEN)")
    (stored,) = (folder / "checkpoint").glob("*.safetensors")
    return load_file(stored), load_file(folder / "expected.safetensors")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_order_has_a_table() -> None:
    assert tuple(sorted({s.order for s in tables.SOURCES.values()})) == ORDERS
    assert set(tables.TABLE_SHA256) == set(tables.SOURCES) <= set(rot.TABLES)
    assert {k for family in tables.FAMILIES.values() for k in family} == {*ORDERS, 116, 124}


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_a_hadamard_matrix_with_its_hash(name: str) -> None:
    source, h = tables.SOURCES[name], rot.TABLES[name]()
    m = source.order
    assert h.dtype == torch.int8
    assert h.shape == (m, m)
    assert bool((h.abs() == 1).all())
    wide = h.long()
    assert torch.equal(wide @ wide.t(), m * torch.eye(m, dtype=torch.long))
    assert torch.equal(h, h.t()) == (m in SYMMETRIC)
    entries = bytes(v & 0xFF for row in h.tolist() for v in row)
    assert hashlib.sha256(entries).hexdigest() == tables.TABLE_SHA256[name]
    assert name.endswith(f"-{m}")


def test_a_damaged_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tables.WILLIAMSON[13]
    monkeypatch.setitem(tables.WILLIAMSON, 13, (rows[0][:-1] + "-", *rows[1:]))
    tables.load.cache_clear()
    with pytest.raises(FormatError, match=r"'quarot-52' has the hash .* must have 9ee0827728"):
        Hadamard(52, 52, "quarot-52").matrix(52)


def test_tables_are_built_on_first_use() -> None:
    script = "import qhal; from qhal import hadamard_tables as t; print(t.load.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


@pytest.mark.parametrize(
    ("n", "family", "k", "table"),
    [
        (64, "quarot", 1, ""),
        (1, "spinquant", 1, ""),
        (96, "quarot", 12, "quarot-12"),
        (80, "quarot", 40, "quarot-40"),
        (80, "spinquant", 40, "quarot-40"),
        (80, "quip", 20, "quarot-20"),
        (20, "quarot", 20, "quarot-20"),
        (11008, "quarot", 172, "quarot-172"),  # Llama 2 7B
        (13824, "quarot", 108, "quarot-108"),  # Llama 2 13B
        (14336, "quarot", 28, "quarot-28"),  # Llama 3 8B
        (14336, "quip", 28, "quarot-28"),
        (1408, "spinquant", 44, "spinquant-44"),
        (192, "quip", 12, "quarot-12"),
    ],
)
def test_a_project_takes_the_table_of_its_own_list(n: int, family: str, k: int, table: str) -> None:
    r = qhal.rotations.hadamard_for(n, family)
    assert r == Hadamard(n, k, table)
    if k > 1:
        assert tables.TABLE_SHA256[table] == tables.TABLE_SHA256.get(f"{family}-{k}", tables.TABLE_SHA256[table])


@pytest.mark.parametrize(
    ("n", "family", "text"),
    [
        (13696, "quarot", r"QuaRot has no Hadamard transform of 13696 features: 13696 = 107 \* 128"),
        (29568, "spinquant", r"SpinQuant has no .* of 29568 features: 29568 = 231 \* 128"),
        (1408, "quarot", r"1408 = 11 \* 128, and none of its orders 12, 20, 28, 36, 40, 52"),
        (10, "quarot", "no Hadamard transform of 10 features"),
        (6, "quip", "QuIP# has no Hadamard transform of 6 features"),
        (0, "quarot", "no Hadamard transform of 0 features"),
        (-12, "quarot", "no Hadamard transform of -12 features"),
        (124, "quip", "QuIP# transforms 124 features with a table of order 124, which was not compared"),
        (11008, "quip", "order 172, which was not compared .* quip-12, quip-20, quip-28"),
        (64, "hadamard", "no family of Hadamard transforms 'hadamard'; known: quarot, spinquant, quip"),
    ],
)
def test_sizes_without_a_table_are_refused(n: int, family: str, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        rot.hadamard_for(n, family)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.sampled_from(sorted(tables.FAMILIES)), st.integers(1, 4096))
def test_every_size_fits_one_transform_or_is_refused(family: str, n: int) -> None:
    fits = [k for k in (1, *tables.FAMILIES[family]) if n % k == 0 and (n // k) & (n // k - 1) == 0]
    try:
        r = rot.hadamard_for(n, family)
    except FormatError:
        assert not fits or family == "quip"
        return
    assert r.n == n
    assert r.k in fits
    assert r.k == 1 or tables.SOURCES[r.table].order == r.k
    # the first that fits, whichever of the listed orders merely divide n
    assert r.k == 1 or r.k == next(k for k in tables.FAMILIES[family] if k in fits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_reference_transforms_with_every_table(ops: qhal.QuantOps, name: str, dtype: torch.dtype) -> None:
    k = tables.SOURCES[name].order
    order, n = 2 * k, 4 * k
    forward, back = Hadamard(order, k, name), Hadamard(order, k, name, transpose=True)
    assert forward.inverse() == back
    wide = torch.kron(tables.load(name).double(), rot.sylvester(2)) / math.sqrt(order)
    x = normal(5, n).to(dtype)
    for r, m in ((forward, wide.t()), (back, wide)):  # rows of x: (H x)^T = x^T H^T
        request = HadamardRequest(kinds=rot.kinds([r]), n=n, x=dtype)
        assert ops.supports(request).level == "full"
        expected = (x.double().reshape(5, 2, order) @ m).reshape(5, n)
        torch.testing.assert_close(x.double() @ r.matrix(n), expected)
        y = ops.hadamard(x, (r,))
        assert y.dtype == dtype
        bound = 2.0 ** -BITS[dtype] * expected.abs() + 1e-12 + 2.0**-25 * (dtype == torch.float16)
        assert bool(((y.double() - expected).abs() <= bound).all())
        assert torch.equal(y, ops.hadamard(x, ops.prepare((r,), request)))
    impulse = ops.hadamard(torch.eye(k), (Hadamard(k, k, name),))
    assert torch.equal(impulse, (tables.load(name).double().t() / math.sqrt(k)).float())
    again = ops.hadamard(ops.hadamard(x, (forward,)), (back,))
    assert bool(((again - x).abs().double().norm(dim=1) <= 2.0 ** (2 - BITS[dtype]) * x.double().norm(dim=1)).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["int8.row*fp32", "int4.row*fp32", "mxfp4"])
def test_quantized_in_the_same_pass(ops: qhal.QuantOps, name: str, text: str) -> None:
    k = tables.SOURCES[name].order
    chain, operand = (Hadamard(8 * k, k, name),), Operand(Format.parse(text))
    x = normal(3, 8 * k, seed=k).bfloat16()
    request = HadamardRequest(kinds=rot.kinds(chain), n=8 * k, x=x.dtype, quantize=operand.format)
    assert ops.supports(request).level == "full"
    fused = ops.hadamard(x, chain, quantize=operand)
    assert isinstance(fused, qhal.QTensor)
    assert fused.equal(ops.quantize(ops.hadamard(x, chain), operand))


@pytest.mark.parametrize(
    ("r", "reason"),
    [
        (Hadamard(24, 12, "sloane-12"), "no Hadamard table 'sloane-12' of order 12; known tables: quarot-12, "),
        (Hadamard(24, 12), "no Hadamard table '' of order 12"),
        (Hadamard(24, 12, "quarot-20"), "table 'quarot-20' is of order 20, not 12"),
        (Hadamard(40, 40, "quarot-40"), "does not fit 24 features"),
    ],
)
def test_unknown_tables_and_other_orders_are_unsupported(ops: qhal.QuantOps, r: Hadamard, reason: str) -> None:
    answer = ops.supports(HadamardRequest(kinds=rot.kinds([r]), n=24, x=torch.float32))
    assert answer.level == "unsupported"
    assert reason in answer.reason
    with pytest.raises(UnsupportedError, match=reason):
        ops.hadamard(torch.zeros(2, 24), (r,))
    with pytest.raises(FormatError, match=reason):
        r.matrix(24)


def test_golden_tables_are_the_constructions(golden: Path) -> None:
    stored, _ = case(golden, "rotations/quarot_hadamard_sizes")
    found = [int(key[3:]) for key in stored if key.startswith("had")]
    assert sorted(found) == sorted(set(tables.FAMILIES["quarot"]) - {20})  # none of the twelve sizes takes 20
    for k in found:
        assert torch.equal(stored[f"had{k}"], tables.load(f"quarot-{k}")), k


@pytest.mark.parametrize("n", QUAROT_SIZES)
def test_golden_quarot_transforms(ops: qhal.QuantOps, golden: Path, n: int) -> None:
    stored, expected = case(golden, "rotations/quarot_hadamard_sizes")
    x, r = stored[f"n{n}.input"], rot.hadamard_for(n)
    for direction, theirs in ((r, expected[f"n{n}.hadU"]), (r.inverse(), expected[f"n{n}.hadUt"])):
        torch.testing.assert_close(ops.hadamard(x, (direction,)), theirs, atol=2e-6, rtol=2e-6)
    if r.k > 1 and r.k not in SYMMETRIC:  # so that the direction matters
        assert not torch.allclose(expected[f"n{n}.hadU"], expected[f"n{n}.hadUt"], atol=1e-2)


@pytest.mark.parametrize("n", [64, 100, 128, 512, 1000])
def test_golden_fast_hadamard_transform(ops: qhal.QuantOps, golden: Path, n: int) -> None:
    """Padded with zeros to 2^k, unnormalized, times a scale, cut: the caller pads, or a Dense block says it all."""
    stored, expected = case(golden, "rotations/fht_reference")
    x, scale, theirs = stored[f"n{n}.input"], float(stored[f"n{n}.scale"]), expected[f"n{n}.output"]
    full = 1 << (n - 1).bit_length()
    padded = torch.nn.functional.pad(x, (0, full - n))
    chain = (Hadamard(full), Diagonal(torch.full((full,), scale * math.sqrt(full), dtype=torch.float64)))
    atol = 2.0**-20 * abs(scale) * float(x.abs().sum(1).max())
    torch.testing.assert_close(ops.hadamard(padded, chain)[:, :n], theirs, atol=atol, rtol=2e-6)
    cut = Dense(rot.sylvester(full)[:n, :n] * scale)
    torch.testing.assert_close(ops.hadamard(x, (cut,)), theirs, atol=atol, rtol=2e-6)


def test_golden_quip_layer_with_tables_12_and_20(ops: qhal.QuantOps, golden: Path) -> None:
    """y = SV * H_O(W (H_I^T (SU * x))): both tables and both directions, each of which would show in the output."""
    stored, expected = case(golden, "quip/quip_e8p12_had12_20")
    name = "model.layers.0.self_attn.o_proj"
    su, sv, w = stored[f"{name}.SU"], stored[f"{name}.SV"], expected[f"{name}.Wr"]
    x, theirs = expected[f"{name}.input"], expected[f"{name}.output"]

    def layer(inner: Hadamard, outer: Hadamard) -> torch.Tensor:
        lattice = ops.hadamard(x, (Diagonal(su), inner)) @ w.t()
        return ops.hadamard(lattice, (outer, Diagonal(sv)))

    inner, outer = rot.hadamard_for(192, "quip").inverse(), rot.hadamard_for(80, "quip")
    assert (inner.k, outer.k) == (12, 20)
    torch.testing.assert_close(layer(inner, outer), theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        layer(Hadamard(192, 12, "quip-12", transpose=True), Hadamard(80, 20, "quip-20")), theirs, atol=1e-5, rtol=1e-4
    )
    for wrong in ((inner.inverse(), outer), (inner, outer.inverse()), (inner, rot.hadamard_for(80, "quarot"))):
        assert float((layer(*wrong) - theirs).norm() / theirs.norm()) > 0.1
