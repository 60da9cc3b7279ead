"""The bound of attention with quantized P, or with rounded rows: right for kernels that do so, wrong for others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qhal import Format
from qhal.encoding import encode
from qhal.requests import AttentionRequest, KVRequest, NumericsClass, minimum_class
from qhal_conformance import honest_forms
from qhal_conformance.attention_check import build, request_of
from qhal_conformance.attention_reference import visible
from qhal_conformance.cases import Case
from qhal_conformance.mla_cases import is_mla
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import FailKind
from qhal_conformance.problem import DTYPES
from qhal_conformance.tolerance import compare

CASES = [c for c in catalogue(0) if c.operation == "attention" and any(o.startswith("p=") for o in c.options)]
CASES = [c for c in CASES if c.data != "saturated"]


def tiled(case: Case, tile: int, p: Format | None = None, scale: float = 1.0) -> np.ndarray:
    """Attention in float32, `tile` keys at a time: P is rounded under the running maximum, sums are rescaled."""
    problem = build(case)
    r = problem.request
    p = p or r.p
    p_scale = torch.from_numpy(problem.static["p.scale"]) * scale if not p.plain else None
    out, token, key = [], 0, 0
    for t, n in zip(problem.query_lens, problem.pages.lens, strict=True):
        q = torch.from_numpy(problem.held[token : token + t])
        k, v = (torch.from_numpy(x.value[key : key + n]) for x in (problem.k, problem.v))
        k, v = (x.repeat_interleave(r.heads // r.kv.heads, 1) for x in (k, v))
        seen = torch.from_numpy(visible(t, n, r))
        top = torch.full((t, r.heads, 1), -torch.inf)
        total, o = torch.zeros(t, r.heads, 1), torch.zeros(t, r.heads, v.shape[-1])
        for first in range(0, n, tile):
            s = torch.einsum("thd,lhd->thl", q, k[first : first + tile]) * r.scale
            s = s.masked_fill(~seen[:, None, first : first + tile], -torch.inf)
            above = torch.maximum(top, s.amax(-1, keepdim=True))
            e = torch.exp(s - above).nan_to_num(0.0)
            shrink = torch.exp(top - above).nan_to_num(0.0)
            held = encode(e, p, scale=p_scale).dequantize()
            total = total * shrink + e.sum(-1, keepdim=True)
            o = o * shrink + torch.einsum("thl,lhd->thd", held, v[first : first + tile])
            top = above
        out.append(torch.where(total > 0, o / total, 0.0))
        token, key = token + t, key + n
    return torch.cat(out).to({"bf16": torch.bfloat16, "fp16": torch.float16}[case.out]).double().numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_tiles_are_within_the_bound(case: Case) -> None:
    expected = build(case).expected(NumericsClass.FP32_ACC, case.out)
    for tile in (8, 1000):
        verdict = compare(tiled(case, tile), expected.o, expected.o_bound, case.out)
        assert verdict.kind is None, (tile, verdict.detail)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_other_roundings_of_p_are_not(case: Case) -> None:
    """Steps sixteen times as large for integers; for floats one fraction bit instead of three."""
    expected = build(case).expected(NumericsClass.FP32_ACC, case.out)
    integer = "int8" in str(build(case).request.p)
    coarse = tiled(case, 1000, scale=16.0) if integer else tiled(case, 1000, Format.parse("e2m1.tensor*fp32"), 448 / 6)
    assert compare(coarse, expected.o, expected.o_bound, case.out).kind == FailKind.NUMERIC


def test_trees_and_operands_are_asked_at_level_zero() -> None:
    mine = [c for c in catalogue(0) if c.operation == "attention"]
    assert {c.data for c in mine if c.has("tree")} == {"normal", "uniform"}
    declared = {o for c in mine for o in c.options if "=" in o}
    assert declared >= {"q=int8.head*fp32", "q=int8.row*fp32", "q=e4m3fn.tensor*fp32", "p=int8.tensor*fp32"}
    assert not any(c.required for c in mine if c.has("tree") or any(o[:2] in ("q=", "p=") for o in c.options))


HALVES = [
    c
    for c in catalogue(0)
    if c.operation == "attention" and not is_mla(c) and minimum_class(request_of(c)) == NumericsClass.DEQUANT_16
]


def rounded(case: Case, to: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """o and lse of float32 attention over keys and values that were rounded to a type."""
    problem = build(case)
    k, v = (replace(r, value=torch.from_numpy(r.value).to(to).float().numpy()) for r in (problem.k, problem.v))
    o, lse = honest_forms._attend(replace(problem, k=k, v=v), 1 << 20, False, 1, None)
    return o.to(DTYPES[case.out]).double().numpy(), lse.double().numpy()


@pytest.mark.parametrize("case", HALVES, ids=lambda c: c.id)
def test_rounded_rows_are_within_their_class_and_no_stricter_one(case: Case) -> None:
    """The log-sum-exp sees it: under fp32-acc always where scores are not 0, under reduced-acc in bf16 (below)."""
    o, lse = rounded(case, DTYPES[build(case).request.q.element])
    fine, strict = (build(case).expected(c, case.out) for c in (NumericsClass.DEQUANT_16, NumericsClass.FP32_ACC))
    assert compare(o, fine.o, fine.o_bound, case.out).kind is None
    assert compare(lse, fine.lse, fine.lse_bound, "fp32").kind is None
    moved = case.data != "uniform" and case.subject != "e4m3fn.tensor*fp32"  # those scales are powers of two
    assert (compare(lse, strict.lse, strict.lse_bound, "fp32").kind is not None) == moved


def test_reduced_sums_do_not_excuse_rounded_rows() -> None:
    seen = 0
    for case in HALVES:
        if case.out == "bf16" and case.data == "normal":
            lse, bound = rounded(case, torch.bfloat16)[1], build(case).expected(NumericsClass.REDUCED_ACC, "bf16")
            seen += compare(lse, bound.lse, bound.lse_bound, "fp32").kind is not None
    assert seen >= 5


@pytest.mark.parametrize("case", [c for c in HALVES if c.data == "normal" and "row" in c.subject], ids=lambda c: c.id)
def test_fewer_bits_than_sixteen_are_outside(case: Case) -> None:
    """Rows rounded to float8 once more: three fraction bits where bf16 has seven."""
    fine = build(case).expected(NumericsClass.DEQUANT_16, case.out)
    assert compare(rounded(case, torch.float8_e4m3fn)[0], fine.o, fine.o_bound, case.out).kind == FailKind.NUMERIC


def test_which_attention_may_round_its_rows() -> None:
    plain, int8 = Format("bf16"), Format.parse("int8.row*fp32")
    kv = KVRequest(kind="mha", k=int8, v=int8, heads=2, k_dim=64, v_dim=64, page=16)
    ask = AttentionRequest(kv=kv, heads=2, scale=1.0, phase="decode", q=plain, p=plain, out=torch.bfloat16)
    assert minimum_class(ask) == NumericsClass.DEQUANT_16
    assert minimum_class(replace(ask, kv=replace(kv, v=plain))) == NumericsClass.DEQUANT_16
    for stricter in (
        replace(ask, q=int8),
        replace(ask, p=Format.parse("int8.tensor*fp32")),
        replace(ask, q=Format("fp32")),
        replace(ask, p=Format("fp32")),
        replace(ask, p=Format("e4m3fn")),
        replace(ask, q_rope=int8),
        replace(ask, kv=replace(kv, k=plain, v=plain)),
    ):
        assert minimum_class(stricter) == NumericsClass.REDUCED_ACC, stricter
