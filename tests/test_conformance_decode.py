"""The suite's second implementations against the contract's own, and both against exact arithmetic on small shapes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from qhal.encoding import encode as core_encode
from qhal.formats import Format
from qhal_conformance import datasets, elements, encode
from qhal_conformance.decode import decode, plain, to_numpy
from qhal_conformance.gemm_cases import PAIRS
from qhal_conformance.generator import Stream
from qhal_conformance.quantize_check import FORMATS, compare_planes
from qhal_conformance.quantize_data import QUANTIZE_DATA, numbers_for
from qhal_conformance.reference import Product

DECODED = [
    *sorted({p.w for p in PAIRS}),
    "q4_k", "q6_k", "q4_1", "nf4_flat64", "nf4_dq", "mxfp4_dual", "mxfp6_e3m2", "nvfp4_div", "e5m2.row*fp32",
    "int4-int4.row*(bf16.tensor*bf16)", "e4m3fnuz.row*fp32@qmax=224", "lut4.row*fp16",
]  # fmt: skip
ENCODED = [
    *sorted({name for _, name, _ in FORMATS}),
    "int8-int8.row*fp32@domain=minmax", "int4.g32*bf16@scale=rcp,apply=rcp,round=away", "e4m3fn.g32*e8m0@e8m0=ceil",
    "int8.row*fp32@arith=bf16", "int4.g32*fp16@domain=signed", "e4m3fnuz.row*fp32@qmax=224", "int8.row*fp32@empty=eps",
]  # fmt: skip


@pytest.mark.parametrize("name", ["e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e3m2", "e2m3", "e2m1", "e8m0"])
def test_tables_agree_with_ml_dtypes(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    narrow = {"e8m0": "float8_e8m0fnu", "e3m2": "float6_e3m2fn", "e2m3": "float6_e2m3fn", "e2m1": "float4_e2m1fn"}
    kind = narrow.get(name, f"float8_{name}")
    table = elements.table(name)
    theirs = np.arange(len(table), dtype=np.uint8).view(getattr(ml_dtypes, kind)).astype(np.float64)
    assert np.array_equal(table, theirs, equal_nan=True)


@pytest.mark.parametrize("name", DECODED)
def test_decoding_agrees_with_the_contract(name: str) -> None:
    f = Format.parse(name)
    grouped = f.block is not None and f.block.kind == "group"
    for data in datasets.DATASETS:
        q = datasets.weight("decode", "w", f, 33, 512, data, group_index=grouped and data == "normal")
        ours, theirs = decode(q), q.dequantize().numpy()
        assert np.array_equal(ours.value, theirs), data
        assert (np.abs(ours.value) <= ours.magnitude * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ENCODED)
def test_encoding_agrees_with_the_contract(name: str) -> None:
    f = Format.parse(name)
    for data in QUANTIZE_DATA:
        for kind in ("fp32", "bf16"):
            x = numbers_for("encode", f, 33, 320, data, kind)
            wrong = compare_planes(core_encode(torch.from_numpy(x), f), encode.quantize(x, f))
            assert wrong is None, (data, kind, wrong)


def test_ties_data_holds_ties() -> None:
    """Rounding half away instead of half to even must change codes, or the data set shows nothing."""
    for name in ("int8.row*fp32", "e4m3fn.row*fp32", "e2m1.g32*e8m0", "int4.g32*bf16"):
        f = Format.parse(name)
        x = numbers_for("ties", f, 16, 256, "ties", "bf16")
        away = encode.quantize(x, Format.parse(f"{name}@round=away"))
        changed = to_numpy(encode.quantize(x, f).codes) != to_numpy(away.codes)
        assert changed.mean() > 0.2, name


def test_codes_data_returns_every_code() -> None:
    for name, lost in (("int8.row*fp32", 1), ("e4m3fn.row*fp32", 1), ("e2m1.g32*e8m0", 1), ("int4.g32*bf16", 1)):
        f = Format.parse(name)
        x = numbers_for("codes", f, 64, 512, "codes", "bf16")
        codes = set(to_numpy(encode.quantize(x, f).codes).reshape(-1).tolist())
        assert len(codes) >= len(elements.finite_codes(f.element)) - lost, name  # int: -2^(b-1); floats: -0


def test_weights_hold_every_code() -> None:
    for name in ("int4.g32*bf16", "int8.row*fp32", "e4m3fn.row*fp32", "e2m1.g32*e8m0"):
        f = Format.parse(name)
        q = datasets.weight("codes", "w", f, 16, 128, "codes")
        assert set(to_numpy(q.codes).reshape(-1).tolist()) == set(elements.finite_codes(f.element).tolist())


@pytest.mark.parametrize(
    "name", ["int4.g4*bf16", "uint4-uint4.g4*fp16", "e4m3fn.2x4*fp32", "e2m1.g4*(e4m3fn.tensor*fp32)"]
)
def test_reference_against_exact_rationals(name: str) -> None:
    """The float64 product of decoded numbers is the exact one up to 2^-50 of S."""
    w = decode(datasets.weight("exact", "w", Format.parse(name), 5, 12, "codes"))
    x = Stream("exact", "x").normal((4, 12))
    bias = Stream("exact", "b").normal((5,))
    p = Product(plain(x), w, bias)
    for m in range(4):
        for n in range(5):
            terms = [Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x[m], w.value[n], strict=True)]
            exact = sum(terms, Fraction(float(bias[n])))
            assert abs(Fraction(float(p.ref[m, n])) - exact) <= Fraction(float(p.s[m, n])) / 2**50
            assert p.s[m, n] >= abs(exact)
