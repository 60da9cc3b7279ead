"""grouped_gemm is gemm per expert, in all three forms, with the activation rounded once."""

from __future__ import annotations

import math

import pytest
import torch

from qhal import (
    Activation,
    BatchError,
    ExpertsSpec,
    Format,
    FormatError,
    GemmRequest,
    GroupedRequest,
    Indexed,
    LinearSpec,
    Masked,
    NumericsClass,
    Offsets,
    Operand,
    QTensor,
)
from qhal.layers import prepare_experts

E, N, K = 4, 12, 32


def requests(w, x: str, groups: str = "offsets", **kw):
    gemm = GemmRequest(
        w=w.format,
        n=N,
        k=K,
        x=(Format.parse(x),),
        out=torch.bfloat16,
        numerics=NumericsClass.EXACT,
        **kw.pop("gemm", {}),
    )
    return gemm, GroupedRequest(gemm=gemm, experts=E, groups=groups, **kw)


def prepared(ops, w, x: str, **kw):
    gemm, grouped = requests(w, x, **kw)
    inputs = [] if gemm.x[0].plain else [Operand(gemm.x[0])]
    zeros = [None] * E if w.zero is None else w.zero
    parts = [QTensor(w.format, w.codes[e], w.scale[e], zeros[e]) for e in range(E)]
    singles = [ops.prepare(part, gemm, inputs=inputs) for part in parts]
    return ops.prepare(w, grouped, inputs=inputs), singles


