"""selftest: usable where everything is right, unusable where anything is wrong, unproven where nobody can know."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import cases, path
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import qhal
from qhal import ExpertsFormat, Format, KVFormat, LinearFormat
from qhal.layers import attention_request
from qhal.requests import Arithmetic, GemmRequest, HadamardRequest, NumericsClass, Request, Support
from qhal.rotations import Diagonal, Hadamard, kinds
from qhal_cli.app import app
from qhal_conformance import selftest as module
from qhal_conformance.covering import MULTIPLY_ADDS, PROFILE, cases_for, form, named
from qhal_conformance.mutants import MUTANTS
from qhal_conformance.operations import OPERATIONS, catalogue
from qhal_conformance.outcome import Status
from qhal_conformance.runner import Record
from qhal_conformance.selftest import Selftest, selftest
from qhal_conformance.wrapping import Wrapped
from qhal_schemes import open_checkpoint

cli = CliRunner()
INT4, INT8, FP8 = (Format.parse(name) for name in ("int4.g32*bf16", "int8.row*fp32", "e4m3fn.row*fp32"))
HADAMARD = HadamardRequest(kinds=kinds([Hadamard(128)]), n=256, x=torch.bfloat16)


def layer(w: Format, x: Format | None = None, n: int = 128, k: int = 256, **more: Any) -> LinearFormat:
    return LinearFormat("layers.0.mlp.down_proj", n, k, w, x, **more)


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the contract's rules, which are the same in every test."""
    monkeypatch.setattr(module, "_contract", list)


