"""comm_quant in numbers: sums within computed bounds, ranks alike to the bit, every codec as its definition says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from qhal import Codec, Format, QTensor, collectives
from qhal.collectives import part_rows, simulate
from qhal.elements import WIDE, decode, element
from qhal.encoding import encode
from qhal.tensors import same_bits
from qhal.wire import encode_part

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
NAMES = (
    "int8.g32*fp16", "int8.row*fp32", "int6.g32*fp16", "int6.row*bf16", "int4.g128*fp16", "int4.g32*fp16@domain=signed",
    "e4m3fn.row*fp32", "e4m3fn.g128*fp32", "e4m3fnuz.row*fp32@qmax=224", "e2m1.g32*e8m0", "e4m3fn.g32*e8m0",
)  # fmt: skip
"""Formats whose step the bounds below compute on their own."""
MORE = (
    "nvfp4", "bf16", "fp32", "e4m3fn", "int3.g32*fp16", "int5.row*fp32", "uint4-uint4.g32*fp16@domain=minmax", "q3_k",
    "mxfp6_e3m2", "mxfp6_e2m3", "nf4.g64*fp32", "mxfp4_dual", "uint4.g32*fp16+fp16@domain=minmax", "e5m2.row*fp32",
    "int8.tensor*fp32", "int8.col*fp32", "int8.16x16*(e4m3fn.4x4*fp32)", "nf4.flat64*fp32", "int8.head*fp32", "int7",
)  # fmt: skip
SHAPES = ((1, 64), (5, 70), (8, 128), (13, 32), (2, 1))


def codec(name: str, **options: object) -> Codec:
    return Codec(Format.parse(name), **options)  # type: ignore[arg-type]


def inputs(world: int, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    spread = torch.randn(world, shape[0], 1, generator=g).exp()
    return list((torch.randn(world, *shape, generator=g) * spread).to(dtype))


def straight(xs: Sequence[torch.Tensor], f: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """float64: the sum of every rank's dequantized codes, and of their magnitudes."""
    values = [encode(x, f) for x in xs]
    exact = []
    for q in values:
        codes = decode(f.element, q.codes).double()
        exact.append(codes * f.block.expand(decode(f.scale.element, q.scale), codes.shape).double())
    return torch.stack(exact).sum(0), torch.stack(exact).abs().sum(0)


def half_step(total: torch.Tensor, f: Format) -> torch.Tensor:
    """How far rounding `total` to the format may move it: half the gap of its codes, and what saturates."""
    e = element(f.element)
    peak = f.block.expand(f.block.split(total.abs()).amax(-1), total.shape)
    if f.scale.element == "e8m0":
        scale = torch.exp2(torch.floor(torch.log2(peak)) - torch.log2(torch.tensor(e.largest)).floor())
    else:
        signed = f.rule.domain == "signed"
        scale = peak / (-e.smallest if signed else f.qmax) * (1 + 2.0 ** -(8 if f.scale.element == "bf16" else 11))
    every = torch.arange(1 << e.bits, dtype=torch.int16).to(torch.uint8)
    if e.kind == "int":
        grid = torch.arange(e.smallest, e.largest + 1).double()
    else:
        grid = decode(f.element, every.view(e.storage)).double()
        grid = grid[torch.isfinite(grid)].unique()
    gaps = grid.diff()
    u = torch.where(scale == 0, 0.0, total / scale)
    at = torch.searchsorted(grid, u.clamp(grid[0], grid[-1]).contiguous()).clamp(1, grid.numel() - 1) - 1
    near = torch.maximum(gaps[at], torch.maximum(gaps[(at - 1).clamp(0)], gaps[(at + 1).clamp(max=gaps.numel() - 1)]))
    excess = (u.abs() - min(grid[-1], -grid[0])).clamp(min=0) + (u.abs() * 2.0**-8 if f.scale.element != "fp32" else 0)
    return scale * (near / 2 + excess)


def half_ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    return (value.abs().clamp(min=info.tiny).log2().floor().exp2() * info.eps) / 2 * (1 + 2.0**-7)


def headroom(ys: torch.Tensor, xs: Sequence[torch.Tensor], f: Format, requantized: bool) -> float:
    """The largest error over its bound: 1/2 ulp of the result + (N - 1) 2^-24 sum |x_r| (+ half a step)."""
    ref, magnitude = straight(xs, f)
    step = half_step(ref, f) if requantized else 0.0
    bound = half_ulp(ref.abs() + step, ys.dtype) + (len(xs) - 1) * 2.0**-24 * magnitude + step
    return float(((ys.double() - ref).abs() / bound).max())


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_sums_are_within_their_bounds_and_alike_on_every_rank(name, world):
    c = codec(name)
    for i, shape in enumerate(SHAPES):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[(i + world) % 3]
        xs = inputs(world, shape, dtype, i)
        before = [x.clone() for x in xs]
        ys = simulate(xs, "all_reduce", c)
        assert len(ys) == world and all(same_bits(y, ys[0]) for y in ys) and ys[0].dtype == dtype
        assert headroom(ys[0], xs, c.format, True) <= 1
        once = simulate(xs, "all_reduce", codec(name, requantize=False))
        parts = simulate(xs, "reduce_scatter", c)
        assert [p.shape[0] for p in parts] == part_rows(shape[0], world)
        assert all(same_bits(y, torch.cat(parts)) for y in once)
        assert headroom(once[0], xs, c.format, False) <= 1
        assert all(same_bits(x, b) for x, b in zip(xs, before, strict=True))


