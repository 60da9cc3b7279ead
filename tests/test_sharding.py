"""Cuts and fusions of quantized tensors: equal to the cut of the values, bit for bit, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal import (
    Activation,
    Block,
    CodebookSegment,
    CodebookTensor,
    ExpertsSpec,
    Format,
    LinearSpec,
    QTensor,
    ShardError,
)
from qhal.elements import element
from qhal.encoding import encode
from qhal.grammar import ALIASES
from qhal.tensors import same_bits

Shape = tuple[int, ...]


def random_codes(name: str, shape: Shape, g: torch.Generator) -> torch.Tensor:
    e = element(name)
    if e.wide:
        return (torch.rand(shape, generator=g) + 0.5).to(e.storage)
    if e.integer:
        return torch.randint(int(e.smallest), int(e.largest) + 1, shape, generator=g).to(e.storage)
    if e.kind == "float":
        return (torch.randn(shape, generator=g) * 8).to(e.storage)
    low, high = (120, 135) if e.kind == "exponent" else (0, 1 << e.bits)
    return torch.randint(low, high, shape, generator=g).to(e.storage)


def random_tensor(
    f: Format, shape: Shape, g: torch.Generator, *, one_zero: bool = False, index: bool = False
) -> QTensor:
    """Random codes in every plane, nested as the format nests."""
    planes: dict[str, Any] = {}
    for name in ("scale", "zero", "offset"):
        fmt = getattr(f, name)
        if fmt is None:
            continue
        grid = f.block.grid(*shape[-2:]) if f.block is not None else (1, 1)
        if name == "zero" and one_zero:
            grid = (1, 1)
        inner = (*shape[:-2], *grid)
        planes[name] = random_codes(fmt.element, inner, g) if fmt.plain else random_tensor(fmt, inner, g)
    if element(f.element).kind == "lut" and f.element != "nf4":
        planes["table"] = torch.randn(1 << element(f.element).bits, generator=g)
    if index:
        groups = planes["scale"].shape[-1]
        planes["group_index"] = torch.randint(0, groups, (shape[-1],), generator=g).int()
    return QTensor(f, random_codes(f.element, shape, g), **planes)


def can_cut(f: Format, shape: tuple[int, int], dim: int, start: int, stop: int, one_zero: bool = False) -> bool:
    """Whether rows or columns start:stop are whole blocks in every plane: an independent statement of the rule."""
    n, k = shape
    if (start, stop) == (0, shape[dim]):
        return True
    if dim == 1 and f.sparsity is not None and (start % f.sparsity[1] or stop % f.sparsity[1]):
        return False
    for name in ("scale", "zero", "offset"):
        plane = getattr(f, name)
        if plane is None or f.block is None or (name == "zero" and one_zero):
            continue
        rows, cols = f.block.grid(n, k)
        owner = f.block.expand(torch.arange(rows * cols).reshape(rows, cols), (n, k))
        inside = owner.narrow(dim, start, stop - start)
        outside = torch.cat([owner.narrow(dim, 0, start), owner.narrow(dim, stop, shape[dim] - stop)], dim)
        shared = set(inside.unique().tolist()) & set(outside.unique().tolist())
        along = {"row": 0, "head": 0, "col": 1, "tensor": None}.get(f.block.kind, dim)
        if along != dim:
            continue  # every part keeps the whole plane
        if shared or (f.block.kind == "flat" and dim == 1 and n > 1):
            return False
        if not plane.plain:
            used = sorted(inside.unique().tolist())
            if f.block.kind == "flat":
                ok = can_cut(plane, (rows, cols), 1, used[0], used[-1] + 1)
            else:
                axis = [i // cols for i in used] if dim == 0 else [i % cols for i in used]
                ok = can_cut(plane, (rows, cols), dim, min(axis), max(axis) + 1)
            if not ok:
                return False
    return True


FORMATS = [
    "int4.g32*bf16", "int4-int4.g16*bf16", "uint4-uint4.g32*fp16", "uint4-fp16.g16*fp16", "int8.row*fp32",
    "int8.tensor*fp32", "int8.col*fp32", "int8.head*fp32", "int8-int8.row*bf16", "int8-fp32.col*fp32",
    "e4m3fn.16x16*fp32", "e4m3fn.8x32*e8m0", "e4m3fn.row*bf16%2:4", "e2m1.g32*e8m0", "e3m2.g16*e8m0", "nvfp4",
    "nvfp4_div", "mxfp4_dual", "q4_k", "q2_k", "q6_k", "q4_1", "nf4.flat64*fp32",
    "nf4.flat8*(lut8.flat16*fp32+fp32)", "lut4.flat32*fp32", "int8.row*(fp32.tensor/fp32)",
    "int4-int4.row*(bf16.tensor*bf16)", "int8.tensor*e4m3fn", "bf16", "int4", "int8.row*(int8.col*fp32)",
    "int4.g8*(int8.4x4*fp32)", "int8.g16*(int8.row*fp32)-(int8.row*fp32)", "int4-int4.g128*bf16",
    "uint4-uint4.g128*fp16", "int8-fp32.row*fp32", "int8-int8.head*fp32", "e4m3fn.col*fp32", "int8.row/fp32",
    "uint4-fp16.g64*fp16", "e4m3fn-fp32.row*fp32", "e5m2fnuz.row*fp32", "lut8.row*fp32+fp32", "e4m3fn", "nf4",
]  # fmt: skip
FORMATS = list(dict.fromkeys([*FORMATS, *(str(Format.parse(name)) for name in ALIASES)]))
"""Every alias, every canonical name, and corners of nesting."""


@settings(max_examples=500, derandomize=True, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([1, 2, 3, 8, 16, 24, 32]),
    st.sampled_from([16, 32, 48, 64, 128, 192, 512, 1024]),
    st.sampled_from([(), (2,), (1,)]),
    st.integers(0, 1),
    st.sampled_from([1, 2, 3, 4]),
    st.booleans(),
)
def test_shards_are_the_shards_of_the_values(
    name: str, n: int, k: int, lead: Shape, dim: int, world: int, one_zero: bool
) -> None:
    f = Format.parse(name)
    t = random_tensor(f, (*lead, n, k), torch.Generator().manual_seed(n * k + world), one_zero=one_zero)
    size = (n, k)[dim]
    cuts = [(size * r // world, size * (r + 1) // world) for r in range(world)]
    allowed = size % world == 0 and all(can_cut(f, (n, k), dim, *cut, one_zero) for cut in cuts)
    if not allowed:
        with pytest.raises(ShardError) as caught:
            for rank in range(world):
                t.shard(dim, rank, world)
        assert any(word in str(caught.value) for word in ("does not divide", "block", "2:4")), caught.value
        return
    shards = [t.shard(dim, rank, world) for rank in range(world)]
    value = t.dequantize()
    for part, (start, stop) in zip(shards, cuts, strict=True):
        assert same_bits(part.dequantize(), value.narrow(dim - 2, start, stop - start).contiguous())
    whole = QTensor.concat(shards, dim)
    # one zero point for a tensor whose shards have one block each comes back as one per block
    assert same_bits(whole.dequantize(), value) if one_zero else whole.equal(t)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 1), st.sampled_from([2, 4]), st.sampled_from(["uint4-uint4.g16*fp16", "int4.g16*bf16"]))
def test_act_order_groups_are_cut_anywhere(dim: int, world: int, name: str) -> None:
    t = random_tensor(Format.parse(name), (8, 72), torch.Generator().manual_seed(world), index=True)
    shards = [t.shard(dim, rank, world) for rank in range(world)]
    size = (8, 72)[dim] // world
    for rank, part in enumerate(shards):
        assert same_bits(part.dequantize(), t.dequantize().narrow(dim, rank * size, size).contiguous())
    assert QTensor.concat(shards, dim).equal(t)


def test_act_order_with_one_row_of_scales() -> None:
    f = Format.parse("int4.g16*bf16")
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 4, (64,), generator=g).int()
    t = QTensor(f, random_codes("int4", (8, 64), g), random_codes("bf16", (1, 4), g), group_index=index)
    assert same_bits(t.shard(0, 1, 2).dequantize(), t.dequantize()[4:].contiguous())
    assert QTensor.concat([t.shard(0, r, 2) for r in range(2)], 0).dequantize().equal(t.dequantize())


@pytest.mark.parametrize(
    ("name", "shape", "dim", "world", "text"),
    [
        ("int4.g32*bf16", (8, 96), 1, 2, "int4.g32*bf16 (scale): column 0 or 48 lies inside a block of 32"),
        ("e4m3fn.128x128*fp32", (192, 128), 0, 2, "row 0 or 96 lies inside a block of 128"),
        ("e4m3fn.128x128*fp32", (576, 128), 0, 2, "row 0 or 288 lies inside a block of 128"),
        ("nf4.flat64*fp32", (4, 64), 1, 2, "a column cut goes through flat blocks of 64"),
        ("nf4.flat64*fp32", (4, 48), 0, 2, "row 0 or 2 lies inside a block of 64"),
        ("q4_k", (2, 512), 1, 4, "uint6.g8*fp16 (scale): column 0 or 4 lies inside a block of 8"),
        ("e4m3fn.row*bf16%2:4", (4, 12), 1, 2, "cut a 2:4 run"),
        ("int8.row*fp32", (9, 16), 0, 2, "rows of int8.row*fp32: 9 does not divide into 2 equal parts"),
    ],
)
def test_refusals_name_the_block(name: str, shape: Shape, dim: int, world: int, text: str) -> None:
    t = random_tensor(Format.parse(name), shape, torch.Generator().manual_seed(0))
    with pytest.raises(ShardError) as caught:
        t.shard(dim, 0, world)
    assert text in str(caught.value)


def test_other_refusals() -> None:
    t = random_tensor(Format.parse("int8.row*fp32"), (8, 16), torch.Generator().manual_seed(0))
    for act, text in [
        (lambda: t.shard(2, 0, 2), "dim 2: 0 cuts rows"),
        (lambda: t.shard(0, 2, 2), "rank 2 of 2"),
        (lambda: t.narrow(0, 4, 9), "4:9 is outside 0:8"),
        (lambda: QTensor.concat([], 0), "nothing to fuse"),
        (lambda: QTensor.stack([]), "nothing to stack"),
        (lambda: t.select(0, 1), "no experts 0:1"),
    ]:
        with pytest.raises(ShardError, match=text):
            act()


# ---------------------------------------------------------------- fusing what was never one tensor


PER_TENSOR = [
    "int8.tensor*fp32", "e4m3fn.tensor*bf16", "nvfp4", "nvfp4_div", "int8-int8.tensor*fp32", "int8.tensor*e4m3fn",
    "int4-int4.row*(bf16.tensor*bf16)", "int8.row*(fp32.tensor/fp32)",
]  # fmt: skip


@pytest.mark.parametrize("name", PER_TENSOR)
def test_unequal_tensor_scales_become_row_scales(name: str) -> None:
    parts = [random_tensor(Format.parse(name), (n, 32), torch.Generator().manual_seed(n)) for n in (8, 4, 16)]
    fused = QTensor.concat(parts, 0)
    assert same_bits(fused.dequantize(), torch.cat([p.dequantize() for p in parts]))
    assert "row" in str(fused.format)
    same = QTensor.concat([parts[0], parts[0]], 0)
    assert same.format == parts[0].format
    with pytest.raises(ShardError, match="share rows"):
        QTensor.concat([parts[0], replace(parts[0], **twice(parts[0]))], 1)


def twice(t: QTensor) -> dict[str, Any]:
    """A scale with another value at its outermost level."""
    if isinstance(t.scale, QTensor):
        return {"scale": replace(t.scale, **twice(t.scale))}
    assert t.scale is not None
    return {"scale": (t.scale.float() * 2).to(t.scale.dtype)}


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.sampled_from([1, 8, 16]), min_size=2, max_size=3),
    st.integers(0, 1),
    st.booleans(),
)
def test_fusing_strangers_is_exact_or_refused(name: str, sizes: list[int], dim: int, one_zero: bool) -> None:
    f = Format.parse(name)
    g = torch.Generator().manual_seed(sum(sizes))
    shapes = [(s, 64) if dim == 0 else (8, 4 * s) for s in sizes]
    parts = [random_tensor(f, s, g, one_zero=one_zero) for s in shapes]
    try:
        fused = QTensor.concat(parts, dim)
    except ShardError as refused:
        assert any(str(x) in str(refused) for x in (f, f.scale, f.zero, f.offset) if x is not None)
        return
    assert same_bits(fused.dequantize(), torch.cat([p.dequantize() for p in parts], dim))


@pytest.mark.parametrize(
    ("parts", "dim", "text"),
    [
        (("int4.g32*bf16", "int8.row*fp32"), 0, "different formats: int4.g32.bf16, int8.row.fp32"),
        (("int8.row*fp32", "int8.row*fp32"), 1, "share columns|share rows"),
        (("int8.col*fp32", "int8.col*fp32"), 0, "share columns"),
        (("nf4.flat64*fp32", "nf4.flat64*fp32"), 1, "a seam inside a flat block of 64"),
    ],
)
def test_fusion_refusals(parts: tuple[str, str], dim: int, text: str) -> None:
    tensors = [random_tensor(Format.parse(p), (8, 64), torch.Generator().manual_seed(i)) for i, p in enumerate(parts)]
    with pytest.raises(ShardError, match=text):
        QTensor.concat(tensors, dim)


def test_seams_inside_blocks_are_refused() -> None:
    g = torch.Generator().manual_seed(0)
    with pytest.raises(ShardError, match=r"a seam at \[96, 128\] lies inside a block of 128"):
        QTensor.concat([random_tensor(Format.parse("fp8_block"), (n, 128), g) for n in (96, 128)], 0)
    joined = QTensor.concat([random_tensor(Format.parse("fp8_block"), (n, 128), g) for n in (128, 96)], 0)
    assert joined.shape == (224, 128)  # a short last tile stays last
    with pytest.raises(ShardError, match="2:4"):
        QTensor.concat([random_tensor(Format.parse("int8.tensor*fp32%2:4"), (4, 6), g.manual_seed(1)) for _ in "ab"], 1)
    with pytest.raises(ShardError, match="different tables"):
        QTensor.concat([random_tensor(Format.parse("lut4.flat32*fp32"), (4, 32), g) for _ in "ab"], 0)
    with pytest.raises(ShardError, match="do not join along dim 0"):
        QTensor.concat([random_tensor(Format.parse("int8.row*fp32"), (4, k), g) for k in (32, 64)], 0)
    indexed = [random_tensor(Format.parse("int4.g16*bf16"), (4, 64), g, index=i) for i in (True, False)]
    with pytest.raises(ShardError, match="some parts have a group index"):
        QTensor.concat(indexed, 0)
    indexed = [random_tensor(Format.parse("int4.g16*bf16"), (4, 64), g, index=True) for _ in "ab"]
    with pytest.raises(ShardError, match="different group indices"):
        QTensor.concat(indexed, 0)
    with pytest.raises(ShardError, match="only if they share all groups"):
        QTensor.concat(indexed, 1)


# ---------------------------------------------------------------- experts and rows


@pytest.mark.parametrize("name", FORMATS)
def test_stack_and_select(name: str) -> None:
    f = Format.parse(name)
    parts = [random_tensor(f, (8, 64), torch.Generator().manual_seed(i)) for i in range(4)]
    if element(f.element).kind == "lut" or (f.scale is not None and not f.scale.plain and f.scale.element == "lut8"):
        parts = [replace(parts[0], codes=p.codes) for p in parts]  # a table belongs to the whole stack
    stacked = QTensor.stack(parts)
    assert same_bits(stacked.dequantize(), torch.stack([p.dequantize() for p in parts]))
    middle = stacked.select(1, 2)
    assert same_bits(middle.dequantize(), stacked.dequantize()[1:3].contiguous())
    for dim in (0, 1):
        if can_cut(f, (8, 64), dim, 0, (4, 32)[dim]):
            part = stacked.shard(dim, 0, 2).select(3, 1)
            assert same_bits(part.dequantize()[0], parts[3].shard(dim, 0, 2).dequantize())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gated", [True, False])
def test_experts_of_every_format_are_cut_or_refused_by_name(name: str, gated: bool) -> None:
    """Gate and up by rows, each half by itself, down by columns; or the block that is in the way is named."""
    f, inner, k = Format.parse(name), 512, 64
    g = torch.Generator().manual_seed(0)
    up = random_tensor(f, (3, (2 if gated else 1) * inner, k), g)
    down = random_tensor(f, (3, k, inner), g)
    spec = ExpertsSpec(LinearSpec(up, name="up"), LinearSpec(down, name="down"), Activation(gated=gated), "experts")
    one = spec.experts(1, 1)
    assert same_bits(one.gate_up.stored(), up.dequantize()[1:2].contiguous())
    assert same_bits(one.down.stored(), down.dequantize()[1:2].contiguous())
    for world in (2, 4):
        runs = [slice(r * inner // world, (r + 1) * inner // world) for r in range(world)]
        try:
            parts = [spec.shard(r, world) for r in range(world)]
        except ShardError as refused:
            assert any(str(x) in str(refused) for x in (f, f.scale, f.zero, f.offset) if x is not None)
            rows = [(r.start + h * inner, r.stop + h * inner) for r in runs for h in range(1 + gated)]
            whole = all(can_cut(f, up.shape[-2:], 0, *cut) for cut in rows)
            assert not (whole and all(can_cut(f, (k, inner), 1, r.start, r.stop) for r in runs)), refused
            continue
        for part, run in zip(parts, runs, strict=True):
            half = up.dequantize()[:, run]
            wanted = torch.cat([half, up.dequantize()[:, inner + run.start : inner + run.stop]], 1) if gated else half
            assert same_bits(part.gate_up.stored(), wanted.contiguous())
            assert same_bits(part.down.stored(), down.dequantize()[..., run].contiguous())


def test_stack_refuses_strangers() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (random_tensor(Format.parse("lut4.flat32*fp32"), (4, 32), g) for _ in "ab")
    with pytest.raises(ShardError, match="table that differs between experts"):
        QTensor.stack([a, b])
    with pytest.raises(ShardError, match="cannot stack"):
        QTensor.stack([a, random_tensor(Format.parse("int8.row*fp32"), (4, 32), g)])


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_permuted_exactly_or_refused(name: str) -> None:
    f = Format.parse(name)
    t = random_tensor(f, (8, 64), torch.Generator().manual_seed(0))
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    spans = [x.block for x in (f, f.scale, f.offset) if x is not None and x.block is not None]
    if any(isinstance(b, Block) and (b.kind == "flat" or b.rows > 1) for b in spans):
        with pytest.raises(ShardError, match="rows cannot be permuted"):
            t.permute_rows(order)
    else:
        assert same_bits(t.permute_rows(order).dequantize(), t.dequantize()[order])


# ---------------------------------------------------------------- codebooks


def codebook(n: int = 8, k: int = 32, **more: Any) -> CodebookTensor:
    g = torch.Generator().manual_seed(7)
    segments = (
        CodebookSegment(torch.randint(0, 16, (n // 2, 2, 1), generator=g).int(), (torch.randn(16, 2, 8, generator=g),)),
        CodebookSegment(
            torch.randint(0, 4, (n, (k - 16) // 4, 2), generator=g).int(),
            (torch.randn(4, 1, 4, generator=g),) * 2,
            (1, 2),
        ),
    )
    return CodebookTensor((n, k), segments, scale=torch.rand(n, generator=g) + 1, **more)


def test_codebook_cuts() -> None:
    t = codebook(column_scale=torch.rand(32), column_bias=torch.rand(32))
    value = t.dequantize()
    for dim, world in ((0, 2), (0, 4), (1, 2), (1, 4)):
        size = t.shape[dim] // world
        for rank in range(world):
            assert torch.equal(t.shard(dim, rank, world).dequantize(), value.narrow(dim, rank * size, size))
    with pytest.raises(ShardError, match="inside a codebook vector of 2 rows"):
        t.shard(0, 0, 8)
    with pytest.raises(ShardError, match="inside a codebook vector of 8 columns"):
        t.shard(1, 0, 8)
    with pytest.raises(ShardError, match="columns of a permuted weight cannot be cut"):
        replace(t, permutation=torch.randperm(32)).shard(1, 0, 2)
    with pytest.raises(ShardError, match="codebook weights cannot be fused"):
        CodebookTensor.concat([t, t], 0)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.sampled_from([*FORMATS, "int8.head*fp32", "int8-fp32.row*fp32", "e4m3fn.head*bf16", "bf16", "e4m3fn"]),
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from([(), (2,)]),
    st.booleans(),
)
def test_a_transpose_is_the_transpose_of_the_value(name: str, n: int, k: int, lead: Shape, one_zero: bool) -> None:
    f = Format.parse(name)
    t = random_tensor(f, (*lead, n, k), torch.Generator().manual_seed(n * k), one_zero=one_zero)
    if f.sparsity is not None or "flat" in name:
        with pytest.raises(ShardError, match="no transpose"):
            t.transposed()
        return
    turned = t.transposed()
    assert turned.codes.is_contiguous()
    assert same_bits(turned.dequantize(), t.dequantize().transpose(-1, -2).contiguous())
    assert turned.format == Format.parse(str(turned.format))
    back = turned.transposed()
    heads = "head" in name  # a head block comes back as row: the same grid
    assert back.equal(t) or (heads and same_bits(back.dequantize(), t.dequantize()))


def test_act_order_has_no_transpose() -> None:
    t = random_tensor(Format.parse("int4.g16*bf16"), (8, 64), torch.Generator().manual_seed(0), index=True)
    with pytest.raises(ShardError, match="group index orders columns"):
        t.transposed()
    with pytest.raises(ShardError, match=r"layout 'nibble' is a backend's own.*restore"):
        replace(t, group_index=None, layout="nibble").transposed()


def test_transposed_blocks_are_named() -> None:
    for name, turned in (("int4.g32*bf16", "int4.32x1*bf16"), ("e4m3fn.128x64*fp32", "e4m3fn.64x128*fp32"),
                         ("int8.row*fp32", "int8.col*fp32"), ("int8.col*fp32", "int8.row*fp32"),
                         ("int4.4x1*fp16", "int4.g4*fp16"), ("nvfp4", "e2m1.16x1*(e4m3fn.tensor*fp32)"),
                         ("q4_k", "uint4.32x1*(uint6.8x1*fp16)-(uint6.8x1*fp16)")):  # fmt: skip
        t = random_tensor(Format.parse(name), (8, 64), torch.Generator().manual_seed(0))
        assert str(t.transposed().format) == turned


def test_encoded_weights_shard_like_their_source() -> None:
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    for name in ("int4_g32", "int8_row", "mxfp4", "mxfp8"):
        f = Format.parse(name)
        for dim in (0, 1):
            if f.block is not None and f.block.kind == "row" and dim == 1:
                continue  # a row's scale looks at the whole row
            parts = [encode(x.chunk(2, dim)[r], f) for r in range(2)]
            assert all(encode(x, f).shard(dim, r, 2).equal(parts[r]) for r in range(2))
