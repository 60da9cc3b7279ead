"""kv_b_proj by heads: exactly its rows, or a refusal that says to dequantize."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qhal import CodebookSegment, CodebookTensor, Diagonal, Format, LinearSpec, Operand, QTensor, ShardError
from qhal.encoding import encode
from qhal.mla import absorb
from qhal.tensors import same_bits

H, NOPE, V, R = 3, 8, 4, 64
FORMATS = ("e4m3fn.tensor*fp32", "e4m3fn.row*bf16", "int8.row*fp32", "int8-int8.row*fp32", "int4.g32*bf16",
           "uint4-uint4.g16*fp16@domain=minmax", "e4m3fn.4x32*fp32", "e4m3fn.2x48*fp32", "mxfp4", "nvfp4",
           "int8.col*fp32", "int8.head*fp32", "uint4.g32*fp16+fp16@domain=minmax")  # fmt: skip


def weight(name: str, heads: int = H) -> QTensor:
    x = torch.randn(heads * (NOPE + V), R, generator=torch.Generator().manual_seed(1))
    return encode(x, Format.parse(name))


@pytest.mark.parametrize("name", FORMATS)
def test_stacks_are_the_rows_of_kv_b(name: str) -> None:
    w = weight(name)
    by_head = w.dequantize().reshape(H, NOPE + V, R)
    for given in (w, LinearSpec(w, name="kv_b_proj")):
        stacks = absorb(given, heads=H, nope=NOPE, v=V)
        assert isinstance(stacks.w_uk, QTensor) and isinstance(stacks.w_uv, QTensor)
        assert same_bits(stacks.w_uk.dequantize(), by_head[:, :NOPE].transpose(1, 2).contiguous())
        assert same_bits(stacks.w_uv.dequantize(), by_head[:, NOPE:].contiguous())
        assert stacks.w_uv.format == w.format


def test_plain_weights_and_shards() -> None:
    w = weight("e4m3fn.row*bf16", 4)
    plain = w.dequantize(torch.bfloat16)
    stacks = absorb(plain, heads=4, nope=NOPE, v=V)
    assert stacks.w_uk.shape == (4, R, NOPE) and stacks.w_uv.shape == (4, V, R)
    assert isinstance(stacks.w_uk, torch.Tensor) and stacks.w_uk.dtype == torch.bfloat16
    assert torch.equal(stacks.w_uk[2], plain[2 * 12 : 2 * 12 + NOPE].T)
    half = absorb(LinearSpec(w).shard(0, 1, 2), heads=2, nope=NOPE, v=V)
    assert isinstance(half.w_uk, QTensor)
    assert torch.equal(half.w_uk.dequantize().bfloat16(), stacks.w_uk[2:])


@pytest.mark.parametrize(
    ("w", "more", "words"),
    [
        (weight("e4m3fn.128x128*fp32"), {}, r"cannot be absorbed as it is stored.*block of 128.*dequantize it first"),
        (weight("nf4.flat64*fp32"), {}, "no transpose.*dequantize"),
        (weight("int8.row*fp32", 2), {}, r"\(24, 64\) is not \[3 heads \* \(8 \+ 4\), R\]"),
        (weight("int8.row*fp32"), {"bias": torch.zeros(36)}, "has bias and cannot be absorbed; dequantize"),
        (weight("int8.row*fp32"), {"rotate_in": (Diagonal(torch.ones(R)),)}, "has rotate_in"),
        (weight("int8.row*fp32"), {"low_rank": (torch.ones(1, R), torch.ones(36, 1))}, "has low_rank"),
        (weight("int8.row*fp32"), {"operand": Operand(Format.parse("e4m3fn.row*fp32"))}, "has operand"),
        (weight("int8.row*fp32"), {"input": Operand(Format.parse("int8.row*fp32"))}, "drop_input=True"),
    ],
)  # fmt: skip
def test_refusals(w: QTensor, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ShardError, match=f"attn.kv_b_proj.*{words}"):
        absorb(LinearSpec(w, name="attn.kv_b_proj", **more), heads=H, nope=NOPE, v=V)


def test_a_dropped_input_and_a_codebook() -> None:
    spec = LinearSpec(weight("int8.row*fp32"), input=Operand(Format.parse("int8.row*fp32")))
    kept = absorb(replace(spec, input=None), heads=H, nope=NOPE, v=V)
    assert absorb(spec, heads=H, nope=NOPE, v=V, drop_input=True).w_uk.equal(kept.w_uk)
    codes = torch.zeros(36, 8, 1, dtype=torch.int32)
    book = CodebookTensor((36, 64), (CodebookSegment(codes, (torch.zeros(4, 1, 8),)),))
    with pytest.raises(ShardError, match="codebook weights cannot be absorbed; dequantize"):
        absorb(book, heads=H, nope=NOPE, v=V)
