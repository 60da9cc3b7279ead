"""Encoding goes over a tensor in parts and rounds small floats by an addition: the bits are those of the plain way."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal import Format, encoding, parts
from qhal.elements import element, values
from qhal.encoding import encode
from qhal.rounding import to_codes

FORMATS = [
    "int8.row*bf16@qmax=127.5", "e4m3fn.row*bf16@arith=bf16", "e4m3fn.tensor*fp32", "int8.col*fp32", "int8.head*fp32",
    "e4m3fn.8x16*fp32", "int4.g16*bf16", "int4-int4.g32*bf16@domain=minmax", "uint4.g8*fp16+fp16@domain=minmax",
    "e2m1.g16*(e4m3fn.tensor/fp32)", "e2m1.g32*e8m0@e8m0=up1.75", "nf4.flat24*fp32", "int8.row/fp32", "int2.g24*fp16",
    "int8.row*fp32@clip=range", "int4.g16*bf16@empty=zero,domain=signed", "e4m3fn.row*fp32@special=saturate",
]  # fmt: skip
SPECIAL = st.sampled_from([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, 3e38])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.integers(1, 40), min_size=2, max_size=4),
    st.integers(1, 600),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 40), SPECIAL), max_size=3),
    st.booleans(),
    st.integers(0, 1000),
)
def test_parts_change_no_bit(
    name: str,
    shape: list[int],
    part: int,
    dtype: torch.dtype,
    patches: list[tuple[int, int, float]],
    transposed: bool,
    seed: int,
) -> None:
    x = torch.randn([min(n, 4) for n in shape[:-2]] + shape[-2:], generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )
    for start, count, value in patches:
        x.view(-1)[start % x.numel() :][:count] = value
    x = x.transpose(-1, -2) if transposed else x
    before, f = x.clone(), Format.parse(name)
    with mock.patch.object(parts, "PART", 1 << 40):
        whole = encode(x, f, clip=(0.75, 0.5) if "clip" in name else (1.0, 1.0))
    with mock.patch.object(parts, "PART", part):
        cut = encode(x, f, clip=(0.75, 0.5) if "clip" in name else (1.0, 1.0))
    assert cut.equal(whole)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("cols", [1, 2, 8, 16, 31, 32, 48])
def test_the_range_of_short_and_long_blocks_is_what_a_maximum_says(cols: int) -> None:
    x = torch.randn(7, 5 * cols, generator=torch.Generator().manual_seed(cols))
    x[0, 0], x[1, -1], x[2, cols], x[3] = float("nan"), float("inf"), -float("inf"), -0.0
    lo, hi = encoding._range(x, Format.parse(f"int8.g{cols}*fp32"), (1.0, 1.0), {})
    blocks = x.reshape(7, 5, cols).double().numpy()
    assert torch.equal(lo.nan_to_num(7), torch.from_numpy(blocks.min(-1).clip(max=0)).float().nan_to_num(7))
    assert torch.equal(hi.nan_to_num(7), torch.from_numpy(blocks.max(-1).clip(min=0)).float().nan_to_num(7))
    assert not bool((torch.signbit(lo) & (lo == 0)).any() | torch.signbit(hi).any())


def test_the_scale_of_an_empty_block_is_a_positive_zero() -> None:
    x = torch.tensor([[0.0, -0.0], [-0.0, -0.0], [0.0, 0.0]]).repeat(1, 32)
    for name in ("int8.row*fp32@empty=zero", "int8.g16*fp16@empty=zero"):
        assert not torch.signbit(encode(x, Format.parse(name)).planes()["scale"]).any()


# ---------------------------------------------------------------- small floats


def counted(q: torch.Tensor, name: str) -> torch.Tensor:
    """Codes from their definition: how many midpoints lie below the magnitude, a tie going to the even code."""
    e, table = element(name), values(name)
    assert table is not None
    grid = table[: 1 << (e.bits - 1)].double()
    middle, magnitude = (grid[1:] + grid[:-1]) / 2, q.double().abs()
    code = torch.bucketize(magnitude, middle)  # a tie stays below
    tie = (magnitude == middle[code.clamp(max=middle.numel() - 1)]) & (code % 2 == 1)
    code = (code + tie.long()) | (torch.signbit(q).long() << (e.bits - 1))
    return torch.where(torch.isnan(q), 0, code).to(torch.uint8)


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2"])
def test_small_floats_round_as_their_definition_says(name: str) -> None:
    table = values(name)
    assert table is not None
    grid = table[: table.numel() // 2]
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2]).view(torch.int32)  # every value and every tie,
    near = torch.cat([(points + d).clamp(min=0) for d in range(-16, 17)]).view(torch.float32)  # and what is next to it
    top = torch.arange(1 << 16, dtype=torch.int32) << 16  # every bf16, with the bits below at both ends and the middle
    every = torch.cat([top | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)
    for q in (near, -near, every):
        assert torch.equal(to_codes(q, element(name)), counted(q, name))
