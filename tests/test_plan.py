"""Plans: what runs is compared with what was asked, and the policy decides."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

import qhal
from qhal import Arithmetic, Format, LinearFormat, NumericsClass, PlanError, Rule, Support
from qhal.requests import minimum_class


class Fake(qhal.QuantOps):
    name, interface = "fake", (1, 0)

    def __init__(self, answer: Callable[[qhal.Request], Support]) -> None:
        self._answer = answer

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def supports(self, request: qhal.Request) -> Support:
        return self._answer(request)


class Model:
    dtype = torch.bfloat16

    def __init__(self, *layers: LinearFormat) -> None:
        self.layers = layers

    def layer_formats(self) -> list[LinearFormat]:
        return list(self.layers)


def linear(name: str, weight: str = "int4_g128", input: str | None = None, n: int = 64, k: int = 128) -> LinearFormat:
    return LinearFormat(name, n, k, Format.parse(weight), None if input is None else Format.parse(input))


def full(request: qhal.Request) -> Support:
    return Support("full", arithmetic=Arithmetic.of(request), executes="a kernel", numerics=minimum_class(request))


def dequantizing(request: qhal.Request) -> Support:
    asked = Arithmetic.of(request)
    assert asked is not None
    return Support("full", arithmetic=Arithmetic("bf16", asked.w), executes="W only", numerics=NumericsClass.DEQUANT_16)


def refusing(request: qhal.Request) -> Support:
    return Support("unsupported", "no such instruction")


def other_rule(request: qhal.Request) -> Support:
    return Support("conditional", "divides by 127", arithmetic=Arithmetic.of(request), rule=Rule(qmax=127.5))


def test_layers_of_one_kind_share_an_entry() -> None:
    model = Model(*(linear(f"model.layers.{i}.mlp.down_proj") for i in range(3)), linear("other", n=8))
    plan = qhal.resolve(model, Fake(full))
    assert [e.name for e in plan.entries] == ["model.layers.*.mlp.down_proj (3)", "other"]
    assert plan.entries[0].layers[2] == "model.layers.2.mlp.down_proj"


def test_skipping_the_activation_quantization_is_a_downgrade() -> None:
    model = Model(linear("a", "int8.row*bf16", "int8.row*fp32"), linear("b"))
    with pytest.raises(PlanError) as error:
        qhal.resolve(model, Fake(dequantizing))
    assert "refuses 1 of 2" in str(error.value)
    assert "[downgrade] a" in str(error.value)
    assert 'policy="allow"' in str(error.value)
    assert error.value.plan.entries[1].status == "ok"  # weight-only: decoding to 16 bits is what the format means
    plan = qhal.resolve(model, Fake(dequantizing), policy="allow")
    assert plan.entries[0].downgrade


def test_a_looser_class_than_the_minimum_is_a_downgrade() -> None:
    def loose(request: qhal.Request) -> Support:
        return Support("full", arithmetic=Arithmetic.of(request), numerics=NumericsClass.DEQUANT_16)

    with pytest.raises(PlanError, match="minimum reduced-acc"):
        qhal.resolve(Model(linear("a", "fp8", "fp8")), Fake(loose))
    with pytest.raises(PlanError, match="minimum exact"):
        qhal.resolve(Model(linear("a")), Fake(loose), numerics=NumericsClass.EXACT)


def test_refusals_stop_all_but_report() -> None:
    for policy in ("exact", "error", "allow"):
        with pytest.raises(PlanError, match="no such instruction"):
            qhal.resolve(Model(linear("a")), Fake(refusing), policy=policy)  # type: ignore[arg-type]
    plan = qhal.resolve(Model(linear("a")), Fake(refusing), policy="report")
    assert plan.entries[0].status == "refused"
    assert len(plan.offending("error")) == 1


def test_a_rule_deviation_is_listed_and_refused_by_exact_alone() -> None:
    model = Model(linear("a", "int8.row*bf16", "int8.row*fp32"))
    plan = qhal.resolve(model, Fake(other_rule))
    assert plan.entries[0].status == "rule"
    assert "qmax=127.5" in plan.explain()
    with pytest.raises(PlanError, match=r"follows qmax=127\.5"):
        qhal.resolve(model, Fake(other_rule), policy="exact")


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(qhal.PolicyError, match="choose one of exact, error, allow, report"):
        qhal.resolve(Model(), Fake(full), policy="maybe")  # type: ignore[arg-type]


def test_text_and_json_say_the_same() -> None:
    plan = qhal.resolve(Model(linear("a"), linear("b", "fp8", "fp8")), Fake(full))
    record = json.loads(plan.explain("json"))
    text = plan.explain()
    assert record["digest"] == plan.digest
    for entry in record["entries"]:
        for key in ("name", "request", "executes", "status", "numerics", "minimum"):
            assert entry[key] in text


def test_the_digest_is_rank_independent_and_sees_every_difference() -> None:
    model = Model(linear("a"), linear("b", "fp8", "fp8"))
    assert qhal.resolve(model, Fake(full)).digest == qhal.resolve(model, Fake(full)).digest
    assert qhal.resolve(model, Fake(full)).digest != qhal.resolve(model, Fake(other_rule)).digest
    assert qhal.resolve(model, Fake(full)).digest != qhal.resolve(Model(linear("a")), Fake(full)).digest


def test_scales_that_become_per_shard_are_noted() -> None:
    plan = qhal.resolve(Model(linear("a", "int8.row*bf16", "int8.row*fp32")), Fake(full), world=2)
    assert "per shard" in plan.explain()


def test_rotations_and_specs_are_planned_too() -> None:
    spec = qhal.LinearSpec(torch.zeros(8, 16), rotate_in=(qhal.Hadamard(16),), rotate_out=(qhal.Hadamard(8),), name="r")
    plan = qhal.resolve([spec], Fake(full))
    assert [type(e.request).__name__ for e in plan.entries] == ["HadamardRequest", "GemmRequest", "HadamardRequest"]


@pytest.mark.parametrize("backend", [("cuda", "sm_90"), ("rocm", "gfx942"), ("npu", "A2"), ("cpu_reference", "cpu")])
def test_every_backend_plans_with_no_device_present(backend: tuple[str, str]) -> None:
    name, arch = backend
    plan = qhal.resolve(Model(linear("a")), qhal.select(name, arch=arch), policy="report")
    assert plan.backend == name
    assert plan.entries[0].support.reason or plan.entries[0].support.executes


def test_what_is_no_model_or_no_backend_is_one_error() -> None:
    for wrong in ("path", None, linear("a"), [linear("a")]):
        with pytest.raises(qhal.QhalError, match="resolve: the model is"):
            qhal.resolve(wrong, Fake(full))  # type: ignore[arg-type]
    with pytest.raises(qhal.QhalError, match="must be what"):
        qhal.resolve(Model(), "cpu_reference")  # type: ignore[arg-type]
    with pytest.raises(qhal.FormatError, match="activations of"):
        qhal.resolve(Model(), Fake(full), dtype=torch.float8_e4m3fn)
    with pytest.raises(qhal.QhalError, match="choose text or json"):
        qhal.resolve(Model(), Fake(full)).explain("yaml")  # type: ignore[arg-type]


def test_cuts_that_no_rank_can_make_are_noted() -> None:
    model = Model(linear("a", "int4.g32*bf16", n=576, k=1536), linear("b", "int4.g128*bf16", n=64, k=384))
    text = qhal.resolve(model, Fake(full), world=7).explain()
    assert "7 ranks cannot cut its rows (column-parallel): 576 does not divide by 7" in text
    text = qhal.resolve(model, Fake(full), world=2).explain()
    assert "parts of 192 end inside a block of 128" in text
    assert "parts of 768" not in text