@pytest.mark.parametrize("name", ["int8.g32*fp16", "e4m3fn.row*fp32", "e2m1.g32*e8m0"])
def test_the_bounds_notice_planted_faults(name, monkeypatch):
    """One rank missing, another rank's scale, the last part not reduced, sums in bf16."""
    c, xs, honest = codec(name), inputs(4, (8, 128), torch.float32), collectives.Rank._sum
    other = [encode(x, c.format) for x in xs]
    swapped = QTensor(c.format, other[0].codes, other[1].scale).dequantize()
    faults = {
        "missing": lambda self, v: honest(self, v[:-1]),
        "unreduced": lambda self, v: v[3] if self.rank == 3 else honest(self, v),
        "scale": lambda self, v: honest(self, [swapped[2 * self.rank : 2 * self.rank + 2], *v[1:]]),
        "bf16": lambda self, v: sum(a.bfloat16() for a in v).float(),
    }
    for fault in faults.values():
        monkeypatch.setattr(collectives.Rank, "_sum", fault)
        y = torch.cat(simulate(xs, "reduce_scatter", c))
        assert headroom(y, xs, c.format, False) > 1


@pytest.mark.parametrize("name", [*NAMES, *MORE])
@pytest.mark.parametrize("order", ["sequential", "parity"])
def test_every_codec_is_decode_sum_encode_decode(name, order):
    """The definition written straight down, part by part; no byte is packed here."""
    c = codec(name, order=order)
    if order == "parity" and str(c.format.block) != "g32":
        return
    world, rows, k = 3, 7, 70
    xs, counts = inputs(world, (rows, k)), part_rows(7, 3)
    assert counts == [3, 2, 2]

    def through(x: torch.Tensor) -> torch.Tensor:
        return encode_part(x, c).dequantize()

    decoded = [[through(part) for part in x.split(counts)] for x in xs]
    totals = [(decoded[0][p] + decoded[1][p]) + decoded[2][p] for p in range(world)]
    for y in simulate(xs, "all_reduce", c):
        assert same_bits(y, torch.cat([through(t) for t in totals]).bfloat16())
    for p, y in enumerate(simulate(xs, "reduce_scatter", c)):
        assert same_bits(y, totals[p].bfloat16())
    for y in simulate(xs, "all_gather", c):
        assert same_bits(y, torch.cat([through(x) for x in xs]).bfloat16())
    for p, y in enumerate(simulate(xs, "all_to_all", c)):
        assert same_bits(y, torch.cat([decoded[r][p] for r in range(world)]).bfloat16())


def test_blocks_within_a_row_do_not_see_the_partition():
    xs = inputs(2, (6, 96))
    c = codec("int8.g32*fp16")
    alike = simulate(xs, "all_reduce", c)[0]
    for r in range(6):
        assert same_bits(simulate([x[r : r + 1] for x in xs], "all_reduce", c)[0], alike[r : r + 1])
    assert same_bits(simulate([x.reshape(2, 3, 96) for x in xs], "all_reduce", c)[0], alike.reshape(2, 3, 96))
    assert same_bits(simulate([x[0] for x in xs], "all_reduce", c)[0], alike[0])


@pytest.mark.parametrize("accumulate", ["fp32", "fp16", "bf16"])
def test_the_sum_has_the_type_and_the_order_that_the_codec_says(accumulate):
    c, kind = codec("int8.row*fp32", accumulate=accumulate), WIDE[accumulate]
    xs = inputs(4, (5, 40), torch.float32)
    values = [encode(x, c.format).dequantize() for x in xs]
    total = values[0].to(kind)
    for v in values[1:]:
        total = total + v.to(kind)
    assert same_bits(torch.cat(simulate(xs, "reduce_scatter", c)), total.float())
    back = simulate(xs[::-1], "reduce_scatter", c)
    assert not same_bits(torch.cat(back), total.float())
    assert headroom(torch.cat(back), xs, c.format, False) <= 1 or accumulate != "fp32"


