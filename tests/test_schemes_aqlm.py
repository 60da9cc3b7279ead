"""AQLM: any count, width and group against the definition written out, shards, and each mistake of a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensor_changes import Tensors, cut, drop, last, put
from torch import Tensor

import qhal
from qhal.errors import CheckpointError, ShardError
from qhal_schemes import CheckpointWarning, open_checkpoint

Write = Callable[..., Path]
Q = "model.layers.0.self_attn.o_proj"


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(folder).spec(Q)


def named(parts: Tensors) -> Tensors:
    return {f"{Q}.{leaf}": value for leaf, value in parts.items()}


def aqlm(
    bits: int, books: int, a: int, b: int, rows: int = 3, columns: int = 4
) -> tuple[Tensors, Tensor, dict[str, Any]]:
    """Random tensors, their weight entry by entry, and the configuration."""
    g = torch.Generator().manual_seed(bits * 100 + books)
    codes = torch.randint(0, 1 << bits, (rows, columns, books), generator=g)
    codes.view(-1)[0] = (1 << bits) - 1  # stored as -1
    tables = torch.randn(books, 1 << bits, a, b, generator=g).half()
    scales = (torch.rand(rows, 1, 1, 1, generator=g) + 0.5).half()
    w = torch.zeros(rows * a, columns * b)
    for i in range(rows):
        for j in range(columns):
            total = tables[0, codes[i, j, 0]].float()
            for c in range(1, books):
                total = total + tables[c, codes[i, j, c]].float()
            w[i * a : i * a + a, j * b : j * b + b] = total * scales[i].float().reshape(())
    signed = torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    parts = {"codes": signed.to(torch.int8 if bits <= 8 else torch.int16), "codebooks": tables, "scales": scales}
    config = {"nbits_per_codebook": bits, "num_codebooks": books, "out_group_size": a, "in_group_size": b}
    return parts, w, {"quant_method": "aqlm", **config}


@pytest.mark.parametrize(
    ("bits", "books", "a", "b"),
    [
        (1, 1, 1, 8),
        (6, 2, 1, 8),
        (8, 4, 1, 16),
        (8, 8, 1, 32),
        (12, 1, 2, 8),
        (15, 1, 1, 8),
        (16, 1, 4, 2),
        (3, 3, 2, 4),
    ],
)
def test_aqlm_of_any_count_width_and_group(write_checkpoint: Write, bits: int, books: int, a: int, b: int) -> None:
    parts, w, config = aqlm(bits, books, a, b)
    ckpt = open_checkpoint(write_checkpoint(named(parts), config))
    assert torch.equal(ckpt.stored(Q), w)
    assert ckpt.spec(Q).format == ckpt.format(Q)
    halves = [ckpt.linear_spec(Q, shard=(1, rank, 2)).stored() for rank in (0, 1)]
    assert torch.equal(torch.cat(halves, 1), w)
    thirds = [ckpt.linear_spec(Q, shard=(0, rank, 3)).stored() for rank in range(3)]
    assert torch.equal(torch.cat(thirds), w)


def test_aqlm_bias_and_codes_without_their_sign(write_checkpoint: Write) -> None:
    parts, w, config = aqlm(6, 1, 1, 8)
    parts["codes"] = parts["codes"] & 63  # an early writer: 0..63 in int8
    parts["bias"] = torch.tensor([1.0, -2.0, 0.5]).half()
    spec = open_checkpoint(write_checkpoint(named(parts), config)).spec(Q)
    assert torch.equal(spec.stored(), w) and spec.bias is not None and spec.bias.tolist() == [1.0, -2.0, 0.5]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop("codes"), r"o_proj.codes is missing, expected I8 \[\*, \*, 2\]; .*o_proj has codebooks, scales"),
        (drop("codebooks"), r"codebooks is missing"),
        (drop("scales"), r"scales is missing"),
        (cut("codebooks", 1), r"codebooks: expected .*\[2, 64, 1, 8\], found F16 \[2, 63, 1, 8\]"),
        (cut("codebooks", 0), r"codebooks: expected .*\[2, 64, 1, 8\]"),
        (cut("codes", 2), r"codes: expected I8 \[\*, \*, 2\], found I8 \[3, 4, 1\]"),
        (cut("scales", 0), r"codes: expected I8 \[2, \*, 2\], a row for each of the scales, found I8 \[3, 4, 2\]$"),
        (
            put("scales", torch.ones(4, 1, 1, 1).half()),
            r"first two axes are swapped, as aqlm leaves them after a forward",
        ),
        (put("codes", torch.zeros(3, 4, 2, dtype=torch.int16)), r"expected I8 .*found I16"),
        (last("codes", 64), r"codes: expected indices -32..63 of a codebook, found .*64"),
        (last("codes", -33), r"codes: expected indices -32..63 of a codebook, found -33"),
        (last("scales", math.nan), r"scales: expected finite scales"),
        (last("scales", 0), r"scales: expected finite scales that are not zero"),
        (last("codebooks", math.inf), r"codebooks: expected finite values"),
        (put("bias", torch.zeros(4).half()), r"bias: expected .*\[3\], found F16 \[4\]"),
        (put("zeros", torch.zeros(4).half()), r"zeros is extra: aqlm has codes, codebooks, scales"),
    ],
)
def test_mistakes_of_aqlm_files(write_checkpoint: Write, change: Callable[[Tensors], None], match: str) -> None:
    parts, _, config = aqlm(6, 2, 1, 8)
    change(parts)
    refused(write_checkpoint(named(parts), config), match)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("nbits_per_codebook", 17, r"nbits_per_codebook: expected one of 1, .*16, found 17"),
        ("nbits_per_codebook", 7, r"codebooks: expected .*\[2, 128, 1, 8\], found F16 \[2, 64, 1, 8\]"),
        ("num_codebooks", 0, r"num_codebooks: expected a positive integer"),
        ("num_codebooks", 3, r"codes: expected I8 \[\*, \*, 3\]"),
        ("in_group_size", 4, r"codebooks: expected .*\[2, 64, 1, 4\]"),
        ("out_group_size", 2, r"codebooks: expected .*\[2, 64, 2, 8\]"),
        ("linear_weights_not_to_quantize", [f"{Q}.weight"], r"is excluded by linear_weights_not_to_quantize .*o_proj"),
        ("linear_weights_not_to_quantize", "lm_head", r"expected a list of names"),
    ],
)
def test_mistakes_of_aqlm_configurations(write_checkpoint: Write, key: str, value: object, match: str) -> None:
    parts, _, config = aqlm(6, 2, 1, 8)
    refused(write_checkpoint(named(parts), config | {key: value}), match)


def test_aqlm_plain_modules_need_a_rule(write_checkpoint: Write) -> None:
    parts, _, config = aqlm(6, 2, 1, 8)
    plain = {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 8).half(), "lm_head.weight": torch.ones(4, 8).half()}
    refused(write_checkpoint(named(parts) | plain, config, name="a"), r"up_proj: .* no rule excludes it")
    listed = config | {"linear_weights_not_to_quantize": ["model.layers.0.mlp.up_proj.weight"]}
    ckpt = open_checkpoint(write_checkpoint(named(parts) | plain, listed, name="b"))
    assert ckpt.excluded["model.layers.0.mlp.up_proj"].startswith("linear_weights_not_to_quantize")
    with pytest.warns(CheckpointWarning, match="beam_size: no key of AQLM"):
        open_checkpoint(write_checkpoint(named(parts), config | {"beam_size": 1}, name="c"))


def test_aqlm_columns_agree_with_the_neighbours(write_checkpoint: Write) -> None:
    """Nothing in a module repeats K: codes that were cut show beside what shares the input or comes before."""
    parts, _, config = aqlm(6, 2, 1, 8)
    other = parts | {"codes": parts["codes"][:, :3].contiguous()}
    mlp = "model.layers.0.mlp"
    tensors = {f"{mlp}.gate_proj.{p}": v for p, v in parts.items()} | {
        f"{mlp}.up_proj.{p}": v for p, v in other.items()
    }
    with pytest.raises(CheckpointError, match=r"K of .*up_proj is 24 and K of .*gate_proj is 32: expected one size"):
        open_checkpoint(write_checkpoint(tensors, config))


def test_experts_of_codebooks_load_one_by_one(write_checkpoint: Write) -> None:
    parts, w, config = aqlm(6, 2, 1, 8, rows=32)
    stem = "model.layers.0.mlp.experts"
    names = [f"{stem}.{e}.{p}_proj" for e in (0, 1) for p in ("gate", "up", "down")]
    ckpt = open_checkpoint(write_checkpoint({f"{n}.{p}": v for n in names for p, v in parts.items()}, config))
    with pytest.raises(ShardError, match="codebook weights cannot be fused"):
        ckpt.load_experts(stem, qhal.select("cpu_reference"))
    layer = ckpt.load_linear(names[0], qhal.select("cpu_reference"), dtype=torch.float32)
    x = torch.eye(32)
    assert torch.equal(layer(x), w.T)
