"""Latent attention in the suite: its reference against torch's own attention, what is asked, and its planted faults."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qhal
from qhal.requests import NumericsClass
from qhal_conformance import mla_cases
from qhal_conformance.attention_check import build
from qhal_conformance.attention_reference import visible
from qhal_conformance.cases import Case
from qhal_conformance.mutants import MUTANTS, hunt
from qhal_conformance.operations import catalogue
from qhal_conformance.outcome import FailKind
from qhal_conformance.problem import DTYPES
from qhal_conformance.tolerance import compare

CASES = [c for c in catalogue(0) if c.profile == "mla"]
ATTENTION = [c for c in CASES if c.operation == "attention"]


@pytest.mark.parametrize("case", [c for c in ATTENTION if not c.has("softcap")], ids=lambda c: c.id)
def test_the_reference_is_attention_over_both_rows(case: Case) -> None:
    """torch's scaled_dot_product_attention in float64 over rows that are put together here."""
    p = build(case)
    expected = p.expected(NumericsClass.EXACT, case.out)
    latent, rope = (torch.from_numpy(r.value[:, 0]).double() for r in (p.k, p.v))
    q, at, key = torch.from_numpy(p.held).double(), 0, 0
    for t, n in zip(p.query_lens, p.pages.lens, strict=True):
        if n:
            rows = torch.cat([latent, rope], 1)[key : key + n]
            heads = q.shape[1]
            got = torch.nn.functional.scaled_dot_product_attention(
                q[at : at + t].transpose(0, 1),
                rows.expand(heads, -1, -1),
                rows[:, : latent.shape[1]].expand(heads, -1, -1),
                attn_mask=torch.from_numpy(visible(t, n, p.request)),
                scale=p.request.scale,
            )
            assert np.allclose(got.transpose(0, 1).numpy(), expected.o[at : at + t], rtol=1e-12, atol=1e-13)
        at, key = at + t, key + n


@pytest.mark.parametrize("case", ATTENTION, ids=lambda c: c.id)
def test_the_bound_from_both_sides(case: Case) -> None:
    e = build(case).expected(NumericsClass.FP32_ACC, case.out)
    for share, wrong in ((0.99, None), (1.01, FailKind.NUMERIC)):
        assert compare(e.o + share * e.o_bound, e.o, e.o_bound, case.out).kind == wrong


@pytest.mark.parametrize("seed", range(2))
def test_float32_with_p_in_its_own_type_is_within_the_bound(seed: int) -> None:
    """Honest kernels: scores of both parts added in float32, P rounded, no alarm."""
    for case in [c.reseeded(seed) for c in ATTENTION]:
        p = build(case)
        e = p.expected(NumericsClass.FP32_ACC, case.out)
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[p.request.p.element]
        q, at, key, r = torch.from_numpy(p.held), 0, 0, p.request
        for t, n in zip(p.query_lens, p.pages.lens, strict=True):
            latent, rope = (torch.from_numpy(x.value[key : key + n, 0]) for x in (p.k, p.v))
            now, width = q[at : at + t], latent.shape[1]
            s = (now[..., :width] @ latent.T + now[..., width:] @ rope.T) * r.scale
            s = s if r.softcap is None else r.softcap * torch.tanh(s / r.softcap)
            s = s.masked_fill(~torch.from_numpy(visible(t, n, r))[:, None], -torch.inf)
            top = s.amax(-1, keepdim=True) if n else s
            w = torch.exp(s - torch.where(torch.isfinite(top), top, 0.0)) if n else s
            y = (
                (w.to(kind).float() @ latent) / w.sum(-1, keepdim=True).clamp(min=1e-30)
                if n
                else torch.zeros(*now.shape[:2], width)
            )
            y = y.to(DTYPES[case.out]).double().numpy()
            found = compare(y, e.o[at : at + t], e.o_bound[at : at + t], case.out)
            assert found.kind is None, (case.id, found.detail)
            at, key = at + t, key + n


def test_formats_phases_and_families_are_asked() -> None:
    assert {(c.subject, c.operation) for c in CASES} >= {
        (mla_cases.PREFIX + (k if k == v else f"{k}~{v}"), op)
        for k, v in mla_cases.FORMATS
        for op in ("quant_kv", "attention")
    }
    assert {c.data for c in ATTENTION} == {"normal", "uniform", "dominant", "positive", "relabel"}
    assert {build(c).request.phase for c in ATTENTION} == {"decode", "prefill", "mixed"}
    assert any(c.has("lse") and c.required for c in ATTENTION)
    scales = {round(build(c).request.scale ** -2, 6) for c in ATTENTION}
    assert not scales & {c.size("r") + c.size("d") for c in ATTENTION}, "a scale of the whole row would pass unseen"


def test_every_planted_fault_is_killed() -> None:
    found = hunt(qhal.select("cpu_reference"), [m for m in MUTANTS if m.group == "mla"], 0)
    assert [m["name"] for m in found["mutants"] if not m["killed"]] == [] and found["total"] >= 20
