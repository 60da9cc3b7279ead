"""QTensor: what decodes to what, what is refused at construction, and the planes that make up its bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qhal import Format, FormatError, QTensor, parts
from qhal.encoding import encode
from qhal.tensors import same_bits


def tensor(name: str, **planes: Any) -> QTensor:
    return QTensor(Format.parse(name), **planes)


def test_every_step_of_decoding_rounds_once() -> None:
    codes = torch.tensor([[7, -8, 3, 0]], dtype=torch.int8)
    scale, zero = torch.tensor([[0.1, 0.3]]), torch.tensor([[1.5, -2.25]])
    q = tensor("int4-fp32.g2*fp32", codes=codes, scale=scale, zero=zero)
    assert torch.equal(q.dequantize(), (codes - zero.repeat_interleave(2, 1)) * scale.repeat_interleave(2, 1))
    divided = tensor("int4.g2/fp32", codes=codes, scale=scale)
    assert torch.equal(divided.dequantize(), codes / scale.repeat_interleave(2, 1))
    shifted = tensor("int4.g2*fp32-fp32", codes=codes, scale=scale, offset=zero)
    product = codes * scale.repeat_interleave(2, 1)
    assert torch.equal(shifted.dequantize(), product - zero.repeat_interleave(2, 1))


def test_nested_scales_decode_first() -> None:
    inner = torch.tensor([[1.0, 2.0], [3.0, 448.0]]).to(torch.float8_e4m3fn)
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 2)
    for op, outer in (("*", torch.tensor([[0.3]])), ("/", torch.tensor([[7.0]]))):
        f = Format.parse(f"e2m1.g16*(e4m3fn.tensor{op}fp32)")
        assert f.scale is not None
        q = QTensor(f, codes, QTensor(f.scale, inner, outer))
        scale = inner.float() * outer if op == "*" else inner.float() / outer
        e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        assert torch.equal(q.dequantize(), e2m1.repeat(2, 2) * scale.repeat_interleave(16, 1))
        assert q.planes().keys() == {"codes", "scale.codes", "scale.scale"}
        assert q.nbytes == 64 + 4 + 4


def test_blocks_and_their_grids() -> None:
    codes = torch.ones(3, 5, dtype=torch.int8)
    for block, grid, expected in [
        ("tensor", (1, 1), lambda i, j: 0),
        ("row", (3, 1), lambda i, j: i),
        ("head", (3, 1), lambda i, j: i),
        ("col", (1, 5), lambda i, j: j),
        ("g2", (3, 3), lambda i, j: 3 * i + j // 2),
        ("2x4", (2, 2), lambda i, j: 2 * (i // 2) + j // 4),
        ("flat4", (1, 4), lambda i, j: (5 * i + j) // 4),
    ]:
        count = grid[0] * grid[1]
        q = tensor(f"int8.{block}*fp32", codes=codes, scale=torch.arange(count).float().reshape(grid))
        assert q.dequantize().tolist() == [[float(expected(i, j)) for j in range(5)] for i in range(3)], block


def test_group_index_gives_uneven_groups() -> None:
    index = torch.tensor([2, 0, 0, 1, 2, 2], dtype=torch.int32)
    scale = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    zero = torch.tensor([[1, 2, 3], [1, 1, 1]], dtype=torch.uint8)
    codes = torch.full((2, 6), 5, dtype=torch.uint8)
    q = tensor("uint4-uint4.g2*fp32", codes=codes, scale=scale, zero=zero, group_index=index)
    expected = (5 - zero[:, index.long()].float()) * scale[:, index.long()]
    assert torch.equal(q.dequantize(), expected)
    one_row = tensor("uint4.g2*fp32", codes=codes, scale=scale[:1], group_index=index)
    assert torch.equal(one_row.dequantize(), 5 * scale[:1, index.long()].expand(2, 6))
    one_group = tensor("uint4.g2*fp32", codes=codes, scale=scale[:, :1], group_index=torch.zeros(6, dtype=torch.int32))
    assert torch.equal(one_group.dequantize(), (5 * scale[:, :1]).expand(2, 6))


def test_lookup_tables_ride_along() -> None:
    table = torch.randn(256, generator=torch.Generator().manual_seed(0))
    codes = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    q = tensor("lut8.flat64*fp32", codes=codes, scale=torch.ones(1, 4), table=table)
    assert torch.equal(q.dequantize(), table.reshape(4, 64))
    assert "table" in q.planes()


def test_output_dtype_rounds_once_more() -> None:
    q = encode(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), Format.parse("int4_g32"))
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("int4.g32*bf16", {"codes": torch.zeros(4, 64)}, "codes are torch.float32, must be torch.int8"),
        ("int4.g32*bf16", {"codes": torch.zeros(64, dtype=torch.int8)}, "must be [..., N, K]"),
        ("int4.g32*bf16", {"scale": None}, "needs a scale plane"),
        ("int4.g32*bf16", {"zero": torch.zeros(4, 2)}, "has no a zero plane|has no zero plane"),
        ("int4.g32*bf16", {"scale": torch.zeros(4, 3).bfloat16()}, "has shape (4, 3), a (4, 64) tensor needs (4, 2)"),
        ("int4.g32*bf16", {"scale": torch.zeros(4, 2, dtype=torch.int32)}, "the scale plane is torch.int32"),
        ("int4.g32*bf16", {"group_index": torch.zeros(63, dtype=torch.int32)}, "must be int32 [64]"),
        ("int4.g32*bf16", {"group_index": torch.zeros(64)}, "group_index is torch.float32"),
        ("int8.row*fp32", {"group_index": torch.zeros(64, dtype=torch.int32)}, "a meaning only with g<k> blocks"),
        ("nvfp4", {"scale": torch.zeros(4, 4)}, "the scale plane must be a QTensor (e4m3fn.tensor*fp32)"),
        ("lut4.flat64*fp32", {"table": None}, "needs a table of 16 values"),
        ("lut4.flat64*fp32", {"table": torch.zeros(15)}, "needs a table of 16 values"),
    ],
)
def test_construction_checks_shapes_and_dtypes(name: str, change: dict[str, Any], text: str) -> None:
    f = Format.parse(name)
    if f.element == "lut4":
        codes = torch.zeros(4, 64, dtype=torch.uint8)
        good = QTensor(f, codes, torch.ones(1, 4), table=torch.zeros(16))
    else:
        good = encode(torch.ones(4, 64), f)
    with pytest.raises(FormatError) as caught:
        replace(good, **change)
    assert any(part in str(caught.value) for part in text.split("|")), caught.value
    assert str(f) in str(caught.value)


def test_same_bits_tells_zeros_apart_and_nans_alike() -> None:
    nan = float("nan")
    assert same_bits(torch.tensor([nan, 0.0]), torch.tensor([nan, 0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([0.0]).half())
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1))
    fp8 = torch.tensor([nan, 1.0]).to(torch.float8_e4m3fn)
    assert same_bits(fp8, fp8.clone())


def test_equal_looks_at_every_plane() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    q = encode(x, Format.parse("nvfp4"))
    assert q.equal(encode(x, Format.parse("nvfp4")))
    assert not q.equal(encode(x * 2, Format.parse("nvfp4")))
    assert not q.equal(encode(x, Format.parse("nvfp4_div")))
    assert q.to("cpu").equal(q)
    assert isinstance(q.scale, QTensor)
    assert isinstance(q.scale.scale, torch.Tensor)
    other = replace(q, scale=replace(q.scale, scale=q.scale.scale * 2))
    assert not q.equal(other)


@pytest.mark.parametrize(
    "name",
    ["int8.row*bf16", "e4m3fn.8x16*fp32", "nvfp4", "mxfp4", "nf4.flat24*fp32", "int4-int4.g32*bf16@domain=minmax"],
)
def test_decoding_in_parts_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 20, 96, generator=torch.Generator().manual_seed(5))
    q = encode(x, Format.parse(name))
    whole = [q.dequantize(dtype) for dtype in (torch.float32, torch.bfloat16)]
    monkeypatch.setattr(parts, "PART", 700)
    assert all(torch.equal(q.dequantize(one.dtype), one) for one in whole)
    ordered = QTensor(
        Format.parse("int4.g32*fp32"),
        torch.randint(-8, 8, (40, 96), generator=torch.Generator().manual_seed(1)).to(torch.int8),
        torch.rand(40, 3) + 0.1,
        group_index=torch.arange(96, dtype=torch.int32) % 3,
    )
    cut = ordered.dequantize()
    monkeypatch.setattr(parts, "PART", 1 << 40)
    assert torch.equal(ordered.dequantize(), cut)


@pytest.mark.parametrize("part", [100, 1 << 40])
def test_a_grid_may_serve_some_of_the_leading_axes(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART", part)
    codes = torch.randint(-8, 8, (2, 3, 5, 8), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    for lead in ((1, 3), (2, 1), (1, 1), (2, 3)):
        scale = torch.rand(*lead, 5, 2) + 0.1
        q = tensor("int4.g4*fp32", codes=codes, scale=scale)
        assert torch.equal(q.dequantize(), codes * scale.repeat_interleave(4, -1))
