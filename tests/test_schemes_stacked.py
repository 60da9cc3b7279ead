"""Experts that a file stores stacked: a scheme names their modules, and everything else treats them as experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import qhal
from qhal.errors import CheckpointError
from qhal.formats import Format
from qhal.groups import Indexed
from qhal.layer_formats import Activation, ExpertsFormat, LinearFormat
from qhal.specs import LinearSpec
from qhal.tensors import QTensor
from qhal_schemes import Checkpoint, CheckpointConfig, SchemeMapping, TensorIndex
from qhal_schemes.experts import StackedExperts

Write = Callable[..., Path]
E, N, K = 3, 6, 8
P = "model.layers.0.mlp.experts"
FORMAT = Format.parse("int8.row*fp32")


class Stacked(SchemeMapping):
    """int8 codes `<prefix>.<name>_codes` [E, N, K] with scales `_scale` [E, N]: a format of this test alone."""

    modules: Sequence[str] = (f"{P}.gate_up_proj", f"{P}.down_proj")  # type: ignore[assignment]
    excluded: Mapping[str, str] = {}  # type: ignore[assignment]

    @property
    def stacked(self) -> Mapping[str, StackedExperts]:
        return {P: StackedExperts(P, E, *self.modules)}

    def tensors(self, module: str) -> Sequence[str]:
        return [f"{module}_codes", f"{module}_scale"]

    def describe(self, module: str) -> LinearFormat:
        return LinearFormat(module, *self.index[f"{module}_codes"].shape[1:], FORMAT)

    def read(self, module: str) -> LinearSpec:
        raise AssertionError(f"{module} is stacked")

    def read_experts(self, module: str, first: int, count: int) -> LinearSpec:
        t = self.index.read_all(self.tensors(module), (first, count))
        scale = t[f"{module}_scale"].unsqueeze(-1)
        return LinearSpec(QTensor(FORMAT, t[f"{module}_codes"], scale), name=module)


def checkpoint(write: Write, model: dict[str, Any] | None = None, inner: int = N) -> Checkpoint:
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in (("gate_up_proj", (E, 2 * inner, K)), ("down_proj", (E, K, N))):
        tensors[f"{P}.{name}_codes"] = torch.randint(-128, 128, shape, generator=g).to(torch.int8)
        tensors[f"{P}.{name}_scale"] = torch.rand(shape[:2], generator=g) + 0.1
    folder = write(tensors, model=model)
    return Checkpoint(Stacked(CheckpointConfig.read(folder), TensorIndex.open(folder)))


def test_stacked_experts_are_experts(write_checkpoint: Write) -> None:
    ckpt = checkpoint(write_checkpoint)
    assert ckpt.modules(quantized=True) == (f"{P}.down_proj", f"{P}.gate_up_proj")  # the order of the file
    assert list(ckpt.stacked) == [P] and not ckpt.account.plain
    (found,) = ckpt.layer_formats()
    assert isinstance(found, ExpertsFormat)
    assert (found.experts, found.gate_up.n, found.gate_up.k, found.down.n, found.down.k) == (E, 2 * N, K, K, N)
    assert ckpt.summary()["experts"] == [{"prefix": P, "experts": E}]
    assert ckpt.summary()["formats"][0]["weights"] == E * 3 * N * K
    whole, part = ckpt.experts_spec(P), ckpt.experts_spec(P, range(1, 3))
    assert found == whole.format
    assert torch.equal(whole.gate_up.stored(), ckpt.stored(f"{P}.gate_up_proj"))
    assert torch.equal(part.down.stored(), whole.down.stored()[1:])


def test_rows_in_turns_become_gate_and_up(write_checkpoint: Write) -> None:
    ckpt = checkpoint(write_checkpoint, {"model_type": "gpt_oss", "swiglu_limit": 7})
    stored, spec = ckpt.stored(f"{P}.gate_up_proj"), ckpt.experts_spec(P)
    assert torch.equal(spec.gate_up.stored(), torch.cat([stored[:, 0::2], stored[:, 1::2]], 1))
    assert spec.activation == Activation("swiglu", alpha=1.702, limit=7.0, shift=1.0)


def test_stacked_experts_run(write_checkpoint: Write) -> None:
    ckpt = checkpoint(write_checkpoint)
    layer = ckpt.load_experts(P, qhal.select("cpu_reference"), dtype=torch.float32)
    x, ids = torch.randn(4, K), torch.tensor([[0, 2], [1, 0], [2, 1], [1, 2]], dtype=torch.int32)
    weights = torch.rand(4, 2)
    y = layer(x, Indexed(ids, weights))
    gate_up, down = ckpt.stored(f"{P}.gate_up_proj").double(), ckpt.stored(f"{P}.down_proj").double()
    wanted = torch.zeros(4, K, dtype=torch.float64)
    for t in range(4):
        for slot in range(2):
            e = int(ids[t, slot])
            gate, up = (gate_up[e] @ x[t].double()).chunk(2)
            wanted[t] += weights[t, slot] * (down[e] @ (gate * torch.sigmoid(gate) * up).float().double())
    # the activation is rounded to float32 once, |error| <= 2^-24 relative per term, and so is the result
    bound = 2.0**-22 * wanted.abs().max()
    assert (y.double() - wanted).abs().max() <= bound


def test_a_stacked_module_is_no_linear_layer(write_checkpoint: Write) -> None:
    ckpt = checkpoint(write_checkpoint)
    with pytest.raises(CheckpointError, match=rf"holds 3 experts and is no single layer; use load_experts\('{P}'\)"):
        ckpt.linear_spec(f"{P}.gate_up_proj")
    with pytest.raises(CheckpointError, match=f"no experts 1:4; it has {E}"):
        ckpt.experts_spec(P, (1, 3))


def test_halves_that_do_not_fit(write_checkpoint: Write) -> None:
    ckpt = checkpoint(write_checkpoint, inner=N + 1)
    with pytest.raises(CheckpointError, match=r"gate and up \[14, 8\] and down \[8, 6\] do not fit"):
        ckpt.experts_format(P)


@pytest.mark.parametrize(
    ("model", "activation"),
    [
        ({}, Activation("silu")),
        ({"swiglu_limit": 10.0}, Activation("swiglu", limit=10.0)),
        ({"swiglu_limit": 7.0, "swiglu_alpha": 1.5}, Activation("swiglu", alpha=1.5, limit=7.0, shift=1.0)),
        ({"model_type": "gpt_oss"}, Activation("swiglu", alpha=1.702, shift=1.0)),
    ],
)
def test_activations(write_checkpoint: Write, model: dict[str, Any], activation: Activation) -> None:
    assert checkpoint(write_checkpoint, model).experts_format(P).activation == activation


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"swiglu_limit": "7"}, "swiglu_limit: expected a positive number, found '7'"),
        ({"swiglu_limit": -1}, "swiglu_limit: expected a positive number, found -1"),
        ({"swiglu_limit": 7, "hidden_act": "gelu"}, "swiglu_limit or swiglu_alpha with hidden_act 'gelu'"),
    ],
)
def test_activations_that_are_none(write_checkpoint: Write, model: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        checkpoint(write_checkpoint, model).experts_format(P)


def test_ranges_read_only_their_rows(write_checkpoint: Write) -> None:
    names = {"F32": torch.randn(4, 3), "F8": torch.randn(4, 3).to(torch.float8_e4m3fn), "U8": torch.ones(4, 0).byte()}
    index = TensorIndex.open(write_checkpoint(names))
    for name, t in names.items():
        found = index.read_all([name], (1, 2))[name]
        assert found.dtype == t.dtype and torch.equal(found.float(), t[1:3].float())
