"""gpt-oss MXFP4: stacked experts through every door, and what contradicts the layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from qhal.errors import CheckpointError
from qhal_cli.app import app
from qhal_schemes import Checkpoint, open_checkpoint

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
SMALL = Path(__file__).parent / "golden" / "mxfp4_gptoss" / "gptoss_h128_e4" / "checkpoint"
E, H, N = 2, 64, 32
P = "model.layers.0.mlp.experts"
SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.layers.*.self_attn"]}


def tensors() -> Tensors:
    g = torch.Generator().manual_seed(0)
    found: Tensors = {"lm_head.weight": torch.ones(4, H), "model.layers.0.self_attn.q_proj.weight": torch.ones(8, H)}
    for name, (n, k) in {"gate_up_proj": (2 * N, H), "down_proj": (H, N)}.items():
        found[f"{P}.{name}_blocks"] = torch.randint(0, 256, (E, n, k // 32, 16), generator=g).to(torch.uint8)
        found[f"{P}.{name}_scales"] = torch.randint(100, 130, (E, n, k // 32), generator=g).to(torch.uint8)
        found[f"{P}.{name}_bias"] = torch.randn(E, n, generator=g).bfloat16()
    return found


def opened(write: Write, found: Tensors, section: dict[str, Any] | None = None, **model: Any) -> Checkpoint:
    options = {"model_type": "gpt_oss", "swiglu_limit": 7.0} | model
    return open_checkpoint(write(found, SECTION | (section or {}), model=options))


def test_bytes_are_even_columns_first(write_checkpoint: Write) -> None:
    t = tensors()
    ckpt = opened(write_checkpoint, t)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    raw = t[f"{P}.down_proj_blocks"].long()
    wanted = torch.stack([values[raw & 15], values[raw >> 4]], -1).flatten(-2)
    wanted = wanted * torch.exp2(t[f"{P}.down_proj_scales"].float() - 127).unsqueeze(-1)
    assert torch.equal(ckpt.stored(f"{P}.down_proj"), wanted.flatten(-2))
    assert dict(ckpt.excluded) == {
        "lm_head": "modules_to_not_convert 'lm_head'",
        "model.layers.0.self_attn.q_proj": "modules_to_not_convert 'model.layers.*.self_attn'",
    }


@pytest.mark.parametrize("stored", [(), ("--stored",)])
def test_the_command_line_writes_one_module_for_every_expert(tmp_path: Path, stored: tuple[str, ...]) -> None:
    out = tmp_path / "w.safetensors"
    done = CliRunner().invoke(app, ["dequantize", str(SMALL), "--out", str(out), "--json", *stored])
    assert done.exit_code == 0, done.output
    ckpt, written = open_checkpoint(SMALL), load_file(out)
    spec = ckpt.experts_spec(P)
    for e in range(4):
        gate, up = (written[f"{P}.{e}.{name}_proj.weight"] for name in ("gate", "up"))
        assert torch.equal(torch.cat([gate, up]), spec.gate_up.stored()[e])
        assert torch.equal(gate, ckpt.stored(f"{P}.gate_up_proj")[e, 0::2])
        assert torch.equal(written[f"{P}.{e}.down_proj.weight"], spec.down.stored()[e])
        assert spec.down.bias is not None
        assert torch.equal(written[f"{P}.{e}.down_proj.bias"], spec.down.bias[e])
    assert torch.equal(written["lm_head.weight"], ckpt.tensor("lm_head.weight").float())


def test_the_command_line_shows_experts() -> None:
    done = CliRunner().invoke(app, ["inspect", str(SMALL)])
    assert done.exit_code == 0 and f"experts: 4 in {P}" in done.output.replace("\n", "")
    assert "e2m1.g32*e8m0" in done.output


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("down_proj_scales", None, "down_proj_scales is missing, expected U8"),
        ("gate_up_proj_blocks", None, "gate_up_proj_blocks is missing"),
        ("gate_up_proj_bias", None, "gate_up_proj_bias is missing"),
        ("down_proj_blocks", torch.zeros(3, H, 1, 16).byte(), r"down_proj_blocks: expected U8 \[2, \*, \*, 16\]"),
        ("down_proj_blocks", torch.zeros(E, H, 1, 8).byte(), r"down_proj_blocks: expected U8 \[2, \*, \*, 16\]"),
        ("down_proj_scales", torch.full((E, H, 1), 255).byte(), r"exponents below 255 \(NaN\), found 128 of 128"),
        ("down_proj_scales", torch.ones(E, H, 1), "down_proj_scales: expected U8|F8_E8M0"),
        ("down_proj_bias", torch.full((E, H), float("nan")), "down_proj_bias: expected finite values"),
        ("up_proj_blocks", torch.zeros(E, H, 1, 16).byte(), r"up_proj_blocks \(U8 .*\) is extra"),
        ("down_proj_bias.old", torch.zeros(E, H), "down_proj_bias.old is extra"),
    ],
)
def test_tensors(write_checkpoint: Write, name: str, value: torch.Tensor | None, match: str) -> None:
    found = {n: t for n, t in tensors().items() if value is not None or n != f"{P}.{name}"}
    found |= {f"{P}.{name}": value} if value is not None else {}
    with pytest.raises(CheckpointError, match=match):
        opened(write_checkpoint, found).experts_spec(P)


@pytest.mark.parametrize(
    ("section", "model", "match"),
    [
        ({"modules_to_not_convert": ["model.layers.*.mlp"]}, {}, "experts is excluded by modules_to_not_convert"),
        ({}, {"num_local_experts": 4}, "gate_up_proj_blocks: expected 4 experts, as config.json says, found 2"),
        ({}, {"hidden_act": "relu"}, "unsupported: .*hidden_act 'relu'"),
    ],
)
def test_configurations(write_checkpoint: Write, section: Any, model: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        opened(write_checkpoint, tensors(), section, **model).experts_spec(P)


def test_a_file_without_experts(write_checkpoint: Write) -> None:
    with pytest.raises(CheckpointError, match="quant_method mxfp4, but no module has gate_up_proj_blocks"):
        opened(write_checkpoint, {"lm_head.weight": torch.ones(4, H)})
