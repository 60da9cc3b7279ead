"""bitsandbytes: 4-bit states written out, LLM.int8 and its fixtures, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qhal
from qhal.elements import values
from qhal.errors import CheckpointError, ShardError
from qhal_schemes import CheckpointWarning, open_checkpoint
from qhal_schemes.packing import pack_nibbles

Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"
W = f"{Q}.weight"
FP4 = torch.tensor(
    [0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25, 0, -0.0052, -0.6667, -1, -0.3333, -0.5, -0.1667, -0.25]
)


def four(
    kind: str = "nf4", double: bool = False, n: int = 6, k: int = 32, **state: Any
) -> tuple[Tensors, torch.Tensor]:
    """One module, blocks of 64 that straddle its rows of 32, and its weight by the arithmetic of the tool."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n * k,), generator=g)
    table = FP4 if kind == "fp4" else values("nf4")
    assert table is not None
    said = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]} | state
    blocks = -(-n * k // 64)
    t: Tensors = {W: pack_nibbles(codes[torch.arange(n * k) ^ 1].to(torch.uint8))[:, None], f"{W}.quant_map": table}
    if double:
        inner = torch.linspace(-1, 1, 256)
        t[f"{W}.absmax"] = torch.randint(0, 256, (blocks,), generator=g).to(torch.uint8)
        t |= {f"{W}.nested_absmax": torch.rand(-(-blocks // 2), generator=g) + 0.1, f"{W}.nested_quant_map": inner}
        said |= {"nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": 1.5} | state
        absmax = inner[t[f"{W}.absmax"].long()] * t[f"{W}.nested_absmax"].repeat_interleave(2)[:blocks] + 1.5
    else:
        absmax = t[f"{W}.absmax"] = torch.rand(blocks, generator=g) + 0.1
    text = json.dumps(said).encode()
    t[f"{W}.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return t, (table[codes] * absmax.repeat_interleave(64)[: n * k]).reshape(n, k)


def config(kind: str = "nf4", double: bool = False, **more: Any) -> dict[str, Any]:
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    return section | {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double} | more


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_four_bits(write_checkpoint: Write, kind: str, double: bool) -> None:
    t, w = four(kind, double)
    t[f"{Q}.bias"] = torch.ones(6).bfloat16()
    ckpt = open_checkpoint(write_checkpoint(t, config(kind, double)))
    assert torch.equal(ckpt.stored(Q), w)
    assert set(ckpt.account.consumed) == set(t)
    ops = qhal.select("cpu_reference")
    assert qhal.resolve(ckpt, ops, policy="exact")
    x = torch.ones(2, 32)
    y = ckpt.load_linear(Q, ops, dtype=torch.float32)(x)
    assert torch.allclose(y, (x.double() @ w.double().T + 1).float(), rtol=1e-5)


def test_cuts_follow_the_blocks_of_the_flattened_matrix(write_checkpoint: Write) -> None:
    t, w = four(n=8)
    ckpt = open_checkpoint(write_checkpoint(t, config()))
    for rank in range(4):  # two rows are one block
        assert torch.equal(ckpt.linear_spec(Q, shard=(0, rank, 4)).stored(), w.chunk(4)[rank])
    with pytest.raises(ShardError, match="flat64"):
        ckpt.linear_spec(Q, shard=(0, 0, 8))
    with pytest.raises(ShardError, match="flat64"):
        ckpt.linear_spec(Q, shard=(1, 0, 2))


def int8(threshold: float = 0.0) -> tuple[Tensors, dict[str, Any]]:
    codes = torch.randint(-127, 128, (8, 16), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    tensors = {W: codes, f"{Q}.SCB": torch.rand(8) + 0.1, f"{Q}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": threshold}
    return tensors, section


def test_int8_without_a_threshold_quantizes_its_input(write_checkpoint: Write) -> None:
    tensors, section = int8()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ckpt = open_checkpoint(write_checkpoint(tensors, section))
    assert str(ckpt.format(Q).input) == "int8.row*fp32"
    assert torch.equal(ckpt.stored(Q), tensors[W].float() * (tensors[f"{Q}.SCB"] / 127)[:, None])


def test_int8_with_a_threshold_says_what_is_left_out(write_checkpoint: Write) -> None:
    tensors, section = int8(6.0)
    with pytest.warns(CheckpointWarning, match="llm_int8_threshold 6.0: .*inputs stay unquantized here"):
        ckpt = open_checkpoint(write_checkpoint(tensors, section))
    assert ckpt.format(Q).input is None


@pytest.mark.filterwarnings("ignore::qhal_schemes.CheckpointWarning")
def test_golden_int8(golden: Path) -> None:
    """The codes and SCB give the tool's weight to the bit in its own order, and its output where columns are split."""
    folder = golden / "bitsandbytes" / "int8_llm_int8"
    if not folder.is_dir():
        pytest.skip(f"not among the golden checkpoints in {golden} (set QHAL_GOLDEN)")
    ckpt, expected = open_checkpoint(folder / "checkpoint"), load_file(folder / "expected.safetensors")
    for module in (key.removesuffix(".output") for key in expected if key.endswith(".output")):
        weight = ckpt.spec(module).weight
        assert isinstance(weight, qhal.QTensor) and isinstance(weight.scale, qhal.QTensor)
        codes, scb = weight.codes.float(), weight.scale.codes[:, 0]
        assert torch.equal(codes * scb[:, None] * 7.874015718698502e-3, expected[f"{module}.weight"])
        x = expected[f"{module}.input"].half().float()
        outlier = x.abs() >= 6.0
        split, rest = outlier.any(0), torch.where(outlier, 0.0, x)
        row = rest.abs().amax(-1, keepdim=True)
        q = torch.where(split, 0.0, (rest * (127 / row)).round())
        y = (q @ codes.T) * (row * scb / 127**2) + x[:, split] @ ckpt.stored(module)[:, split].T
        error, size = (y - expected[f"{module}.output"]).abs(), x.abs() @ ckpt.stored(module).abs().T
        assert bool((error <= 3 * 2.0**-11 * size).all())  # the tool rounds both products and their sum to float16


@pytest.mark.parametrize(
    ("section", "match"),
    [
        (config(load_in_8bit=True), "load_in_4bit: expected either load_in_4bit or load_in_8bit"),
        (config(load_in_4bit=None), "load_in_4bit: expected either"),
        (config(load_in_4bit="yes"), "load_in_4bit: expected true or false"),
        (config("int4"), "bnb_4bit_quant_type: expected nf4 or fp4, found 'int4'"),
        (config("fp4"), "bitsandbytes__nf4: expected a state of fp4, as bnb_4bit_quant_type says, found nf4"),
        (config(double=True), r"absmax: expected U8 \[3\], found F32 \[3\]"),
        (config(bnb_4bit_quant_storage="bfloat16"), "unsupported: .*bnb_4bit_quant_storage 'bfloat16'"),
        (config(llm_int8_skip_modules=[Q]), "q_proj is excluded by llm_int8_skip_modules"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "no module has a SCB"),
        (int8(-1.0)[1], "llm_int8_threshold: expected a number that is not negative, found -1.0"),
        (int8()[1] | {"llm_int8_has_fp16_weight": True}, "unsupported: .*llm_int8_has_fp16_weight"),
    ],
)
@pytest.mark.filterwarnings("ignore::qhal_schemes.CheckpointWarning")
def test_configurations_that_do_not_fit(write_checkpoint: Write, section: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(write_checkpoint(four()[0], section))


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"shape": [6]}, r"shape: \[rows, columns\]"),
        ({"shape": [6, 0]}, r"shape: \[rows, columns\]"),
        ({"shape": [6, 64]}, r"weight: expected U8 \[192, 1\]"),
        ({"blocksize": "64"}, "blocksize: a positive integer, found 64"),
        ({"blocksize": 32}, r"absmax: expected U8 \[6\]"),
        ({"quant_type": "fp4"}, "quant_type nf4, found fp4"),
        ({"nested_blocksize": None}, "nested_blocksize: a positive integer"),
        ({"nested_offset": "0"}, "nested_offset: a number"),
        ({"nested_offset": None}, "nested_offset: a number"),
    ],
)
def test_states_that_do_not_fit(write_checkpoint: Write, state: dict[str, Any], match: str) -> None:
    t, _ = four(double=True, **{"nested_blocksize": 2} | state)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(write_checkpoint(t, config(double=True)))


def test_states_that_are_no_objects(write_checkpoint: Write) -> None:
    for i, text in enumerate((b"[1]", b"{", b"x" * 5000)):
        t = four()[0] | {f"{W}.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)}
        with pytest.raises(CheckpointError, match="a JSON object"):
            open_checkpoint(write_checkpoint(t, config(), name=str(i)))


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("quant_map", torch.linspace(-1, 1, 16), "the table of NF4"),
        ("nested_quant_map", torch.zeros(256), "increasing numbers"),
        ("nested_absmax", torch.tensor([0.0, 1.0]), "0 for blocks of zeros only"),
        ("nested_absmax", torch.tensor([float("nan"), 1.0]), "finite scales"),
    ],
)
def test_values_that_cannot_be(write_checkpoint: Write, part: str, value: torch.Tensor, match: str) -> None:
    t = four(double=True)[0] | {f"{W}.{part}": value}
    ckpt = open_checkpoint(write_checkpoint(t, config(double=True)))
    with pytest.raises(CheckpointError, match=match):
        ckpt.spec(Q)


def test_a_layout_of_tiles_is_refused(write_checkpoint: Write) -> None:
    tensors, section = int8()
    tensors[f"{Q}.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="weight_format: expected 0, rows, found 2"):
        open_checkpoint(write_checkpoint(tensors, section)).spec(Q)
