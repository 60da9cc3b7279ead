"""prepare and restore: bit-exact both ways, compact, at fixed addresses under refits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhal import (
    Format,
    FormatError,
    GemmRequest,
    GroupedRequest,
    Hadamard,
    LinearSpec,
    NumericsClass,
    Operand,
)
from qhal.layers import prepare_linear
from qhal.tensors import same_bits
from qhal_portable import storage

NAMES = (
    "int4.g{g}*bf16", "int3.g{g}*fp16", "uint4-uint4.g{g}*fp16", "int4-int4.g{g}*bf16", "e2m1.g{g}*e8m0",
    "int8.row*fp32", "e2m1.g{g}*(e4m3fn.tensor*fp32)", "uint4.g{g}*(uint6.g4*fp16)-(uint6.g4*fp16)",
    "nf4.flat{g}*(lut8.flat16*fp32+fp32)",
    "lut4.row*fp32", "e4m3fn.{g}x{g}*fp32", "int1.row*bf16", "uint2-fp16.g{g}*fp16", "int6.g{g}*(int8.g4*fp16)",
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(NAMES), g=st.sampled_from([2, 3, 8, 16]), n=st.integers(1, 9), k=st.integers(1, 40),
    seed=st.integers(0, 999), experts=st.sampled_from([0, 1, 3]), order=st.booleans(), exact=st.booleans(),
)  # fmt: skip
def test_restore_gives_back_every_bit(ops, make, name, g, n, k, seed, experts, order, exact):
    fmt = Format.parse(name.format(g=g))
    order = order and fmt.block.kind == "group" and fmt.scale.plain and not experts
    shape = (experts, n, k) if experts else (n, k)
    w = make(fmt, shape, seed, act_order=order)
    before = {name: t.clone() for name, t in w.planes().items()}
    r = GemmRequest(
        w=fmt, n=n, k=k, x=(Format("bf16"),), group_index=order, numerics=NumericsClass.EXACT if exact else None
    )
    p = ops.prepare(w, GroupedRequest(gemm=r, experts=experts, groups="offsets") if experts else r)
    assert ops.restore(p).equal(w)
    assert all(same_bits(t, w.planes()[name]) for name, t in before.items())  # the input is untouched
    ours = {t.data_ptr() for t in p.tensors().values() if t.numel()}
    assert not ours & {t.data_ptr() for t in w.planes().values()}  # and shares nothing
    assert not ours & {t.data_ptr() for t in ops.restore(p).planes().values()}


def test_int4_costs_half_a_byte_and_its_copy_two(ops, make):
    w = make("int4.g32*bf16", (64, 128), 0)
    size = 64 * 128
    r = GemmRequest(w=w.format, n=64, k=128, x=(Format("bf16"),))
    assert ops.prepare(w, r).nbytes == size * (0.5 + 2 / 32 + 2)
    exact = GemmRequest(w=w.format, n=64, k=128, x=(Format("bf16"),), numerics=NumericsClass.EXACT)
    p = ops.prepare(w, exact)
    assert p.nbytes == size * (0.5 + 2 / 32) and p.support.layouts == ("nibble",)
    plain = torch.randn(64, 128).bfloat16()
    same = ops.prepare(plain, GemmRequest(w=Format("bf16"), n=64, k=128, x=(Format("bf16"),)))
    assert same.nbytes == size * 2  # a weight that is its own copy is kept once
    assert torch.equal(ops.restore(same), plain)


def test_large_weights_are_decoded_in_parts(ops, make, monkeypatch, weight_format):
    w = make(weight_format, (48, 64), 3)
    monkeypatch.setattr(storage, "_PART", 7 * 64)
    kept = storage.keep(w, w.device)
    assert torch.equal(torch.nan_to_num(torch.cat(list(storage.parts(kept)))), torch.nan_to_num(w.dequantize()))
    if weight_format == "int4.g32*bf16":
        assert len(list(storage.parts(kept))) == 7


@pytest.mark.parametrize("name", ["int4.g8*bf16", "uint4-uint4.g8*bf16", "e2m1.g16*(e4m3fn.tensor*fp32)"])
@pytest.mark.parametrize(
    ("layout", "pair"), [("nibble", (0, 1)), ("nibble16", (0, 16)), ("nibble32", (0, 32)), ("word16", (0, 16))]
)
def test_two_codes_of_a_byte_are_as_far_apart_as_the_layout_says(make, name, layout, pair):
    w = make(name, (6, 128), 3)
    kept = storage.keep(w, w.device, layout)
    assert kept.layout == layout and kept.codes.shape == (6, 64) and storage.canonical(kept).equal(w)
    low, high = (w.codes[:, column].to(torch.uint8) & 15 for column in pair)
    assert torch.equal(kept.codes[:, 0], low | high << 4)
    assert torch.equal(torch.cat(list(storage.parts(kept))), w.dequantize())


def test_eight_codes_of_a_word(make):
    w = make("int4.g8*bf16", (3, 256), 3)
    kept = storage.keep(w, w.device, "word16")
    words = kept.codes.view(torch.int32)
    assert words.shape == (3, 32) and storage.canonical(kept).equal(w)
    for part in range(8):
        first = (words[:, :16] >> (4 * part)) & 15
        assert torch.equal(first, w.codes[:, 16 * part : 16 * part + 16].int() & 15)


def test_a_layout_of_runs_that_do_not_fit_keeps_the_canonical_one(make):
    w = make("int4.g8*bf16", (6, 96), 3)
    assert storage.keep(w, w.device, "nibble32").layout == "canonical" == storage.keep(w, w.device, "canonical").layout


@pytest.mark.parametrize("name", ["int4.g8*bf16", "int8.row*fp32", "e2m1.g16*(e4m3fn.tensor*fp32)", "bf16"])
@pytest.mark.parametrize("exact", [False, True])
def test_into_keeps_addresses_and_changes_values(ops, make, name, exact):
    first, second = make(name, (16, 32), 1), make(name, (16, 32), 2)
    r = GemmRequest(
        w=first.format, n=16, k=32, x=(Format("bf16"),), bias=True, numerics=NumericsClass.EXACT if exact else None
    )
    p = ops.prepare(first, r, bias=torch.ones(16))
    addresses = {n: t.data_ptr() for n, t in p.tensors().items()}
    again = ops.prepare(second, r, bias=torch.full((16,), 0.3), into=p)
    assert again is p and {n: t.data_ptr() for n, t in p.tensors().items()} == addresses
    assert ops.restore(p).equal(second)
    x = torch.randn(4, 32).bfloat16()
    fresh = ops.prepare(second, r, bias=torch.full((16,), 0.3))
    assert torch.equal(ops.gemm(x, p), ops.gemm(x, fresh))


def test_into_refuses_and_leaves_everything_as_it_was(ops, make):
    w = make("int4.g8*bf16", (16, 32), 1)
    to = Format.parse("e4m3fn.tensor*fp32")
    r = GemmRequest(w=w.format, n=16, k=32, x=(to,), static=(True,))

    def static(value):
        return [Operand(to, scale=torch.tensor([value]))]

    p = ops.prepare(w, r, inputs=static(0.5))
    x = torch.randn(2, 32)
    y = ops.gemm(x, p)
    other = make("int4.g8*bf16", (16, 32), 9)
    for weight, request, inputs, word in (
        (other, r, static(0.25), "host number"),
        (make("int4.g4*bf16", (16, 32), 1), r, static(0.5), "the request says"),
        (make("int4.g8*bf16", (8, 32), 1), r, static(0.5), "the request says"),
        (other, GemmRequest(w=w.format, n=16, k=32, x=(to,), static=(True,), m=(1, 2)), static(0.5), "prepared for"),
        (other, r, [Operand(to)], "static"),
        (other, r, [], "inputs"),
    ):
        with pytest.raises(FormatError, match=word):
            ops.prepare(weight, request, inputs=inputs, into=p)
        assert ops.restore(p).equal(w) and torch.equal(ops.gemm(x, p), y)
    ops.prepare(other, r, inputs=static(0.5), into=p)
    assert ops.restore(p).equal(other)


def test_operand_copies_follow_a_refit(ops, make):
    a, b = make("int4.g8*bf16", (8, 16), 1), make("int4.g8*bf16", (8, 16), 2)
    o = Operand(Format.parse("int8.row*fp32"))
    r = GemmRequest(w=a.format, n=8, k=16, x=(Format("fp32"),), operand=o.format)
    p = ops.prepare(a, r, operand=o)
    ops.prepare(b, r, operand=o, into=p)
    assert torch.equal(ops.gemm(torch.eye(16), p), ops.gemm(torch.eye(16), ops.prepare(b, r, operand=o)))


def test_what_does_not_fit_the_request_is_refused(ops, make):
    w = make("int4.g8*bf16", (16, 32), 1)
    r = GemmRequest(w=w.format, n=16, k=32, x=(Format("bf16"),))
    ordered = make("int4.g8*bf16", (16, 32), 1, act_order=True)
    from dataclasses import replace

    for weight, kw, request, word in (
        (w, {"bias": torch.ones(16)}, r, "bias"),
        (w, {}, replace(r, bias=True), "bias"),
        (w, {"bias": torch.ones(15)}, replace(r, bias=True), "bias"),
        (ordered, {}, r, "group_index"),
        (w, {"inputs": [Operand(Format.parse("fp8"))]}, r, "inputs"),
        (w, {"operand": Operand(Format.parse("fp8"))}, r, "operand"),
        (torch.zeros(16, 32), {}, r, "the weight is fp32"),
    ):
        with pytest.raises(FormatError, match=word):
            ops.prepare(weight, request, **kw)
    broken = replace(w, codes=w.codes.clone().fill_(9))
    with pytest.raises(FormatError, match="int4 has -8 to 7"):
        ops.prepare(broken, r)
    far = replace(ordered, group_index=torch.full((32,), 4, dtype=torch.int32))
    with pytest.raises(FormatError, match="group_index reaches"):
        ops.prepare(far, replace(r, group_index=True))


@pytest.mark.parametrize("turned", [False, True])
def test_a_layer_refuses_what_it_cannot_read_in_one_line(ops, make, turned):
    chain = (Hadamard(32),) if turned else ()
    layer = prepare_linear(LinearSpec(make("int4.g8*bf16", (8, 32)), rotate_in=chain, name="m"), ops)
    x = torch.randn(4, 2, 32).bfloat16()
    assert torch.equal(layer(x), layer(x.reshape(-1, 32)).reshape(4, 2, 8))
    assert layer(x[0, 0]).shape == (8,) and layer(x[:, :1]).shape == (4, 1, 8)
    for bad in (None, [1.0], torch.tensor(1.0), x.mT.contiguous().mT, x[:, 0].T.contiguous().T):
        with pytest.raises(FormatError, match=r"x is|x has strides"):
            layer(bad)
