"""Structured codebooks: QuIP#'s own table and weights, the lattice itself, and codebooks that come at run time."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qhal
from qhal import CodebookSegment, CodebookTensor, FormatError, VQRequest, lattices, named_tables
from qhal.codebooks import STRUCTURED, CodebookFormat, SegmentFormat


@pytest.fixture(scope="module")
def ops() -> qhal.QuantOps:
    return qhal.select("cpu_reference")


def quip(golden: Path, case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    folder = golden / "quip" / case
    if not (folder / "expected.safetensors").is_file():
        pytest.skip(f"quip/{case} is not among the golden data in {golden} (set QHAL_GOLDEN)")
    (stored,) = (folder / "checkpoint").glob("*.safetensors")
    return load_file(stored), load_file(folder / "expected.safetensors")


def test_e8p12_is_the_table_that_quip_computes(golden: Path) -> None:
    _, expected = quip(golden, "quip_e8p12_pow2")
    grid = expected["codebook.e8p_grid_x4"]
    assert torch.equal(lattices.load("e8p12").reshape(65536, 8) * 4, grid.float())
    packed = expected["codebook.e8p_packed_abs"].reshape(-1, 1).long()
    magnitudes = ((packed >> (4 * torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]))) % 16 - 8).abs() / 2
    assert torch.equal(magnitudes, lattices.load("e8p12").reshape(256, 256, 8)[:, 0].sub(0.25).abs())


def test_e8p12_rows_are_shifted_vectors_of_e8() -> None:
    rows = lattices.load("e8p12")
    assert (rows.dtype, tuple(rows.shape)) == (torch.float32, (65536, 1, 8))
    flat = rows.reshape(-1, 8)
    assert flat.unique(dim=0).shape[0] == 65536
    for code in range(0, 65536, 257):
        shift = -0.25 if bin(code & 255).count("1") % 2 else 0.25
        v = [x - shift for x in flat[code].tolist()]
        assert all(x % 1 == 0.5 for x in v)
        assert sum(v) % 2 == 0  # half-odd coordinates with an even sum: E8
        assert sum(x * x for x in v) <= (10 if code >> 8 < 227 else 12)


def test_e81b_is_the_inside_of_e8_and_fifteen_axes() -> None:
    rows = lattices.load("e81b").reshape(256, 8)
    assert rows.unique(dim=0).shape[0] == 256
    whole = (rows % 1 == 0).all(1)
    assert bool((whole | (rows % 1 == 0.5).all(1)).all())
    assert bool((rows.sum(1) % 2 == 0).all())
    lengths = (rows**2).sum(1)
    assert torch.equal(lengths[:241].unique(), torch.tensor([0.0, 2.0]))
    assert (lengths[:241] == 2).sum() == 240  # the kissing number of E8
    assert bool(whole[:113].all())
    assert not bool(whole[113:241].any())
    for part in (rows[:113], rows[113:241]):
        assert all(a < b for a, b in pairwise(part.tolist()))
    assert torch.equal(rows[241:], torch.cat([2 * torch.eye(8), -2 * torch.eye(8)[:7]]))


def test_a_damaged_codebook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lattices, "_LONG", lattices._LONG.replace("33313311", "33313312"))
    lattices.load.cache_clear()
    with pytest.raises(FormatError, match=r"'e8p12' has the hash .* must have ea3883a85a62"):
        STRUCTURED["e8p12"]()


def test_codebooks_are_built_on_first_use_and_on_the_cpu() -> None:
    script = (
        "import torch, qhal; from qhal import lattices; n = lattices.load.cache_info().currsize\n"
        "with torch.device('meta'): t = [lattices.load('e8p12'), lattices.load('e81b')]\n"
        "print(n, *(x.device.type for x in t))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "cpu", "cpu"]


def unpack_e8p(words: torch.Tensor) -> torch.Tensor:
    """QuIP#'s int64 [O, I/32] to codes [O, I/8]: a word holds 2 x 2 codes, magnitudes below, sign bits above."""
    o, columns = words.shape[0], words.shape[1] * 32
    w = words.reshape(-1, columns // 64, 8, 4).transpose(1, 2).reshape(o // 2, columns // 16)
    i = torch.arange(4)
    magnitude = (w[..., None] >> (8 * i)) & 255
    signs = sum(((w[..., None] >> (32 + 4 * j + i)) & 1) << j for j in range(8))
    blocks = (magnitude << 8 | signs).reshape(o // 2, columns // 16, 2, 2)  # [.., column, row]
    return blocks.permute(0, 3, 1, 2).reshape(o, columns // 8).int()


@pytest.mark.parametrize("case", ["quip_e8p12_pow2", "quip_e8p12_had12_20", "quip_e8p12rvq4b"])
def test_weights_of_quip(golden: Path, ops: qhal.QuantOps, case: str) -> None:
    """The lattice weight of the files, through the operation `vq_decode`."""
    stored, expected = quip(golden, case)
    for name, wanted in expected.items():
        if not name.endswith(".Wr"):
            continue
        words = stored[name.removesuffix(".Wr") + ".Qidxs"]
        n, k = wanted.shape
        stages = words.reshape(n, -1, k // 32).unbind(1)
        codes = torch.stack([unpack_e8p(s.contiguous()) for s in stages], -1)
        divisors = (1.0, 3.45)[: len(stages)] if len(stages) > 1 else ()
        w = CodebookTensor((n, k), (CodebookSegment(codes, ("e8p12",) * len(stages), divisors),))
        got = ops.vq_decode(ops.prepare(w, VQRequest(w=w.format, n=n, k=k, out=torch.float32)))
        assert torch.equal(got, wanted.float()), name


def test_formats_of_structured_codebooks() -> None:
    codes = torch.zeros(4, 2, 2, dtype=torch.int32)
    w = CodebookTensor((4, 16), (CodebookSegment(codes, ("e8p12", "e81b"), (1.0, 2.04)),))
    assert w.format.segments == (SegmentFormat(16, (1, 8), ((65536, "e8p12"), (256, "e81b")), (1.0, 2.04)),)
    assert str(w.format) == "vq1x8[e8p12+e81b]"
    assert w.format.bits == 3.0
    first = lattices.load("e8p12")[0, 0] + lattices.load("e81b")[0, 0] / 2.04
    assert torch.equal(w.dequantize(), first.repeat(4, 2))
    assert list(w.planes()) == ["segments.0.codes"]  # a constructed table is no plane of the weight


def test_a_codebook_registered_after_it_was_refused(ops: qhal.QuantOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer used to be cached for ever."""
    f = CodebookFormat((SegmentFormat(4, (1, 2), ((4, "later"),)),))
    request = VQRequest(w=f, n=2, k=4, out=torch.float32)
    assert "no structured codebook 'later'; known: e8p12, e81b" in ops.supports(request).reason
    before = named_tables.revision()
    monkeypatch.setitem(STRUCTURED, "later", lambda: torch.arange(8.0).reshape(4, 1, 2))
    assert named_tables.revision() != before
    assert ops.supports(request)
    w = CodebookTensor((2, 4), (CodebookSegment(torch.tensor([[[1], [3]], [[0], [2]]]).int(), ("later",)),))
    got = ops.vq_decode(ops.prepare(w, request))
    assert torch.equal(got, torch.tensor([[2.0, 3, 6, 7], [0, 1, 4, 5]]))
    monkeypatch.undo()
    assert not ops.supports(request)
