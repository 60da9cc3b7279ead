"""QuIP#: every codebook against the definition written out, fused and rescaled layers, and each mistake of a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_changes import Tensors, cut, drop, last, put
from torch import Tensor

from qhal import lattices, rotations
from qhal.errors import CheckpointError
from qhal_schemes import CheckpointWarning, open_checkpoint
from qhal_schemes.convert import convert_checkpoint
from qhal_schemes.quip import unpack_e8p

Write = Callable[..., Path]
Q = "model.layers.0.self_attn.o_proj"


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(folder).spec(Q)


def named(parts: Tensors) -> Tensors:
    return {f"{Q}.{leaf}": value for leaf, value in parts.items()}


def e8p_words(codes: Tensor) -> Tensor:
    """int64 [N, K/32] of e8p12 codes [N, K/8], from the description of the layout, bit by bit."""
    n, columns = codes.shape
    grid = torch.zeros(n // 2, columns // 2, dtype=torch.int64)
    for i in range(4):
        code = codes[i % 2 :: 2, i // 2 :: 2].long()
        grid |= (code >> 8) << (8 * i)
        for j in range(8):
            grid |= ((code >> j) & 1) << (32 + 4 * j + i)
    return grid.reshape(n // 16, 8, columns // 8, 4).transpose(1, 2).reshape(n, columns // 4)


def byte_words(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8).contiguous().view(torch.int64)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1000))
def test_e8p_words_are_a_bijection(tiles: int, columns: int, seed: int) -> None:
    n, k = tiles * 16, columns * 64
    codes = torch.randint(0, 1 << 16, (n, k // 8), generator=torch.Generator().manual_seed(seed)).int()
    assert torch.equal(unpack_e8p([e8p_words(codes)], n, k)[..., 0], codes)


def quip(name: str = "E8P12", n: int = 32, k: int = 64, **params: Any) -> tuple[Tensors, Tensor, dict[str, Any]]:
    """Random codes, the lattice weight, and config.json."""
    g = torch.Generator().manual_seed(len(name))
    a = torch.randint(0, 1 << 16, (n, k // 8), generator=g)
    e8p, e81b = (lattices.load(t).reshape(-1, 8) for t in ("e8p12", "e81b"))
    w, stored = e8p[a], e8p_words(a)
    over = params.get("resid_scale_override", -1)
    if name == "E8P12RVQ4B":
        b = torch.randint(0, 1 << 16, (n, k // 8), generator=g)
        w, stored = w + e8p[b] / (over if over > 0 else 3.45), torch.cat([stored, e8p_words(b)], 1)
    if name == "E8P12RVQ3B":
        b = torch.randint(0, 256, (n, k // 8), generator=g)
        w, stored = w + e81b[b] / (over if over > 0 else 2.04), torch.cat([stored, byte_words(b)], 1)
    signs = torch.randint(0, 2, (k,), generator=g) * 2.0 - 1
    t = {
        "Qidxs": stored, "SU": signs.half(), "SV": (torch.rand(n, generator=g) + 0.1).half(),
        "Wscale": torch.tensor(1.0),
        "codebook_id": torch.tensor({"E8P12": 7, "E8P12RVQ4B": 17, "E8P12RVQ3B": 18}[name]),
    }  # fmt: skip
    packsz = {"E8P12": 4, "E8P12RVQ4B": 2, "E8P12RVQ3B": 64 / 24}[name]
    section = {"codebook": name, "codebook_version": 1, "codesz": 8, "idx_dtype": "torch.int64", "packsz": packsz}
    section |= {"lora_rank": 0, "rescale_WH": False, "resid_scale_override": -1, "fused": False, "pack_out": False}
    return t, w.reshape(n, k), {"quip_params": section | params}


def folded(w: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """diag(after) H W H^T diag(before), float64."""
    n, k = w.shape
    left, right = (rotations.hadamard_for(s, "quip").matrix(s) for s in (n, k))  # x @ matrix is H x: it is H^T
    return after.double()[:, None] * (left.T @ w.double() @ right) * before.double()


def one_rounding(a: Tensor, b: Tensor) -> bool:
    """Equal up to the last bit of float32: both are float64 sums, rounded once."""
    return torch.allclose(a, b, rtol=2.0**-23, atol=1e-12)


@pytest.mark.parametrize("name", ["E8P12", "E8P12RVQ4B", "E8P12RVQ3B"])
@pytest.mark.parametrize("over", [-1, 2.5])
def test_every_codebook_of_quip(write_checkpoint: Write, name: str, over: float) -> None:
    parts, w, model = quip(name, resid_scale_override=over)
    ckpt = open_checkpoint(write_checkpoint(named(parts), model=model))
    spec = ckpt.spec(Q)
    assert ckpt.method == "quip" and torch.equal(spec.stored(), w) and spec.format == ckpt.format(Q)
    assert ckpt.form(Q).layout == name and ckpt.compared(Q) == (name != "E8P12RVQ3B")
    wanted = folded(w, parts["SU"], parts["SV"])
    assert one_rounding(spec.effective(), wanted.float())


def test_quip_scales_of_inputs_and_fused_parts(write_checkpoint: Write) -> None:
    parts, w, model = quip(rescale_WH=True, fused=True)
    parts |= {"scaleWH": torch.rand(64) + 0.5, "fuse_scales": torch.tensor([0.5, 2.0])}
    ckpt = open_checkpoint(write_checkpoint(named(parts), model=model))
    assert ckpt.form(Q).layout == "E8P12, scaleWH, fuse_scales" and not ckpt.compared(Q)
    spec = ckpt.spec(Q)
    after = parts["SV"].float() * torch.tensor([0.5] * 16 + [2.0] * 16)
    wanted = folded(w, parts["SU"].float() / parts["scaleWH"], after).float()
    assert one_rounding(spec.effective(), wanted)
    three = parts | {"fuse_scales": torch.tensor([0.5, 2.0, 4.0])}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 16}
    spec = open_checkpoint(write_checkpoint(named(three), model=model | heads, name="three")).spec(Q)
    assert torch.equal(
        spec.rotate_out[1].values, parts["SV"].float() * torch.tensor([0.5] * 16 + [2.0] * 8 + [4.0] * 8)
    )
    refused(
        write_checkpoint(named(three), model=model, name="unknown"), r"fuse_scales: expected a scale for each of the"
    )


def test_quip_sizes_without_a_table_are_refused_by_name(write_checkpoint: Write) -> None:
    for k, order in ((116 * 64, 116), (124 * 64, 124), (172 * 64, 172)):
        parts, _, model = quip(n=16, k=k)
        refused(
            write_checkpoint(named(parts), model=model, name=f"o{order}"), rf"unsupported: .*o_proj: .*order {order}"
        )
    parts, _, model = quip(n=16 * 11)
    refused(write_checkpoint(named(parts), model=model, name="none"), r"unsupported: .*no Hadamard transform of 176")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop("Qidxs"), r"Qidxs is missing"),
        (drop("SU"), r"SU is missing"),
        (drop("codebook_id"), r"codebook_id is missing"),
        (cut("Qidxs", 1), r"Qidxs: expected I64 \[32, 2\], found I64 \[32, 1\]"),
        (cut("SV", 0), r"N in 16s and K in 64s"),
        (put("Wscale", torch.tensor(0.5)), r"Wscale: expected 1, as the scale is folded into SV, found 0.5"),
        (put("codebook_id", torch.tensor(17)), r"codebook_id: expected 7, of the codebook in quip_params, found 17"),
        (last("SU", 0.0), r"SU: expected finite scales that are not zero"),
        (last("SV", math.nan), r"SV: expected finite scales"),
        (put("scaleWH", torch.ones(64)), r"scaleWH is extra"),
        (put("A", torch.ones(32, 4).half()), r"o_proj.A is extra"),
    ],
)
def test_mistakes_of_quip_files(write_checkpoint: Write, change: Callable[[Tensors], None], match: str) -> None:
    parts, _, model = quip()
    change(parts)
    refused(write_checkpoint(named(parts), model=model), match)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("codebook", "D4", r"codebook: expected one of E8P12, E8P12RVQ4B, E8P12RVQ3B, found 'D4'"),
        ("codebook", "E8P12RVQ4B", r"packsz: expected 2"),
        ("packsz", "4", r"packsz: expected 4"),
        ("codebook_version", 0, r"unsupported: .*codebook_version: expected 1, found 0"),
        ("lora_rank", 16, r"unsupported: .*lora_rank: expected 0, found 16"),
        ("outlier_channel_split", True, r"unsupported: .*outlier_channel_split"),
        ("pack_out", True, r"unsupported: .*pack_out"),
        ("idx_dtype", "torch.uint8", r"unsupported: .*idx_dtype"),
        ("resid_scale_override", "x", r"resid_scale_override: expected a number"),
        ("rescale_WH", True, r"scaleWH is missing"),
        ("rescale_WH", 1, r"rescale_WH: expected true or false"),
    ],
)
def test_mistakes_of_quip_configurations(write_checkpoint: Write, key: str, value: object, match: str) -> None:
    parts, _, model = quip()
    refused(write_checkpoint(named(parts), model={"quip_params": model["quip_params"] | {key: value}}), match)


def test_quip_params_that_are_no_object(write_checkpoint: Write) -> None:
    parts, _, model = quip()
    refused(write_checkpoint(named(parts), model={"quip_params": [1]}, name="a"), r"quip_params: expected an object")
    with pytest.warns(CheckpointWarning, match="quip_params.new_key: no key of QuIP#"):
        changed = {"quip_params": model["quip_params"] | {"new_key": 1}}
        open_checkpoint(write_checkpoint(named(parts), model=changed, name="b"))


def test_quip_params_go_with_the_codes(write_checkpoint: Write, tmp_path: Path) -> None:
    parts, _, model = quip()
    folder = write_checkpoint(named(parts), model=model)
    convert_checkpoint(folder, tmp_path / "bf16", "bf16", lossy=True)
    ckpt = open_checkpoint(tmp_path / "bf16")
    assert ckpt.method == "" and torch.equal(
        ckpt.dequantize(Q), open_checkpoint(folder).dequantize(Q).bfloat16().float()
    )