def test_permuting_ranks_permutes_what_moves_and_keeps_exact_sums():
    xs, order = inputs(4, (8, 32)), [2, 0, 3, 1]
    c = codec("int8.g32*fp16")
    turned = [xs[r] for r in order]
    gathered = simulate(xs, "all_gather", c)[0].split(8)
    assert same_bits(simulate(turned, "all_gather", c)[1], torch.cat([gathered[r] for r in order]))
    before, after = simulate(xs, "all_to_all", c)[1].split(2), simulate(turned, "all_to_all", c)[1]
    assert same_bits(after, torch.cat([before[r] for r in order]))
    whole = [(x * 4).round().clamp(-7, 7).index_fill(1, torch.tensor([0]), 7.0) for x in xs]  # every scale is 1
    exact = codec("int4.g32*fp16", requantize=False)
    want = torch.stack(whole).float().sum(0).bfloat16()
    assert same_bits(simulate(whole, "all_reduce", exact)[0], want)
    assert same_bits(simulate([whole[r] for r in order], "all_reduce", exact)[3], want)


def test_own_parts_can_stay_exact():
    c = codec("int4.row*fp16", quantize_own=False)
    xs = inputs(2, (4, 32), torch.float32)
    q = [encode(x, c.format).dequantize() for x in xs]
    sums = [xs[0][:2] + q[1][:2], q[0][2:] + xs[1][2:]]
    for y, want in zip(simulate(xs, "reduce_scatter", c), sums, strict=True):
        assert same_bits(y, want)
    for y in simulate(xs, "all_reduce", c):
        assert same_bits(y, encode(torch.cat(sums), c.format).dequantize())
    assert same_bits(simulate(xs, "all_to_all", c)[1], torch.cat([q[0][2:], xs[1][2:]]))


@pytest.mark.parametrize(
    ("name", "order"), [("int8.g32*fp16", "parity"), ("int6.row*fp16", ""), ("mxfp4", ""), ("bf16", ""),
                        ("e2m1.g16*(e4m3fn.row*fp32)", ""), ("uint4-uint4.g32*fp16@domain=minmax", "parity")],
)  # fmt: skip
def test_what_moves_can_stay_quantized(name, order):
    c = codec(name, order=order or "sequential")
    splits = [[0, 2, 3], [0, 1, 0], [0, 0, 0]]
    xs = [x[: sum(row)] for x, row in zip(inputs(3, (5, 70)), splits, strict=True)]
    for collective, s in (("all_to_all", splits), ("all_gather", [[5, 1, 0]] * 3)):
        plain = simulate(xs, collective, c, s)
        kept = simulate(xs, collective, c, s, decode=False)
        for y, q in zip(plain, kept, strict=True):
            assert isinstance(q, QTensor) and q.format == c.format
            assert q.shape == tuple(y.shape) and same_bits(q.dequantize(torch.bfloat16), y)
    assert [y.shape[0] for y in simulate(xs, "all_to_all", c, splits)] == [0, 3, 3]


def test_specials_stay_in_their_block_and_reach_every_rank():
    for name, bad in (("int8.g32*fp16", torch.nan), ("mxfp4", torch.inf), ("e4m3fn.g32*fp32", torch.nan)):
        xs = inputs(3, (6, 96), torch.float32)
        xs[1][4, 40] = bad
        clean = inputs(3, (6, 96), torch.float32)
        block = torch.zeros(6, 96, dtype=torch.bool)
        block[4, 32:64] = True
        for y, good in zip(simulate(xs, "all_reduce", codec(name)), simulate(clean, "all_reduce", codec(name)),
                           strict=True):  # fmt: skip
            assert torch.equal(y.isnan(), block) and torch.equal(y[~block], good[~block])
        assert [bool(y.isnan().any()) for y in simulate(xs, "all_to_all", codec(name))] == [False, False, True]
    big = [torch.full((1, 32), 6e4, dtype=torch.float16)] * 2
    assert simulate(big, "all_reduce", codec("int8.row*fp32"))[0].isinf().all()  # 1.2e5 is past fp16
    assert simulate(big, "all_reduce", codec("int8.row*fp32", accumulate="fp16"))[0].isnan().all()
    zeros = simulate([torch.zeros(2, 64)] * 2, "all_reduce", codec("int8.g32*fp16"))
    assert not zeros[0].any()


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("name", ["int8.g32*fp16", "int8.row*fp32", "nvfp4", "int8.col*fp32", "int8.head*fp32", "bf16"])
def test_nothing_is_legal(collective, name):
    for world in (1, 3):
        for shape in ((0, 64), (3, 0), (0, 0), (1, 5)):
            ys = simulate([torch.ones(shape)] * world, collective, codec(name))
            rows = {"all_reduce": [shape[0]] * world, "all_gather": [shape[0] * world] * world}.get(
                collective, [n * (world if collective == "all_to_all" else 1) for n in part_rows(shape[0], world)]
            )
            assert [tuple(y.shape) for y in ys] == [(n, shape[1]) for n in rows]