@pytest.mark.parametrize("family", sorted({case.partition("/")[0] for case in cases()}))
def test_the_reference_is_never_called_wrong(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One checkpoint of every family: cases made for formats that the catalogue does not know are judged rightly."""
    few(monkeypatch)
    ckpt = open_checkpoint(path(cases(family)[0]) / "checkpoint")
    found = selftest("cpu_reference", ckpt.layer_formats(), dtype=ckpt.dtype, in_process=True)
    assert found.verdict in ("usable", "unproven") and not found.wrong, found.wrong
    assert all("not covered by the suite" in text for text in found.uncovered), found.uncovered
    assert found.records or found.uncovered
    for record in found.records:  # `qhal conformance repro` knows every id, with any seed
        assert named(record.case.id) in (record.case, *catalogue(1))
        assert named(record.case.reseeded(7).id).seed == 7


@pytest.mark.parametrize(
    ("fault", "formats"),
    [
        ("scale-last-block", [layer(INT4)]),
        ("nibble-swap-last", [layer(INT4)]),
        ("bf16-sum", [layer(FP8, FP8)]),
        ("bias-twice", [layer(INT4, bias=True)]),
        ("half-away-int8", [layer(INT8, INT8)]),
        ("subnormals-flushed", [layer(FP8, FP8)]),
        ("expert-offset", [ExpertsFormat("mlp.experts", 8, layer(INT4), layer(INT4, k=128, n=256))]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_planted_fault_makes_it_unusable(fault: str, formats: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    mutant = next(m for m in MUTANTS if m.name == fault)
    found = selftest(mutant.make(qhal.select("cpu_reference")), formats, in_process=True)
    assert found.verdict == "unusable" and not found and "/" in found.wrong[0]


def test_caches_and_rotations_are_asked_as_an_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    kv = KVFormat("mha", INT8, INT8, heads=2, k_dim=64, v_dim=64, name="layers.0.self_attn")
    attention = attention_request(kv, torch.bfloat16, page=16, heads=4, scale=0.1, phase="decode")
    asked: list[tuple[str, Request]] = [
        ("layers.0.self_attn", attention),
        ("layers.0.self_attn", replace(attention, window=4096)),
        ("layers.0.mlp", HADAMARD),
    ]
    found = selftest("cpu_reference", [kv], also=asked, in_process=True)
    assert found.verdict == "usable" and [form.passed > 0 for form in found.forms] == [True] * 4
    assert {r.case.operation for r in found.records} == {"quant_kv", "attention", "hadamard"}


def test_clipped_inputs_are_asked_at_the_layers_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    clipped = [layer(INT8, INT8, clip=True, k=288)]
    found = selftest("cpu_reference", clipped, in_process=True)
    assert found.verdict == "usable" and any("_k288/bf16/outlier+clip" in r.case.id for r in found.records)
    ignored = next(m for m in MUTANTS if m.name == "clip-ignored").make(qhal.select("cpu_reference"))
    assert selftest(ignored, clipped, in_process=True).verdict == "unusable"


class _Half(Wrapped):
    """Refuses int4, runs fp8 as bf16."""

    def supports(self, request: Request) -> Support:
        if isinstance(request, GemmRequest) and request.w.storage == INT4.storage:  # type: ignore[union-attr]
            return Support("not_implemented", "no int4 yet")
        answer = super().supports(request)
        if isinstance(request, GemmRequest) and request.x == (FP8,):
            return replace(answer, arithmetic=Arithmetic("bf16", str(FP8)))
        return answer


def test_what_is_refused_or_a_downgrade_is_unusable_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    ops = _Half(qhal.select("cpu_reference"))
    refused = selftest(ops, [layer(INT4), replace(layer(INT4), name="other")], in_process=True)
    assert refused.verdict == "unusable" and not refused.records and len(refused.wrong) == 1
    assert "layers.0.mlp.down_proj and 1 more" in refused.wrong[0] and "no int4 yet" in refused.wrong[0]
    lower = selftest(ops, [layer(FP8, FP8)], in_process=True)
    assert lower.verdict == "unusable" and "a downgrade: asked is e4m3fn.row*fp32 x" in lower.wrong[0]


@pytest.mark.parametrize(("answer", "words"), [(ValueError("no"), "raised ValueError: no"), (True, "returned bool")])
def test_supports_that_misbehaves_is_unusable(answer: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)

    class Odd(Wrapped):
        def supports(self, request: Request) -> Support:
            if isinstance(answer, Exception):
                raise answer
            return answer  # type: ignore[no-any-return]

    found = selftest(Odd(qhal.select("cpu_reference")), also=[("layers.0.mlp", HADAMARD)], in_process=True)
    assert found.verdict == "unusable" and words in found.wrong[0]


def test_what_no_case_covers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    turned = HadamardRequest(kinds=kinds([Diagonal(torch.ones(64))]), n=64, x=torch.bfloat16)
    also = [("layers.1.mlp", turned)]
    found = selftest("cpu_reference", [layer(INT4, operand=FP8), layer(INT8)], also=also)
    assert found.verdict == "unproven" and len(found.uncovered) == 2 and not found.wrong
    assert "as e4m3fn.row*fp32" in found.uncovered[0] and "layers.1.mlp" in found.uncovered[1]
    assert any(form.passed for form in found.forms)

    class Fused(Wrapped):
        fusions = frozenset({"linear"})

        def linear(self, x: Any, layer: Any, *, decode: bool = False, out: Any = None) -> Any:
            return super().linear(x, layer, decode=decode, out=out)

    fused = selftest(Fused(qhal.select("cpu_reference")), [layer(INT8)], in_process=True)
    assert fused.uncovered == ("not covered by the suite: the fused `linear` of wrapped",)


def test_a_case_whose_inputs_cannot_be_made_is_no_fault_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)

    def broken(case: Any) -> str:
        raise ValueError("no such numbers")

    monkeypatch.setitem(OPERATIONS, "gemm", replace(OPERATIONS["gemm"], sha=broken))
    found = selftest("cpu_reference", [layer(Format.parse("int5.g32*fp16"))], in_process=True)
    assert found.verdict == "unproven" and "the suite cannot make the inputs: ValueError: no such numbers" in str(found)
    assert {r.outcome.status for r in found.records} == {Status.SKIP}


def test_the_budget_ends_it_and_every_form_comes_before_second_cases() -> None:
    order: list[Record] = []

    def slowly(record: Record, planned: int) -> None:
        order.append(record)
        if record.case.operation != "contract":
            time.sleep(0.2)

    layers = [layer(INT4), layer(INT8), layer(INT8, INT8)]
    found = selftest("cpu_reference", layers, budget=4.0, in_process=True, seen=slowly)
    contract = sum(1 for case in catalogue(0) if case.operation == "contract")
    assert {r.case.operation for r in order[:contract]} == {"contract"}
    if len(order) >= contract + 4:  # a machine that is slower than the budget shows less
        assert len({r.case.subject for r in order[contract : contract + 4]}) == 3
    assert found.verdict == "unproven" and found.unreached and "not reached in 4 s" in found.uncovered[-1]
    assert len(found.records) + len(found.unreached) >= len(order) == len(found.records)


def test_without_formats_everything_that_is_claimed_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = selftest("cpu_reference")
    assert whole.verdict == "usable" and {f.name.split()[0] for f in whole.forms} == set(OPERATIONS) - {"contract"}

    class Nothing(Wrapped):
        def supports(self, request: Request) -> Support:
            return Support("not_implemented", "nothing yet")

        def __getattribute__(self, name: str) -> Any:
            if name in ("gemm", "prepare", "quantize", "hadamard", "grouped_gemm", "attention_batch", "kv_planes"):
                raise qhal.UnsupportedError(Support("not_implemented", "nothing yet"))
            return super().__getattribute__(name)

    few(monkeypatch)
    nothing = selftest(Nothing(qhal.select("cpu_reference")), in_process=True)
    assert nothing.verdict == "unusable" and "executes nothing" in nothing.wrong[0]


def test_every_required_case_covers_its_own_request() -> None:
    for case in catalogue(0):
        request = OPERATIONS[case.operation].request(case)
        if request is not None and case.required and not case.has("exact"):
            assert case in cases_for(request), case.id


@pytest.mark.parametrize(
    "wrong",
    [
        "gemm/int4.g32*bf16/m16_n64_k4096/bf16/onehot+biass/0",
        "gemm/int4.g32*bf16/m16_n64_k4096/bf16/onehot+strided/0",
        "gemm/int4.g32*bf16/m16_n64_k4096/int8/onehot/0",
        "gemm/int4.g32*bf16/m16_n99999999_k4096/bf16/onehot/0",
        "gemm/int4.g32*bf16/m16_k4096/bf16/onehot/0",
        "gemm/int4.g32*bf16/m16_nn_k4096/bf16/onehot/0",
        "gemm/int4.g32*bf16/m16_n64_k4096_x/bf16/onehot/0",
        "gemm/int4.g32*bf16/m16_n64_k4096/bf16/onehot/00",
        "gemm/int9.g32*bf16/m16_n64_k4096/bf16/onehot/0",
        "gemm/int4.g32*bf16/m16_n64_k4096/bf16/onehot/x",
        "attention/int8.row*fp32/l9_h4_g2_d64_p16/bf16/uniform/0",
        "contract/refits/m16_n64_k4096/bf16/normal/0",
        "vq_decode/no-such/m16/bf16/identity/0",
        "gemm",
        "",
    ],
)
def test_an_id_that_nobody_makes_is_refused(wrong: str) -> None:
    """A misspelt option would otherwise be a case without it, which passes."""
    with pytest.raises(qhal.FormatError, match="no case"):
        named(wrong)


def test_the_command_that_a_failure_prints_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    mutant = next(m for m in MUTANTS if m.name == "nibble-swap-last")
    found = selftest(mutant.make(qhal.select("cpu_reference")), [layer(INT4, k=352)], in_process=True)
    made = next(text for text in found.wrong if "_k352/" in text)
    command = made.rpartition("; ")[2].replace("wrapped", "cpu_reference")
    done = cli.invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0 and "status     pass" in done.stdout and "_k352/" in done.stdout


def test_forms_differ_where_kernels_do() -> None:
    base = GemmRequest(w=INT4, n=64, k=128, x=(Format("bf16"),))
    same = (replace(base, n=4096, m=(1, 1)), replace(base, bias=True), replace(base, numerics=NumericsClass.EXACT))
    assert {form(r) for r in same} == {form(base)}
    other = (
        replace(base, w=INT8),
        replace(base, x=(INT8,)),
        replace(base, group_index=True),
        replace(base, operand=FP8),
    )
    assert len({form(r) for r in (base, *other, replace(base, static=(True,)))}) == 6


@given(n=st.integers(1, 200_000), k=st.integers(1, 40_000), w=st.sampled_from([INT4, INT8, FP8]))
@settings(max_examples=40, deadline=None)
def test_cases_have_the_layers_k_and_a_bounded_cost(n: int, k: int, w: Format) -> None:
    for case in cases_for(GemmRequest(w=w, n=n, k=k, x=(Format("bf16"),))):
        if case.profile == PROFILE:
            assert case.size("k") == k and case.size("n") <= n
            assert case.size("m") * case.size("n") * k <= max(MULTIPLY_ADDS, 16 * case.size("m") * k)


def test_the_command_and_its_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(path("compressed_tensors/w4a16_g128_sym") / "checkpoint")
    done = cli.invoke(app, ["selftest", "-b", "cpu_reference", "--for", folder, "--kv-format", "int8", "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["verdict"] == "usable" and found["checkpoint"] == folder
    assert any("attention" in form["form"] and form["passed"] for form in found["forms"])
    assert isinstance(cli.invoke(app, ["selftest", "-b", "nowhere"]).exception, qhal.BackendError)
    for verdict, code in (("unusable", 1), ("unproven", 3)):
        wrong, uncovered = (("x: wrong [sic]",), ()) if code == 1 else ((), ("x: not covered",))
        made = Selftest("b", wrong, uncovered, (), (), (), 1.0)
        monkeypatch.setattr(module, "selftest", lambda *a, made=made, **k: made)
        done = cli.invoke(app, ["selftest", "-b", "cpu_reference"])
        assert done.exit_code == code and f"b: {verdict}" in done.stdout and (*wrong, *uncovered)[0] in done.stdout
    assert cli.invoke(app, ["selftest", "--budget", "0"]).exit_code == 2