@pytest.mark.parametrize("name", ["int4.g8*bf16", "uint4-uint4.g8*fp16", "e4m3fn.row*fp32"])
@pytest.mark.parametrize("x_format", ["bf16", "int8.row*fp32", "e4m3fn.g16*fp32"])
@pytest.mark.parametrize("sizes", [[3, 0, 2, 4], [0, 0, 9, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_offsets_are_gemm_per_expert(ops, make, name, x_format, sizes):
    p, singles = prepared(ops, make(name, (E, N, K), 1), x_format)
    x = torch.randn(sum(sizes), K).bfloat16()
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
    y = ops.grouped_gemm(x, p, Offsets(offsets))
    want = [ops.gemm(part, s) for part, s in zip(x.split(sizes), singles, strict=True)]
    assert torch.equal(y, torch.cat(want))
    order = torch.cat([offsets[e] + torch.randperm(n) for e, n in enumerate(sizes)])
    assert torch.equal(ops.grouped_gemm(x[order.long()], p, Offsets(offsets)), y[order.long()])
    if x_format != "bf16":
        assert torch.equal(ops.grouped_gemm(ops.quantize(x, Format.parse(x_format)), p, Offsets(offsets)), y)


@pytest.mark.parametrize("x_format", ["bf16", "int8.row*fp32", "e4m3fn.tensor*fp32"])
def test_masked_rows_do_not_leak(ops, make, x_format):
    p, singles = prepared(ops, make("int4.g8*bf16", (E, N, K), 2), x_format, groups="masked")
    counts = torch.tensor([2, 0, 5, 1], dtype=torch.int32)
    x = torch.randn(E, 5, K).bfloat16()
    clean = torch.where(torch.arange(5)[None, :, None] < counts[:, None, None], x, 0)
    dirty = torch.where(torch.arange(5)[None, :, None] < counts[:, None, None], x, float("nan"))
    y = ops.grouped_gemm(dirty, p, Masked(counts))
    assert torch.equal(y, ops.grouped_gemm(clean, p, Masked(counts)))
    if "tensor" not in x_format:
        for e, count in enumerate(counts.tolist()):
            assert torch.equal(y[e, :count], ops.gemm(x[e, :count], singles[e]))


def test_indexed_expands_and_sums(ops, make):
    p, singles = prepared(ops, make("int4.g8*bf16", (E, N, K), 3), "bf16", groups="indexed", top_k=2)
    ids = torch.tensor([[0, 3], [2, -1], [-1, -1], [1, 1]], dtype=torch.int32)
    weights = torch.rand(4, 2)
    x = torch.randn(4, K).bfloat16()
    pairs = ops.grouped_gemm(x, p, Indexed(ids))
    assert pairs.shape == (8, N)
    for t in range(4):
        for j in range(2):
            e = int(ids[t, j])
            want = ops.gemm(x[t : t + 1], singles[e])[0] if e >= 0 else torch.zeros(N).bfloat16()
            assert torch.equal(pairs[2 * t + j], want)
    again = ops.grouped_gemm(x.repeat_interleave(2, 0), p, Indexed(ids, pairs=True))
    assert torch.equal(again, pairs)
    y = ops.grouped_gemm(x, p, Indexed(ids, torch.where(ids < 0, torch.nan, weights)))  # what -1 weighs is not read
    want = (pairs.float().reshape(4, 2, N) * weights[..., None]).sum(1)
    assert y.shape == (4, N) and torch.allclose(y.float(), want, atol=2e-1, rtol=2e-2) and (y[2] == 0).all()
    assert ops.grouped_gemm(x[:0], p, Indexed(ids[:0], weights[:0])).shape == (0, N)


ACTIVATIONS = {
    "silu": lambda g: g / (1 + math.exp(-g)),
    "gelu": lambda g: 0.5 * g * (1 + math.erf(g / math.sqrt(2))),
    "gelu_tanh": lambda g: 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
    "relu2": lambda g: max(g, 0.0) ** 2,
}


@pytest.mark.parametrize("name", [*ACTIVATIONS, "swiglu"])
@pytest.mark.parametrize("gated", [True, False])
def test_activation_is_applied_before_the_one_rounding(ops, make, name, gated):
    w = make("int4.g8*bf16", (E, N, K), 4)
    a = Activation(name, gated, alpha=1.702 if name == "swiglu" else 1.0, limit=1.5 if name == "swiglu" else None)
    p = ops.prepare(w, requests(w, "fp32", activation=a)[1])
    x = torch.randn(3, K) * 0.1
    y = ops.grouped_gemm(x, p, Offsets(torch.tensor([0, 0, 3, 3, 3], dtype=torch.int32)))
    full = x.double() @ w.dequantize()[1].double().T
    gate, up = full.chunk(2, -1) if gated else (full, torch.ones_like(full))
    assert y.shape == (3, N // 2 if gated else N)
    for i in range(3):
        for j in range(y.shape[1]):
            g, u = float(gate[i, j]), float(up[i, j])
            if name == "swiglu":
                g = min(g, 1.5)
                acted = g / (1 + math.exp(-1.702 * g)) * (max(-1.5, min(1.5, u)) if gated else 1)
            else:
                acted = ACTIVATIONS[name](g) * u
            assert y[i, j].double().item() == pytest.approx(acted, rel=2**-8 * 1.001, abs=1e-30)


def test_quantized_results_feed_the_next_product(ops, make):
    w = make("int4.g8*bf16", (E, N, K), 5)
    to = Format.parse("int8.row*fp32")
    plain = ops.prepare(w, requests(w, "bf16", activation=Activation())[1])
    fused = ops.prepare(w, requests(w, "bf16", activation=Activation(), quantize=to)[1])
    groups = Offsets(torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32))
    x = torch.randn(6, K).bfloat16()
    q = ops.grouped_gemm(x, fused, groups)
    assert q.equal(ops.quantize(ops.grouped_gemm(x, plain, groups), to))
    out = ops.quantize(torch.zeros(6, N // 2), to)
    assert ops.grouped_gemm(x, fused, groups, out=out) is out and out.equal(q)


@pytest.mark.parametrize("form", ["offsets", "indexed"])
def test_a_whole_expert_layer(ops, make, form):
    up, down = make("int4.g8*bf16", (E, 2 * N, K), 6), make("int4.g4*bf16", (E, K, N), 7)
    spec = ExpertsSpec(LinearSpec(up), LinearSpec(down), Activation("silu"))
    layer = prepare_experts(spec, ops, dtype=torch.float32)
    ids = torch.tensor([[0, 2], [2, 1], [3, 0]], dtype=torch.int32)
    weights = torch.rand(3, 2)
    x = torch.randn(3, K) * 0.1

    def one(row, e):
        g, u = (row.double() @ up.dequantize()[e].double().T).chunk(2)
        return (g * torch.sigmoid(g) * u) @ down.dequantize()[e].double().T

    if form == "indexed":
        y = layer(x, Indexed(ids, weights))
        want = torch.stack([sum(weights[t, j].double() * one(x[t], ids[t, j]) for j in range(2)) for t in range(3)])
    else:
        y = layer(x, Offsets(torch.tensor([0, 1, 1, 3, 3], dtype=torch.int32)))
        want = torch.stack([one(x[0], 0), one(x[1], 2), one(x[2], 2)])
    assert torch.allclose(y.double(), want, rtol=1e-5, atol=1e-5)


def test_bias_per_expert_and_batch_invariance(ops, make):
    w = make("int4.g8*bf16", (E, N, K), 8)
    bias = torch.randn(E, N)
    p = ops.prepare(w, requests(w, "bf16", gemm={"bias": True, "batch_invariant": True})[1], bias=bias)
    x = torch.zeros(4, K).bfloat16()
    y = ops.grouped_gemm(x, p, Offsets(torch.arange(5, dtype=torch.int32)))
    assert torch.equal(y, bias.bfloat16()) and p.support.batch_invariant


def test_plain_experts(ops):
    w = torch.randn(E, N, K)
    r = GroupedRequest(gemm=GemmRequest(w=Format("fp32"), n=N, k=K, x=(Format("fp32"),)), experts=E, groups="offsets")
    p = ops.prepare(w, r)
    x = torch.randn(E, K)
    y = ops.grouped_gemm(x, p, Offsets(torch.arange(E + 1, dtype=torch.int32)))
    assert torch.equal(y, torch.einsum("ek,enk->en", x.double(), w.double()).float())
    assert torch.equal(ops.restore(p), w)


def test_errors(ops, make):
    w = make("int4.g8*bf16", (E, N, K), 9)
    p, singles = prepared(ops, w, "bf16")
    x = torch.zeros(5, K).bfloat16()
    for bad in ([0, 1, 2, 3], [0, 1, 2, 3, 6], [0, 3, 2, 4, 5], [-1, 1, 2, 3, 5]):
        with pytest.raises(BatchError, match="offsets"):
            ops.grouped_gemm(x, p, Offsets(torch.tensor(bad, dtype=torch.int32)))
    with pytest.raises(BatchError, match="counts"):
        ops.grouped_gemm(torch.zeros(E, 2, K).bfloat16(), p, Masked(torch.tensor([1, 1, 3, 0])))
    with pytest.raises(FormatError, match="masked groups need"):
        ops.grouped_gemm(x, p, Masked(torch.tensor([1, 1, 1, 0])))
    with pytest.raises(BatchError, match="ids"):
        ops.grouped_gemm(x, p, Indexed(torch.tensor([[4]] * 5)))
    with pytest.raises(BatchError, match="rows"):
        ops.grouped_gemm(x, p, Indexed(torch.tensor([[1]] * 4)))
    good = Offsets(torch.tensor([0, 1, 2, 3, 5], dtype=torch.int32))
    with pytest.raises(FormatError, match="GroupedRequest"):
        ops.grouped_gemm(x, singles[0], good)
    with pytest.raises(FormatError, match="GemmRequest"):
        ops.gemm(x, p)
    with pytest.raises(FormatError, match="out is"):
        ops.grouped_gemm(x, p, good, out=torch.zeros(5, N))


def own_scales(name="int8.tensor*fp32"):
    f = Format.parse(name)
    return [Operand(f, torch.tensor([0.01 * 3**e])) for e in range(E)]


@pytest.mark.parametrize("name", ["int8.tensor*fp32", "e4m3fn.tensor*fp32", "e2m1.g16*(e4m3fn.tensor*fp32)"])
@pytest.mark.parametrize("form", ["offsets", "masked", "indexed", "pairs"])
def test_every_expert_quantizes_its_rows_with_its_own_static_scale(ops, make, name, form):
    w, parts = make("int4.g8*bf16", (E, N, K), 5), own_scales(name)
    groups = {"pairs": "indexed"}.get(form, form)
    gemm, grouped = requests(w, name, groups=groups, gemm={"static": (True,)})
    p = ops.prepare(w, grouped, inputs=[Operand.stack(parts, "up")])
    singles = [ops.prepare(QTensor(w.format, w.codes[e], w.scale[e]), gemm, inputs=[parts[e]]) for e in range(E)]
    x = torch.randn(8, K).bfloat16()
    if form == "offsets":
        y = ops.grouped_gemm(x, p, Offsets(torch.tensor([0, 3, 3, 5, 8], dtype=torch.int32)))
        want = [ops.gemm(x[a:b], singles[e]) for e, (a, b) in enumerate([(0, 3), (3, 3), (3, 5), (5, 8)])]
        assert torch.equal(y, torch.cat(want))
        assert not torch.equal(y[3:5], ops.gemm(x[3:5], ops.prepare(singles_weight(w, 2), gemm, inputs=[parts[0]])))
    elif form == "masked":
        counts = torch.tensor([2, 0, 5, 1], dtype=torch.int32)
        x = torch.full((E, 5, K), float("nan")).bfloat16()
        for e, n in enumerate(counts.tolist()):
            x[e, :n] = torch.randn(n, K)
        y = ops.grouped_gemm(x, p, Masked(counts))
        for e, n in enumerate(counts.tolist()):
            assert torch.equal(y[e, :n], ops.gemm(x[e, :n], singles[e]))
            assert not y[e, n:].any()
    else:
        ids = torch.tensor([[0, 3], [1, -1], [3, 2], [0, 1]], dtype=torch.int32)
        pairs = form == "pairs"
        y = ops.grouped_gemm(x if pairs else x[:4], p, Indexed(ids, pairs=pairs))
        for i, e in enumerate(ids.flatten().tolist()):
            row = x[i] if pairs else x[i // 2]
            want = torch.zeros(1, N).bfloat16() if e < 0 else ops.gemm(row[None], singles[e])
            assert torch.equal(y[i], want[0])


def singles_weight(w, e):
    return QTensor(w.format, w.codes[e], w.scale[e])


def test_operands_of_weights_may_be_per_expert(ops, make):
    """int4 stored, fp8 multiplied: every expert's weight is rounded with its own scale."""
    w, f = make("int4.g8*bf16", (E, N, K), 6), Format.parse("e4m3fn.tensor*fp32")
    parts = [Operand(f, torch.tensor([0.03 * 2**e])) for e in range(E)]
    gemm, grouped = requests(w, "e4m3fn.row*fp32", gemm={"operand": f})
    row = [Operand(Format.parse("e4m3fn.row*fp32"))]
    p = ops.prepare(w, grouped, inputs=row, operand=Operand.stack(parts, "up"))
    x = torch.randn(2 * E, K).bfloat16()
    y = ops.grouped_gemm(x, p, Offsets(torch.arange(0, 2 * E + 1, 2, dtype=torch.int32)))
    for e in range(E):
        one = ops.prepare(singles_weight(w, e), gemm, inputs=row, operand=parts[e])
        assert torch.equal(y[2 * e : 2 * e + 2], ops.gemm(x[2 * e : 2 * e + 2], one))


def test_scales_per_expert_are_checked_and_refitted(ops, make):
    w = make("int4.g8*bf16", (E, N, K), 5)
    own = Operand.stack(own_scales(), "up")
    gemm, grouped = requests(w, "int8.tensor*fp32", gemm={"static": (True,)})
    with pytest.raises(FormatError, match="static scales of 3 experts, the request has 4"):
        ops.prepare(w, grouped, inputs=[own.experts(0, 3)])
    with pytest.raises(FormatError, match="static scales of 4 experts, the product has no experts"):
        ops.prepare(singles_weight(w, 0), gemm, inputs=[own])
    with pytest.raises(FormatError, match=r"one row per expert; choose one with Operand\.expert"):
        ops.quantize(torch.randn(2, K), own)
    p = ops.prepare(w, grouped, inputs=[own])
    x, groups = torch.randn(4, K).bfloat16(), Offsets(torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32))
    with pytest.raises(FormatError, match=r"x is .*must be bf16, fp16 or fp32"):
        ops.grouped_gemm(x.double(), p, groups)
    addresses = {name: t.data_ptr() for name, t in p.tensors().items()}
    other = Operand.stack(own_scales()[::-1], "up")
    ops.prepare(w, grouped, inputs=[other], into=p)
    assert {name: t.data_ptr() for name, t in p.tensors().items()} == addresses
    fresh = ops.prepare(w, grouped, inputs=[other])
    assert torch.equal(ops.grouped_gemm(x, p, groups), ops.grouped_gemm(x, fresh, groups))
    with pytest.raises(FormatError, match="into= input 0"):
        ops.prepare(w, grouped, inputs=[own_scales()[0]], into=p)
    again = ops.quantize(x, own_scales()[0])  # a quantized x is used as it is
    assert torch.equal(ops.grouped_gemm(again, p, groups), ops.grouped_gemm(again, fresh, groups))
