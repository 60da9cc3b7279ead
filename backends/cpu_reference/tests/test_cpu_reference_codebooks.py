"""Codebook weights on the reference: decoded as their words say, multiplied, kept, refitted, as tools wrote them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qhal import (
    CodebookSegment,
    CodebookTensor,
    Format,
    FormatError,
    GemmRequest,
    GroupedRequest,
    NumericsClass,
    Operand,
    ShardError,
    UnsupportedError,
    VQRequest,
)
from qhal.codebooks import STRUCTURED
from qhal.tensors import same_bits

GOLDEN = Path(os.environ.get("QHAL_GOLDEN", Path(__file__).parents[3] / "tests" / "golden"))
FP32 = (Format("fp32"),)


def codes(g: torch.Generator, entries: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, entries, shape, generator=g).int()


def books(g: torch.Generator, *shapes: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(s, generator=g).half() for s in shapes)


def aqlm(seed: int) -> CodebookTensor:
    """Two 8-bit codebooks of 2 x 8 vectors, a scale for every pair of rows; the last pair is half used."""
    g = torch.Generator().manual_seed(seed)
    s = CodebookSegment(codes(g, 256, 6, 4, 2), books(g, (256, 2, 8), (256, 2, 8)))
    return CodebookTensor((11, 32), (s,), scale=(torch.rand(6, generator=g) + 0.5).half())


def vptq(seed: int) -> CodebookTensor:
    """Vectors of 8 outputs; outlier columns with vectors of 4, two column groups with residuals, permuted, normed."""
    g = torch.Generator().manual_seed(seed)
    outliers = CodebookSegment(codes(g, 64, 5, 6, 1), books(g, (64, 4, 1)))
    groups = [CodebookSegment(codes(g, 16, 3, n, 2), books(g, (512, 8, 1), (16, 8, 1)), (1.0, 2.0)) for n in (14, 12)]
    k = 32
    return CodebookTensor(
        (19, k),
        (outliers, *groups),
        permutation=torch.randperm(k, generator=g),
        column_scale=(torch.rand(k, generator=g) + 0.5).half(),
        column_bias=torch.randn(k, generator=g).half(),
    )


def quip4(seed: int) -> CodebookTensor:
    g = torch.Generator().manual_seed(seed)
    s = CodebookSegment(codes(g, 65536, 16, 8, 2), ("e8p12", "e8p12"), (1.0, 3.45))
    return CodebookTensor((16, 64), (s,))


def quip3(seed: int) -> CodebookTensor:
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([codes(g, 65536, 16, 8), codes(g, 256, 16, 8)], -1)
    return CodebookTensor((16, 64), (CodebookSegment(index, ("e8p12", "e81b"), (1.0, 2.04)),), scale=torch.rand(16))


def mixed(seed: int) -> CodebookTensor:
    """One lattice segment, one stored; one scale for all."""
    g = torch.Generator().manual_seed(seed)
    lattice = CodebookSegment(codes(g, 65536, 8, 2, 1), ("e8p12",))
    stored = CodebookSegment(codes(g, 9, 4, 3, 1), books(g, (9, 2, 4)))
    return CodebookTensor((8, 28), (lattice, stored), scale=torch.tensor([0.25]))


KINDS = [aqlm, vptq, quip4, quip3, mixed]


def by_hand(w: CodebookTensor) -> torch.Tensor:
    """Entry by entry, from the docstrings of CodebookTensor and CodebookSegment, in float32."""
    n, k = w.shape
    value, start = torch.zeros(n, k), 0
    for s in w.segments:
        tables = [t if isinstance(t, torch.Tensor) else STRUCTURED[t]() for t in s.tables]
        _, a, b = tables[0].shape
        for i in range(n):
            for j in range(s.codes.shape[1] * b):
                total = torch.tensor(0.0)
                for c, table in enumerate(tables):
                    entry = table[int(s.codes[i // a, j // b, c]), i % a, j % b].float()
                    divisor = s.divisors[c] if s.divisors else 1.0
                    total = total + entry / torch.tensor(divisor)
                value[i, start + j] = total
        start += s.codes.shape[1] * b
    if w.scale is not None:
        a = tables[0].shape[1]
        for i in range(n):
            at = 0 if w.scale.numel() == 1 else i if w.scale.numel() == n else i // a
            value[i] *= w.scale[at].float()
    if w.permutation is not None:
        stored = value.clone()
        for j in range(k):
            value[:, int(w.permutation[j])] = stored[:, j]
    if w.column_scale is not None:
        value = value * w.column_scale.float()
    return value if w.column_bias is None else value + w.column_bias.float()


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_and_products(ops, kind):
    w = kind(1)
    n, k = w.shape
    value = by_hand(w)
    assert torch.equal(w.dequantize(), value)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        p = ops.prepare(w, VQRequest(w=w.format, n=n, k=k, out=out))
        assert torch.equal(ops.vq_decode(p), value.to(out))
        assert torch.equal(ops.vq_decode(p, rows=slice(3, 7)), value[3:7].to(out))
        given = torch.empty(n, k, dtype=out)
        assert ops.vq_decode(p, out=given) is given and torch.equal(given, value.to(out))
        with pytest.raises(FormatError, match="out is"):
            ops.vq_decode(p, out=torch.empty(n, k + 1, dtype=out))
    x = torch.randn(5, k)
    exact = GemmRequest(w=w.format, n=n, k=k, x=FP32, numerics=NumericsClass.EXACT, bias=True)
    bias = torch.randn(n)
    dense = ops.prepare(value, replace(exact, w=Format("fp32")), bias=bias)
    assert torch.equal(ops.gemm(x, ops.prepare(w, exact, bias=bias)), ops.gemm(x, dense))
    half = GemmRequest(w=w.format, n=n, k=k, x=(Format("bf16"),))
    copy = ops.prepare(value.bfloat16(), replace(half, w=Format("bf16")))
    assert torch.equal(ops.gemm(x.bfloat16(), ops.prepare(w, half)), ops.gemm(x.bfloat16(), copy))
    eight = Format.parse("int8.row*fp32")
    quantized = GemmRequest(w=w.format, n=n, k=k, x=(eight,))
    same = ops.prepare(value, replace(quantized, w=Format("fp32")), inputs=[Operand(eight)])
    assert torch.equal(ops.gemm(x, ops.prepare(w, quantized, inputs=[Operand(eight)])), ops.gemm(x, same))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact", [False, True])
def test_restore_and_refits(ops, kind, exact):
    w, other = kind(1), kind(2)
    n, k = w.shape
    r = GemmRequest(w=w.format, n=n, k=k, x=FP32, numerics=NumericsClass.EXACT if exact else None)
    p = ops.prepare(w, r)
    back = ops.restore(p)
    assert back.format == w.format and back.shape == w.shape and back.planes().keys() == w.planes().keys()
    assert all(same_bits(t, back.planes()[name]) for name, t in w.planes().items())
    ours = {t.data_ptr() for t in p.tensors().values()}
    assert not ours & {t.data_ptr() for made in (w, back) for t in made.planes().values()}
    addresses = {name: t.data_ptr() for name, t in p.tensors().items()}
    assert {f"weight.{name}" for name in w.planes()} <= addresses.keys()
    assert ops.prepare(other, r, into=p) is p
    assert {name: t.data_ptr() for name, t in p.tensors().items()} == addresses
    assert torch.equal(ops.gemm(torch.eye(k), p), ops.gemm(torch.eye(k), ops.prepare(other, r)))
    assert all(same_bits(t, ops.restore(p).planes()[name]) for name, t in other.planes().items())
    v = VQRequest(w=w.format, n=n, k=k, out=torch.float32)
    q = ops.prepare(w, v)
    kept = [t.data_ptr() for t in q.tensors().values()]
    ops.prepare(other, v, into=q)
    assert [t.data_ptr() for t in q.tensors().values()] == kept
    assert torch.equal(ops.vq_decode(q), other.dequantize())


def test_refits_refuse_what_changes_shape(ops):
    w = aqlm(1)
    r = GemmRequest(w=w.format, n=11, k=32, x=FP32)
    p = ops.prepare(w, r)
    y = ops.gemm(torch.eye(32), p)
    other = aqlm(2)
    for changed, why in (
        (replace(other, scale=None), "the request says"),
        (replace(other, scale=torch.ones(1).half()), r"into= weight\.scale: is .*was"),
        (replace(other, scale=torch.ones(6)), r"into= weight\.scale: is torch\.float32"),
        (replace(other, column_scale=torch.ones(32)), "the request says"),
        (replace(other, segments=(replace(other.segments[0], divisors=(1.0, 2.0)),)), "the request says"),
        (vptq(1), "the request says"),
    ):
        with pytest.raises(FormatError, match=why):
            ops.prepare(changed, r, into=p)
        assert torch.equal(ops.gemm(torch.eye(32), p), y)


def test_what_does_not_fit_is_refused_in_one_line(ops):
    good = aqlm(1)
    s, tables = good.segments[0], good.segments[0].tables
    for make, why in (
        (lambda: CodebookSegment(s.codes.long(), tables), r"codes of 2 codebooks are torch.int64 \(6, 4, 2\)"),
        (lambda: CodebookSegment(s.codes[..., :1], tables), "must be int32 "),
        (lambda: CodebookSegment(s.codes, (tables[0], tables[1][:, :1])), "vectors of one size"),
        (lambda: CodebookSegment(s.codes, tables, (1.0,)), "divisors"),
        (lambda: CodebookSegment(s.codes, tables, (1.0, 0.0)), "divisors"),
        (lambda: CodebookSegment(s.codes[..., :1], ("e9",)), "unknown structured codebook 'e9'; known: e8p12, e81b"),
        (lambda: CodebookTensor((13, 32), (s,)), r"do not cover a weight \[13, 32\]"),
        (lambda: CodebookTensor((10, 32), (s,)), "do not cover"),
        (lambda: CodebookTensor((11, 33), (s,)), "do not cover"),
        (lambda: CodebookTensor((11, 32), ()), "do not cover"),
        (lambda: replace(good, scale=torch.ones(4)), "4 row scales do not fit 11 rows"),
        (lambda: replace(good, column_bias=torch.ones(1)), r"column_bias .* must be \[32\]"),
        (lambda: replace(good, permutation=torch.arange(31)), "permutation"),
    ):
        with pytest.raises(FormatError, match=why):
            make()
    r = GemmRequest(w=good.format, n=11, k=32, x=FP32)
    with pytest.raises(FormatError, match="codes of codebook 1 in segment 0 reach from 0 to 256 of 256"):
        broken = s.codes.clone()
        broken[..., 1] = torch.arange(24).reshape(6, 4)
        broken[5, 3, 1] = 256
        ops.prepare(replace(good, segments=(replace(s, codes=broken),)), r)
    odd = replace(vptq(1), permutation=torch.zeros(32, dtype=torch.long))
    with pytest.raises(FormatError, match="must name each of them once"):
        ops.prepare(odd, GemmRequest(w=odd.format, n=19, k=32, x=FP32))
    grouped = GroupedRequest(gemm=r, experts=2, groups="offsets")
    with pytest.raises(UnsupportedError, match="codebook weights cannot be stacked; run one gemm per expert"):
        ops.prepare(good, grouped)


def whole(w: CodebookTensor, dim: int, world: int) -> bool:
    """Whether every cut lies between vectors: an independent statement of the rule."""
    if w.shape[dim] % world or (dim == 1 and w.permutation is not None and world > 1):
        return False
    cuts = [w.shape[dim] // world * r for r in range(1, world)]
    seams = [set(range(0, w.shape[0] + s.vector[0], s.vector[0])) for s in w.segments]
    if dim == 1:
        at, edges = 0, set()
        for s in w.segments:
            edges |= set(range(at, at + s.codes.shape[1] * s.vector[1] + 1, s.vector[1]))
            at += s.codes.shape[1] * s.vector[1]
        seams = [edges]
    return all(cut in edges for cut in cuts for edges in seams)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_are_the_shards_of_the_values(kind, dim, world):
    w = kind(1)
    value = w.dequantize()
    try:
        parts = [w.shard(dim, rank, world) for rank in range(world)]
    except ShardError as refusal:
        assert str(w.format) in str(refusal)
        assert not whole(w, dim, world), refusal
        return
    assert whole(w, dim, world)
    assert torch.equal(torch.cat([p.dequantize() for p in parts], dim), value)


# ---------------------------------------------------------------- files of the tools


def case(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, object]]:
    folder = GOLDEN / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not among the golden data in {GOLDEN} (set QHAL_GOLDEN)")
    stored: dict[str, torch.Tensor] = {}
    for file in (folder / "checkpoint").glob("*.safetensors"):
        stored |= load_file(file)
    config = json.loads((folder / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    return stored, load_file(folder / "expected.safetensors"), config["quantization_config"]


def decoded(ops, w: CodebookTensor) -> torch.Tensor:
    n, k = w.shape
    return ops.vq_decode(ops.prepare(w, VQRequest(w=w.format, n=n, k=k, out=torch.float32)))


@pytest.mark.parametrize("name", ["aqlm/aqlm_1x8_g8", "aqlm/aqlm_2x8_g8", "aqlm/aqlm_1x16_g8"])
def test_weights_of_aqlm(ops, name):
    stored, expected, config = case(name)
    modules = [k.removesuffix(".codes") for k in stored if k.endswith(".codes")]
    modules = [m for m in modules if f"{m}.weight" in expected]  # the small case has the answer for some
    assert modules
    for m in modules:
        books = stored[f"{m}.codebooks"]
        index = stored[f"{m}.codes"].int() & ((1 << config["nbits_per_codebook"]) - 1)
        wanted = expected[f"{m}.weight"]
        segment = CodebookSegment(index, tuple(books))
        w = CodebookTensor(tuple(wanted.shape), (segment,), scale=stored[f"{m}.scales"].reshape(-1))
        assert torch.equal(decoded(ops, w), wanted.float()), m


def fields(words: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """[..., count] fields of `width` bits of a little-endian stream of 32-bit words."""
    bits = (words.long()[..., None] >> torch.arange(32)) & 1
    bits = bits.flatten(-2)[..., : width * count].unflatten(-1, (count, width))
    return (bits << torch.arange(width)).sum(-1)


@pytest.mark.parametrize(
    "name",
    [f"vptq/vptq_{n}" for n in ("v6_k512_outlier", "v8_k1024_res256_norm_perm", "v8_k256", "v8_k256_unpacked_groups")],
)
def test_weights_of_vptq(ops, name):
    stored, expected, config = case(name)
    layers = {m: c for m, c in config["config_for_layers"].items() if f"{m}.weight" in expected}
    assert layers
    for m, c in layers.items():
        wanted = expected[f"{m}.weight"]
        main, residual = c["num_centroids"][1], max(c["num_res_centroids"][1], 0)
        b, br = (main - 1).bit_length(), (residual - 1).bit_length() if residual else 0
        segments = []
        if c["outlier_size"]:
            vo = c["vector_lens"][0]
            index = stored[f"{m}.outlier_indices"][0].view(torch.uint16).int()[..., None]
            segments.append(CodebookSegment(index, (stored[f"{m}.outlier_centroids.weight"].reshape(-1, vo, 1),)))
        v = c["vector_lens"][1]
        for i, words in enumerate(stored[f"{m}.indices"]):
            tables = [stored[f"{m}.centroids.weight"][i].reshape(-1, v, 1)]
            packed = c["is_indice_packed"]
            raw = fields(words, b + br, c["group_size"]) if packed else words.view(torch.uint16).long()
            index = [raw & ((1 << b) - 1)]
            if residual:
                tables.append(stored[f"{m}.res_centroids.weight"][i].reshape(-1, v, 1))
                index.append(raw >> b)
            segments.append(CodebookSegment(torch.stack(index, -1).int(), tuple(tables)))
        perm = stored.get(f"{m}.perm")
        w = CodebookTensor(
            tuple(wanted.shape),
            tuple(segments),
            permutation=None if perm is None else perm.view(torch.uint16).long(),
            column_scale=stored.get(f"{m}.weight_scale"),
            column_bias=stored.get(f"{m}.weight_bias"),
        )
        got = decoded(ops, w)
        assert torch.equal(got, wanted.float()), (
            m,
            float((got - wanted.float()).abs().max()),
            float(wanted.abs().max()),
        )
